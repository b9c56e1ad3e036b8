"""What a block's modules and configs must say when units of it are cut: found by trial on the block, then certified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

from lamina.anatomy._units_cut import TOLERANCE, Attributes, filled, value_of, without
from lamina.anatomy._units_find import NoUnits, Units
from lamina.anatomy._units_probe import Rig

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

    The fewest changes that do. Raises NoUnits where none do.
    """
    due = rig.run(filled(rig, units.outputs, gone))
    effect = max(float((due - rig.run()).norm()), 1e-6 * float(due.norm()))
    changed = without(rig, units.ties, gone)
    attributes = Attributes(rig, units, changed, len(gone))
    free = {n: held for n, held in attributes.free.items() if n.partition(":")[0] not in SIZES}
    sizes = _sizes(rig, changed)
    for setting in _settings(list(free)):
        changes = [(holder, name, made) for n in setting for holder, name, made in free[n]]
        with _Set([*sizes, *changes]):
            try:
                out = rig.run(changed)
            except Exception:  # whatever a class does with numbers that do not fit
                continue
        if out.shape == due.shape and float((out - due).norm()) <= TOLERANCE[rig.dtype] * effect:
            return _told(rig, changes)
    raise NoUnits("no setting of its numbers lets the block run without them")


def _sizes(rig: Rig, changed: Mapping[str, Any]) -> list[tuple[Any, str, int]]:
    """The sizes that maps have by their weights."""
    found = []
    for name, value in changed.items():
        path, _, last = name.rpartition(".")
        module = rig.module.get_submodule(path)
        if last == "weight" and value.ndim == 2:
            outputs, inputs = value.shape if isinstance(module, torch.nn.Linear) else value.shape[::-1]
            pairs = {"out_features": outputs, "nf": outputs, "in_features": inputs, "nx": inputs}
            found += [(module, k, v) for k, v in pairs.items() if hasattr(module, k)]
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

    def __init__(self, changes: Sequence[tuple[Any, str, int]]) -> None:
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
        found.setdefault(name, []).append((dim, _runs(mask.nonzero().flatten().tolist())))
    return found


def _runs(rows: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] = row + 1
        else:
            runs.append([row, row + 1])
    return runs
