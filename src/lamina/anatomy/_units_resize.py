"""What modules and configs must say when units or channels go: found by trial on the block, then certified."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

from lamina.anatomy._units_cut import TOLERANCE, Attributes, filled, value_of, without
from lamina.anatomy._units_experts import avoided
from lamina.anatomy._units_find import NoUnits, Units
from lamina.anatomy._units_probe import Given, Rig
from lamina.core.sites import Kind, Tie

SIZES = frozenset({"in_features", "out_features", "nf", "nx"})
"""What follows from a map's own weights."""
TRIES = 400


@dataclass(frozen=True)
class Resized:
    """Paths relative to the block: attribute → number, and field → number of the configs that modules hold."""

    numbers: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])
    configs: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])


def resized(rig: Rig, units: Units, gone: Sequence[int]) -> Resized:
    """What changes beside the tensors, so that the block without these units runs as it does with them silenced.

    The fewest changes that do; of experts, those of all modules around them, as some ways to run them read what others
    don't. Raises NoUnits where none do.
    """
    experts = units.kind is Kind.EXPERT
    if experts and any(value_of(rig, t.param).shape[t.dim] == t.size for t in units.ties):
        raise NoUnits("its experts are modules of a list, and not parts of one tensor")
    due = avoided(rig, units, gone) if experts else rig.run(filled(rig, units.outputs, gone))
    effect = max(float((due - rig.run()).norm()), (1.0 if experts else 1e-6) * float(due.norm()))
    changed = without(rig, units.ties, gone)
    attributes = Attributes(rig, units, changed, len(gone))
    free = {n: held for n, held in attributes.free.items() if n.partition(":")[0] not in SIZES}
    sizes = _sizes(rig, changed)
    ways = [[change for n in setting for change in free[n]] for setting in _settings(list(free))]
    for changes in [_near(rig, units, free), *ways] if experts else ways:
        with _Set([*sizes, *changes]):
            try:
                out = rig.run(changed)
            except Exception:  # whatever a class does with numbers that do not fit
                continue
        if out.shape == due.shape and float((out - due).norm()) <= TOLERANCE[rig.dtype] * effect:
            return _told(rig, changes)
    raise NoUnits("no setting of its numbers lets the block run without them")


def _near(rig: Rig, units: Units, free: Mapping[str, Sequence[tuple[Any, str, Any]]]) -> list[tuple[Any, str, Any]]:
    """The changes of modules that hold a tied tensor, or hold such a module, but for the block itself."""
    paths = {t.param.rpartition(".")[0] for t in units.ties}
    paths |= {p[: m.start()] for p in paths for m in re.finditer(r"\.", p)}
    near = {id(rig.module.get_submodule(p)) for p in paths if p}
    return [change for held in free.values() for change in held if id(change[0]) in near]


def slimmer(rig: Rig, ties: Sequence[Tie], width: int, gone: Sequence[int], narrow: Given) -> Resized:
    """What changes beside the tensors, so that the block runs on a stream without these channels (`narrow`).

    The fewest changes with which it gives such a stream. Raises NoUnits where none do.
    """
    units = Units(Kind.CHANNEL, width, tuple(ties), ())
    changed = without(rig, units.ties, gone)
    attributes = Attributes(rig, units, changed, len(gone))
    free = {n: held for n, held in attributes.free.items() if n.partition(":")[0] not in SIZES}
    sizes, given = _sizes(rig, changed), rig.given
    try:
        rig.given = narrow
        for setting in _settings(list(free)):
            changes = [(holder, name, made) for n in setting for holder, name, made in free[n]]
            with _Set([*sizes, *changes]):
                try:
                    out = rig.run(changed)
                except Exception:  # whatever a class does with numbers that do not fit
                    continue
            if out.shape[-1] == width - len(gone) and bool(torch.isfinite(out).all()):
                return _told(rig, changes)
    finally:
        rig.given = given
    raise NoUnits("no setting of its numbers lets the block run on fewer channels")


def _sizes(rig: Rig, changed: Mapping[str, Any]) -> list[tuple[Any, str, Any]]:
    """The sizes that maps and norms have by their weights."""
    found: list[tuple[Any, str, Any]] = []
    for name, value in changed.items():
        path, _, last = name.rpartition(".")
        module = rig.module.get_submodule(path)
        if last == "weight" and value.ndim == 2:
            outputs, inputs = value.shape if isinstance(module, torch.nn.Linear) else value.shape[::-1]
            pairs = {"out_features": outputs, "nf": outputs, "in_features": inputs, "nx": inputs}
            found += [(module, k, v) for k, v in pairs.items() if hasattr(module, k)]
        if last == "weight" and hasattr(module, "normalized_shape"):
            found.append((module, "normalized_shape", tuple(value.shape)))
    return found


def _settings(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Names of what is changed: none, then ever more, then all; at most `TRIES`."""
    count = 0
    for size in (0, 1, 2, 3, len(names)):
        for way in combinations(names, size) if size <= len(names) else ():
            count += 1
            if count > TRIES:
                return
            yield way


class _Set:
    """Inside, attributes have other numbers."""

    def __init__(self, changes: Sequence[tuple[Any, str, Any]]) -> None:
        self.changes = [(holder, name, made, vars(holder)[name]) for holder, name, made in changes]

    def __enter__(self) -> None:
        for holder, name, value, _ in self.changes:
            vars(holder)[name] = value

    def __exit__(self, *error: object) -> None:
        for holder, name, _, before in reversed(self.changes):
            vars(holder)[name] = before


def _told(rig: Rig, changes: Sequence[tuple[Any, str, int]]) -> Resized:
    numbers: dict[str, dict[str, int]] = {}
    configs: dict[str, dict[str, int]] = {}
    modules = dict(rig.module.named_modules())
    for holder, name, made in changes:
        for path, module in modules.items():
            if module is holder:
                numbers.setdefault(path, {})[name] = made
            elif vars(module).get("config") is holder:
                configs.setdefault(path, {})[name] = made
    return Resized(numbers, configs)


def runs_left(rig: Rig, units: Units, gone: Sequence[int]) -> dict[str, list[tuple[int, list[list[int]]]]]:
    """Tensor of the block → [(dimension, runs [start, stop] of what stays)]."""
    from lamina.anatomy._units_cut import rows_of

    keep: dict[tuple[str, int], torch.Tensor] = {}
    for tie in units.ties:
        length = value_of(rig, tie.param).shape[tie.dim]
        mask = keep.setdefault((tie.param, tie.dim), torch.ones(length, dtype=torch.bool))
        mask[rows_of(tie, gone, length)] = False
    found: dict[str, list[tuple[int, list[list[int]]]]] = {}
    for (name, dim), mask in keep.items():
        found.setdefault(name, []).append((dim, runs_of(mask.nonzero().flatten().tolist())))
    return found


def runs_of(rows: Sequence[int]) -> list[list[int]]:
    """Sorted numbers as runs [start, stop]."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] = row + 1
        else:
            runs.append([row, row + 1])
    return runs
