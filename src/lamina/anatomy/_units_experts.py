"""The experts of a mixture: slices of stacked parameters or modules of a list, and the rows of the router."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamina.anatomy._units_cut import TOLERANCE, cut, filled, inside, value_of
from lamina.anatomy._units_find import FEW, NoUnits, Units
from lamina.anatomy._units_probe import Rig
from lamina.core.sites import Kind, Tie

NEVER = -1e30
"""The score of an expert that no token goes to."""


def find_experts(rig: Rig, names: Sequence[str]) -> Units:
    """The experts of a branch with these parameters. Raises NoUnits where there are none to be told apart."""
    stacked, listed = _stacked(rig, names), _listed(rig, names)
    count = _count(rig, stacked, listed)
    stacks = [Tie(n, 0) for n in stacked.get(count, [])]
    lists = [t for k, n in listed.items() if n == count for t in _modules(rig, names, k)]
    taken = {t.param for t in (*stacks, *lists)}
    routes = [t for t in _routes(rig, names, count) if t.param not in taken]
    if not any(value_of(rig, t.param).ndim == 2 for t in routes):
        raise NoUnits(f"no matrix of the branch scores its {count} experts")
    inner = {t.param for t in routes}
    beside = [t for t in routes if value_of(rig, t.param).ndim == 1 or _scores(rig, t, count)]
    rest = [Tie(n, 0) for n in sorted(inner - {t.param for t in beside}) if value_of(rig, n).shape[0] == count]
    ties = tuple(dict.fromkeys([*beside, *rest, *stacks, *lists]))
    return Units(Kind.EXPERT, count, ties, (*stacks, *lists))


def _stacked(rig: Rig, names: Sequence[str]) -> dict[int, list[str]]:
    """Length of the first dimension → the parameters of three dimensions that have it."""
    found: dict[int, list[str]] = defaultdict(list)
    for name in names:
        if rig.values[name].ndim == 3 and rig.values[name].shape[0] > 1 and rig.values[name].shape[-1] > 1:
            found[rig.values[name].shape[0]].append(name)
    return found


def _listed(rig: Rig, names: Sequence[str]) -> dict[str, int]:
    """List of modules that are built alike → how many they are."""
    shapes: dict[str, dict[int, list[tuple[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        for match in re.finditer(r"\.(\d+)\.", name):
            shapes[name[: match.start()]][int(match[1])].append((name[match.end() :], rig.values[name].shape))
    return {
        k: len(v)
        for k, v in shapes.items()
        if len(v) > 1 and sorted(v) == list(range(len(v))) and all(x == v[0] for x in v.values())
    }


def _count(rig: Rig, stacked: Mapping[int, list[str]], listed: Mapping[str, int]) -> int:
    """How many experts there are: as the most parameters say."""
    weight: dict[int, int] = defaultdict(int)
    for count, held in stacked.items():
        weight[count] += sum(rig.values[n].numel() for n in held)
    for prefix, count in listed.items():
        weight[count] += sum(v.numel() for n, v in rig.values.items() if n.startswith(f"{prefix}."))
    if not weight:
        raise NoUnits("no stacked parameters and no list of modules that are alike")
    return max(weight, key=lambda c: weight[c])


def _modules(rig: Rig, names: Sequence[str], prefix: str) -> Iterator[Tie]:
    """Each parameter of the n-th module belongs to unit n: for the others the range lies outside of it."""
    for name in names:
        match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        if match:
            length = rig.values[name].shape[0]
            yield Tie(name, 0, length, -int(match[1]) * length)


def _routes(rig: Rig, names: Sequence[str], count: int) -> Iterator[Tie]:
    """Matrices and vectors, buffers too, with one row per expert."""
    where = {n.rpartition(".")[0] for n in names}
    where |= {w.rpartition(".")[0] for w in where}
    loose = [n for n in rig.buffers if n.rpartition(".")[0] in where]
    for name in (*names, *loose):
        shape = value_of(rig, name).shape
        if len(shape) in (1, 2) and count in shape:
            yield Tie(name, list(shape).index(count))


def _scores(rig: Rig, tie: Tie, count: int) -> bool:
    """Whether a matrix makes a number per expert."""
    with _Masked(rig.values[tie.param], count, [0]) as masked:
        rig.run()
    return masked.met


class _Masked(TorchDispatchMode):
    """Inside, what one matrix makes of tokens is NEVER for some experts."""

    def __init__(self, matrix: Tensor, count: int, experts: Sequence[int]) -> None:
        super().__init__()
        self.count, self.experts, self.met = count, list(experts), False
        self._kept = [matrix]
        self._held = {matrix.untyped_storage().data_ptr()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        mine = [t.untyped_storage().data_ptr() in self._held for t in given]
        if not any(mine) or not isinstance(out, Tensor):
            return out
        if all(mine):
            self._kept.append(out)
            self._held.add(out.untyped_storage().data_ptr())
        elif out.ndim and out.shape[-1] == self.count and out.is_floating_point():
            out[..., self.experts] = NEVER
            self.met = True
        return out


def certify_experts(rig: Rig, units: Units) -> Units:
    """The experts with how they were certified: cut off from the router they are as good as cut out.

    NoUnits where an expert to which no token goes still matters, or where none could be tried.
    """
    inside(rig, units)
    clean = rig.run()
    worst, how, tested = 0.0, "cut", []
    count = units.width
    for expert in range(count) if count <= FEW else sorted({0, 1, count // 2, count - 2, count - 1}):
        due = avoided(rig, units, [expert])
        effect = float((due - clean).norm())
        if not effect > 0:
            continue
        error = float((avoided(rig, units, [expert], _noisy(rig, units, expert)) - due).norm()) / effect
        if not error <= TOLERANCE[rig.dtype]:
            raise NoUnits(f"expert {expert} is off by {error:.0e} of what it adds when its own numbers change")
        if _same(rig, units, expert, clean, effect):
            raise NoUnits(f"the slices of expert {expert} do not reach the output")
        worst = max(worst, error)
        if how == "cut":
            error = _cut(rig, units, expert, due, effect)
            how, worst = ("mask", worst) if error is None else ("cut", max(worst, error))
        tested.append(expert)
    if not tested:
        raise NoUnits("no token of the sample went to an expert that was tried")
    return replace(units, how=how, error=worst, tested=tuple(tested), active=_active(rig, units))


def _active(rig: Rig, units: Units) -> int:
    """How many experts the first token goes to: those whose slices its output has a gradient in."""
    leaves = {t.param: rig.values[t.param].clone().requires_grad_() for t in units.outputs}
    with torch.enable_grad():
        out = rig.run(leaves)
        first = out.flatten(0, -2)[0]
        weights = 1 + torch.arange(len(first), device=out.device).cos().to(first)
        grads = torch.autograd.grad((first * weights).sum(), list(leaves.values()), allow_unused=True)
    met: set[int] = set()
    for tie, grad in zip(units.outputs, grads, strict=True):
        if grad is not None and grad.any():
            others = [d for d in range(grad.ndim) if d != tie.dim]
            rows = (grad != 0).sum(others).nonzero().flatten().tolist()
            met |= {(r - tie.start) // tie.size for r in rows}
    return len(met)


def _noisy(rig: Rig, units: Units, expert: int) -> dict[str, Tensor]:
    return filled(rig, [t for t in units.ties if value_of(rig, t.param).ndim > 1], [expert], 1.0)


def _same(rig: Rig, units: Units, expert: int, clean: Tensor, effect: float) -> bool:
    """Whether the output stays as it is when the expert's own slices are zero."""
    out = rig.run(filled(rig, units.outputs, [expert]))
    return float((out - clean).norm()) <= TOLERANCE[rig.dtype] * effect


