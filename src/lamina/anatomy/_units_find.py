"""Find the heads, KV groups and neurons of a branch: parts of a map's input that share no rows upstream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lamina.anatomy._units_probe import Axis, Reach, Rig, runs
from lamina.core.sites import Kind, Tie

FEW = 8
"""Up to so many units are looked at one by one; of more, the first, the last and some between."""


class NoUnits(Exception):
    """Why a branch has no units of a kind."""


@dataclass(frozen=True)
class Units:
    """The units of one branch: `ties` name parameters of the block; `outputs` are those among them that silence.

    `tail` is the map whose input columns the units are ('' for experts). Heads come `group` to a KV head,
    a KV group has `inner` heads, a token goes to `active` experts. `how` they were certified: by cutting ("cut"), or by
    masking alone ("mask").
    """

    kind: Kind
    width: int
    ties: tuple[Tie, ...]
    outputs: tuple[Tie, ...]
    tail: str = ""
    group: int = 1
    inner: int = 1
    active: int = 0
    how: str = ""
    error: float = 0.0
    tested: tuple[int, ...] = field(default=())


@dataclass(frozen=True)
class _Part:
    """The columns of one unit, and the rows that reach no others."""

    columns: tuple[int, ...]
    rows: Mapping[Axis, tuple[int, ...]]


def find(rig: Rig, kind: Kind, tails: Sequence[str], names: Sequence[str]) -> dict[Kind, Units | str]:
    """What is found per kind of unit, or why not; `tails` are tried in turn."""
    wanted = (Kind.NEURON,) if kind is Kind.MLP else (Kind.HEAD, Kind.KV_GROUP)
    found: dict[Kind, Units | str] = dict.fromkeys(wanted, "no linear map of the branch's own was seen to run")
    for tail in tails:
        try:
            reach = Reach(rig, tail, names)
            made = _neurons(rig, reach) if kind is Kind.MLP else _heads(rig, reach)
        except NoUnits as reason:
            made = dict.fromkeys(wanted, str(reason))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            made = dict.fromkeys(wanted, f"probing {tail} failed: {str(error)[:120]}")
        found = {k: v if isinstance(found[k], str) and (tail == tails[0] or not isinstance(v, str)) else found[k]
                 for k, v in made.items()}  # fmt: skip
        if not any(isinstance(v, str) for v in found.values()):
            break
    return found


def _neurons(rig: Rig, reach: Reach) -> dict[Kind, Units | str]:
    first = closure(reach, 0)
    if len(first) == reach.width:
        raise NoUnits(f"all columns of {reach.tail}'s input depend on each other")
    return {Kind.NEURON: _units(rig, reach, Kind.NEURON, first)}


def _heads(rig: Rig, reach: Reach) -> dict[Kind, Units | str]:
    found: dict[Kind, Units | str] = {}
    head, group = _head(reach), closure(reach, 0)
    for kind, part in ((Kind.HEAD, head), (Kind.KV_GROUP, group)):
        try:
            if head is None:
                raise NoUnits(f"no rows upstream of {reach.tail} belong to some of its columns as a head's do")
            found[kind] = _units(rig, reach, kind, part or group)
        except NoUnits as reason:
            found[kind] = str(reason)
    inner = max(len(group) // len(head), 1) if head is not None else 1
    for kind, name in ((Kind.HEAD, "group"), (Kind.KV_GROUP, "inner")):
        units = found[kind]
        found[kind] = replace(units, **{name: inner}) if isinstance(units, Units) else units
    return found


def closure(reach: Reach, column: int) -> frozenset[int]:
    """The columns linked with one by rows that reach several of them, but not most (dead ones are not reached)."""
    part, half = frozenset([column]), reach.width / 2
    while True:
        rows = {axis: reach.chosen(axis, met, lambda c: 0 < len(c) <= half) for axis, met in _rows(reach, part)}
        rows = {axis: met for axis, met in rows.items() if met}
        wider = part | reach.columns(rows) if rows else part
        if wider == part:
            return part
        part = wider


def _rows(reach: Reach, part: frozenset[int]) -> list[tuple[Axis, list[int]]]:
    return list(reach.rows(part).items())


def _head(reach: Reach) -> frozenset[int] | None:
    """The smallest part around the first column that two rows or more reach as one: as queries and keys do."""
    parts: list[frozenset[int]] = []
    for axis, rows in _rows(reach, frozenset([0])):
        for run in runs(rows):
            if len(run) < 2:
                continue
            for a, b in ((run[0], run[1]), (run[-2], run[-1])):
                one, other = reach.of_row(axis, a), reach.of_row(axis, b)
                if one == other and 0 in one and 1 < len(one) < reach.width:
                    parts.append(one)
    return min(parts, key=len, default=None)


def _owned(reach: Reach, part: frozenset[int]) -> _Part:
    rows = {axis: reach.chosen(axis, met, lambda c: bool(c) and c <= part) for axis, met in _rows(reach, part)}
    if len(part) == reach.width:
        rows = _outer(reach, rows)
    return _Part(tuple(sorted(part)), {axis: tuple(met) for axis, met in rows.items() if met})


def _outer(reach: Reach, rows: Mapping[Axis, list[int]]) -> dict[Axis, list[int]]:
    """Of a unit that is the whole branch: the axes along which rows make columns, and those of maps like them."""
    apart = {a for a, met in rows.items() if any(len(reach.of_row(a, r)) < reach.width for r in (met or [0])[-1:])}
    dims = {dim for _, dim in apart if reach.rig.values[_].ndim > 1}
    maps = {n for n, _ in rows if reach.rig.values[n].ndim > 1}
    apart |= {(n, d) for n, d in rows if n in maps - {m for m, _ in apart} and dims == {d} and len(rows[n, d]) > 1}
    beside = {n.rpartition(".")[0] for n, _ in apart}
    apart |= {(n, d) for n, d in rows if n not in maps and n.rpartition(".")[0] in beside}
    return {a: rows[a] for a in apart}


def _like(reach: Reach, first: _Part, column: int) -> frozenset[int]:
    """The columns of the unit that holds this one, shaped like the first unit."""
    if len(first.columns) == 1:
        return frozenset([column])
    near = reach.rows([column])
    parts = [
        reach.of_row(axis, row)
        for axis in first.rows
        for run in runs(near.get(axis, []))
        for row in {run[0], run[len(run) // 2], run[-1]}
    ]
    fits = [p for p in parts if len(p) == len(first.columns) and column in p]
    return fits[0] if fits else closure(reach, column)


def _units(rig: Rig, reach: Reach, kind: Kind, part: frozenset[int]) -> Units:
    size, width = len(part), reach.width // len(part)
    if reach.width % size:
        raise NoUnits(f"{reach.width} columns of {reach.tail}'s input do not fall into parts of {size}")
    parts = {0: _owned(reach, part)}
    if width > 1:
        taken = set(part)
        for unit in _looked_at(width):
            start = unit * size if width > FEW else min(set(range(reach.width)) - taken)
            near = _like(reach, parts[0], start)
            if len(near) != size or near & taken:
                raise NoUnits(f"the parts of {reach.tail}'s input are not equal: {size} and {len(near)} columns")
            taken |= near
            made = _owned(reach, near)
            if made.rows or unit == 1:  # a neuron that no token of the sample wakes shows nothing
                parts[unit] = made
    axes = sorted({a for p in parts.values() for a in p.rows})
    axes = [a for a in axes if rig.values[a[0]].ndim > 1 or not _beside(rig, a[0])]
    ties = [t for axis in axes for t in _ties(axis, parts, width)]
    if not ties:
        raise NoUnits(f"nothing upstream of {reach.tail} belongs to one unit alone")
    columns = {i: _Part((), {("", 0): p.columns}) for i, p in parts.items()}
    dim = _inner(rig, reach.tail, reach.width)
    outputs = tuple(replace(t, param=f"{reach.tail}.weight", dim=dim) for t in _ties(("", 0), columns, width))
    ties += _biases(rig, ties, reach.tail)
    return Units(kind, width, (*ties, *outputs), outputs, reach.tail)


def _looked_at(width: int) -> list[int]:
    if width <= FEW:
        return list(range(1, width))
    return sorted({1, 2, width // 3, width // 2, width - 2, width - 1})


def _ties(axis: Axis, parts: Mapping[int, _Part], width: int) -> list[Tie]:
    """The rows of the units as ranges that step by their own length; NoUnits where they do not."""
    name, dim = axis
    rows = {i: p.rows.get(axis, ()) for i, p in parts.items()}
    if len(set(map(len, rows.values()))) != 1:
        raise NoUnits(f"units own unequal parts of {name}")
    first = rows[0]
    steps = [len(first)] * len(first) if width == 1 else [b - a for a, b in zip(first, rows[1], strict=True)]
    if any(tuple(r + i * step for r, step in zip(first, steps, strict=True)) != met for i, met in rows.items()):
        raise NoUnits(f"the rows of {name} are not in equal steps from unit to unit")
    found = []
    for step in dict.fromkeys(steps):
        for run in runs([r for r, s in zip(first, steps, strict=True) if s == step]) if width > 1 else [list(first)]:
            if step < 1 or len(run) % step:
                raise NoUnits(f"the rows of {name} are strided")
            found += [Tie(name, dim, step, at) for at in range(run[0], run[-1] + 1, step)]
    return found


def _beside(rig: Rig, name: str) -> bool:
    """Whether a vector stands beside a matrix, as long as one of its sides: its bias."""
    where, length = name.rpartition(".")[0], rig.values[name].shape[0]
    matrices = [v for n, v in rig.values.items() if n.rpartition(".")[0] == where and v.ndim > 1]
    return any(length in m.shape for m in matrices)


def _biases(rig: Rig, ties: Sequence[Tie], tail: str) -> list[Tie]:
    """Biases are tied as the rows of their matrices are: that of keys reaches nothing."""
    tied, found = {t.param for t in ties}, []
    for name, value in rig.values.items():
        where = name.rpartition(".")[0]
        if name in tied or where == tail or value.ndim != 1:
            continue
        beside = [t for t in ties if t.param.rpartition(".")[0] == where and rig.values[t.param].ndim > 1]
        found += [replace(t, param=name, dim=0) for t in beside if rig.values[t.param].shape[t.dim] == len(value)]
    return found


def _inner(rig: Rig, tail: str, width: int) -> int:
    """The dimension of the map's matrix that its input's columns lie along."""
    weight = rig.values[f"{tail}.weight"]
    fits = [d for d in range(weight.ndim) if weight.shape[d] == width]
    if not fits:
        raise NoUnits(f"{tail} is grouped: no dimension of its matrix is as long as its input is wide")
    if len(fits) == 1:
        return fits[0]
    columns = torch.arange(1, width, device=weight.device)
    leaf = weight.clone().requires_grad_()
    with torch.enable_grad():
        out = rig.masked(tail, columns, {f"{tail}.weight": leaf})
    (grad,) = torch.autograd.grad((out * torch.arange(1.0, out.numel() + 1).cos().view_as(out).to(out)).sum(), [leaf])
    met = [int((grad != 0).movedim(d, 0).flatten(1).any(1).sum()) for d in range(grad.ndim)]
    return min(fits, key=lambda d: met[d])
