"""The proof that a unit is one: zeroing it, masking it and cutting it do the same, to float64's accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor

from lamina.anatomy._units_find import FEW, NoUnits, Units
from lamina.anatomy._units_probe import Rig, configs
from lamina.core.sites import Kind, Tie

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Of what the unit adds, by the type that the block runs in; some compute in float32 for a while in any case."""
TRIES = 160
"""Ways to set the attributes of a cut module that are tried."""


def rows_of(tie: Tie, units: Iterable[int], length: int) -> Tensor:
    """The indices that some units own along the tie's dimension; what lies outside of the parameter does not count."""
    met = [r for i in units for r in range(tie.start + i * tie.size, tie.start + (i + 1) * tie.size)]
    return torch.tensor([r for r in met if 0 <= r < length], dtype=torch.long)


def value_of(rig: Rig, name: str) -> Tensor:
    """A parameter or buffer of the block."""
    return rig.values[name] if name in rig.values else rig.buffers[name]


def filled(rig: Rig, ties: Iterable[Tie], units: Sequence[int], noise: float = 0.0) -> dict[str, Tensor]:
    """The tied parameters with zeros, or noise, in the slices of these units."""
    changed: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(rig.seed + 7)
    for tie in ties:
        value = changed.setdefault(tie.param, value_of(rig, tie.param).clone())
        at = rows_of(tie, units, value.shape[tie.dim]).to(value.device)
        part = value.index_select(tie.dim, at)
        random = torch.randn(part.shape, generator=generator, dtype=value.dtype).to(value.device)
        value.index_copy_(tie.dim, at, noise * random)
    return changed


def without(rig: Rig, ties: Iterable[Tie], units: Sequence[int]) -> dict[str, Tensor]:
    """The tied parameters without the slices of these units."""
    gone: dict[tuple[str, int], Tensor] = {}
    for tie in ties:
        length = value_of(rig, tie.param).shape[tie.dim]
        keep = gone.setdefault((tie.param, tie.dim), torch.ones(length, dtype=torch.bool))
        keep[rows_of(tie, units, length)] = False
    changed: dict[str, Tensor] = {}
    for (name, dim), keep in gone.items():
        value = changed.get(name, value_of(rig, name))
        changed[name] = value.index_select(dim, keep.nonzero().flatten().to(value.device))
    return changed


def inside(rig: Rig, units: Units) -> None:
    """NoUnits where a tie leaves its parameter, or two units or ties share a slice."""
    met: dict[tuple[str, int], set[int]] = {}
    for tie in units.ties:
        length = value_of(rig, tie.param).shape[tie.dim]
        seen = met.setdefault((tie.param, tie.dim), set())
        rows = range(tie.start, tie.start + tie.size * units.width)
        whole = units.kind is Kind.EXPERT and tie.size == length  # a module of one expert's own
        if seen & set(rows) or not (whole or 0 <= rows.start < rows.stop <= length):
            raise NoUnits(f"the ties of {tie.param} leave it or overlap")
        seen |= set(rows)