def avoided(
    rig: Rig, units: Units, experts: Sequence[int], changed: Mapping[str, Tensor] = MappingProxyType({})
) -> Tensor:
    """The output when no token goes to some experts."""
    made = dict(changed)
    routes = [t for t in units.ties if t not in units.outputs]
    for tie in routes:
        if value_of(rig, tie.param).ndim == 1:
            value = made.get(tie.param, value_of(rig, tie.param)).clone()
            value[list(experts)] = NEVER
            made[tie.param] = value
    matrices = [t for t in routes if value_of(rig, t.param).ndim == 2]
    for tie in matrices:
        made.setdefault(tie.param, value_of(rig, tie.param).clone())
    with _all(_Masked(made[t.param], units.width, experts) for t in matrices):
        return rig.run(made)


@contextmanager
def _all(modes: Any) -> Iterator[None]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


def _cut(rig: Rig, units: Units, expert: int, due: Tensor, effect: float) -> float | None:
    """The error when the expert is cut out, in lists of modules too."""
    whole = [t for t in units.ties if value_of(rig, t.param).shape[t.dim] == t.size]
    sliced = replace(units, ties=tuple(t for t in units.ties if t not in whole))
    with _shorter(rig, {t.param for t in whole}, expert, units.width):
        return cut(rig, sliced, [expert], due, effect)


@contextmanager
def _shorter(rig: Rig, names: set[str], expert: int, count: int) -> Iterator[None]:
    """Inside, the lists of modules lack one, and the later ones move up."""
    lists = {n[: m.start()] for n in names for m in re.finditer(r"\.\d+\.", n)}
    held = [rig.module.get_submodule(p) for p in lists]
    held = [h for h in held if len(h._modules) == count]
    before = [dict(h._modules) for h in held]
    try:
        for one, modules in zip(held, before, strict=True):
            rest = [m for n, m in enumerate(modules.values()) if n != expert]
            one._modules = {str(n): m for n, m in enumerate(rest)}
        yield
    finally:
        for one, modules in zip(held, before, strict=True):
            one._modules = modules