def looked_at(units: Units) -> list[list[int]]:
    """Sets of units to be cut together: each leaves as many in every group."""
    count = units.width // units.group
    ranks = list(range(count)) if units.group == 1 else list(range(units.group))
    if len(ranks) > FEW:
        ranks = sorted({0, 1, count // 3, count - 1})
    if units.group == 1:
        return [[r] for r in ranks]
    return [[g * units.group + r for g in range(count)] for r in ranks]


def certify(rig: Rig, units: Units) -> Units:
    """The units with how they were certified and the largest error; NoUnits where one is no unit."""
    inside(rig, units)
    clean = rig.run()
    worst, how, tested = 0.0, "cut", []
    for chosen in looked_at(units):
        due = rig.run(filled(rig, units.outputs, chosen))
        effect = float((due - clean).norm())
        if not effect > 0:  # a neuron that no token wakes
            continue
        others = {
            "all its slices are zero": rig.run(filled(rig, units.ties, chosen)),
            "its input is masked": rig.masked(units.tail, _columns(rig, units, chosen)),
            "its other slices change": rig.run(_loud(rig, units, chosen)),
        }
        for what, out in others.items():
            error = float((out - due).norm()) / effect
            if not error <= TOLERANCE[rig.dtype]:
                raise NoUnits(f"unit {chosen[0]} is off by {error:.0e} of what it adds when {what}")
            worst = max(worst, error)
        if how == "cut" and units.width > len(chosen):
            error = cut(rig, units, chosen, due, effect)
            how, worst = ("mask", worst) if error is None else ("cut", max(worst, error))
        tested += chosen
    if not tested:
        raise NoUnits("no unit that was tried adds anything to the block's output")
    if units.width == 1:
        how = "mask"
    return replace(units, how=how, error=worst, tested=tuple(sorted(tested)))


def _columns(rig: Rig, units: Units, chosen: Sequence[int]) -> Tensor:
    rows = [rows_of(t, chosen, value_of(rig, t.param).shape[t.dim]) for t in units.outputs]
    return torch.cat(rows)


def _loud(rig: Rig, units: Units, chosen: Sequence[int]) -> dict[str, Tensor]:
    rest = [t for t in units.ties if t not in units.outputs]
    return filled(rig, rest, chosen, 1.0) | filled(rig, units.outputs, chosen)


def cut(rig: Rig, units: Units, chosen: Sequence[int], due: Tensor, effect: float) -> float | None:
    """The error of the block without these units, None where no setting of its attributes makes it run alike."""
    changed = without(rig, units.ties, chosen)
    attributes = Attributes(rig, units, changed, len(chosen))
    for setting in attributes.settings():
        with attributes.set(setting):
            try:
                out = rig.run(changed)
            except Exception:  # whatever a class does with numbers that do not fit
                continue
        if out.shape == due.shape and float((out - due).norm()) <= TOLERANCE[rig.dtype] * effect:
            attributes.worked(setting)
            return float((out - due).norm()) / effect
    return None


class Attributes:
    """The whole numbers that a block's modules and their config hold, and what they may be after a cut."""

    def __init__(self, rig: Rig, units: Units, changed: Mapping[str, Tensor], gone: int) -> None:
        self.rig = rig
        new = {}
        for tie in units.ties:
            new[value_of(rig, tie.param).shape[tie.dim]] = changed[tie.param].shape[tie.dim]
        counts = {units.width: units.width - gone, units.width * units.inner: (units.width - gone) * units.inner}
        if units.group > 1:
            counts[units.group] = units.group - gone * units.group // units.width
        self.free: dict[str, list[tuple[Any, str, Any]]] = {}
        for module in rig.module.modules():
            for name, value in list(vars(module).items()):
                if _number(value):
                    self._offer(module, name, value, (new | counts, counts | new))
        for config in configs(rig.module):
            for name, value in list(vars(config).items()):
                if _number(value):
                    self._offer(config, name, value, (new | counts,))
        self._known = rig.__dict__.setdefault("_settings", {})
        self._key = (units.kind, units.width, units.group, tuple(sorted(self.free)))

    def _offer(self, holder: Any, name: str, value: int, maps: tuple[Mapping[int, int], ...]) -> None:
        for made in dict.fromkeys(m[value] for m in maps if value in m):
            self.free.setdefault(f"{name}:{made}", []).append((holder, name, made))

    def settings(self) -> Iterator[tuple[str, ...]]:
        """Names of what is changed: what worked before, then all, none, and ever more."""
        names = list(self.free)
        known = self._known.get(self._key)
        seen: set[tuple[str, ...]] = set()
        sizes = [len(names), 0, 1, *([len(names) - 1] if names else []), 2, 3, 4]
        ways = (c for n in sizes if n <= len(names) for c in combinations(names, n))
        for way in chain([known] if known is not None else [], ways):
            if way not in seen:
                seen.add(way)
                yield way
            if len(seen) >= TRIES:
                return

    def worked(self, setting: tuple[str, ...]) -> None:
        """Try this one first from now on."""
        self._known[self._key] = setting

    def set(self, setting: Sequence[str]) -> _Set:
        """Inside, the attributes have their new numbers."""
        return _Set([x for name in setting for x in self.free[name]])


class _Set:
    def __init__(self, changes: Sequence[tuple[Any, str, Any]]) -> None:
        self.changes = [(holder, name, made, vars(holder)[name]) for holder, name, made in changes]

    def __enter__(self) -> None:
        for holder, name, made, _ in self.changes:
            vars(holder)[name] = made

    def __exit__(self, *_: object) -> None:
        for holder, name, _, before in reversed(self.changes):
            vars(holder)[name] = before


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1
