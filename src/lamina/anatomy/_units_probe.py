"""A block on the bench: a float64 copy with lively numbers, and what reaches which column of a map's input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from lamina.anatomy.parts import Stack
from lamina.anatomy.stacks import call
from lamina.anatomy.trace import first_tensor

Axis = tuple[str, int]
"""A parameter's name in the block, and one of its dimensions."""


@dataclass(frozen=True, eq=False)
class Given:
    """What a block got in a run of the whole model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


@dataclass(eq=False)
class Rig:
    """One block that can be run with other numbers in its parameters. Its own are filled at random, by `seed`."""

    source: nn.Module
    given: Given
    seed: int = 0
    dtype: torch.dtype = torch.float64
    module: nn.Module = field(init=False)
    values: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.module = copy.deepcopy(self.source).to(self.dtype).eval()
        for config in configs(self.module):
            if hasattr(config, "_experts_implementation"):  # the others know no float64
                config._experts_implementation = "eager"
        self.module.requires_grad_(requires_grad=False)
        self.values = {n: p.data for n, p in self.module.named_parameters()}
        generator = torch.Generator().manual_seed(self.seed)
        for value in self.values.values():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            matrix = value.ndim > 1 and value.numel() > max(value.shape)
            value.copy_(noise / value.shape[-1] ** 0.5 if matrix else value + 0.3 * noise)
        self.buffers = {n: b for n, b in self.module.named_buffers() if b.is_floating_point()}

    def _own(self, value: Tensor) -> Tensor:
        return value.detach().to(self.dtype if value.is_floating_point() else value.dtype, copy=True)

    @property
    def epsilon(self) -> float:
        """Changes relative to the largest number, below which rounding (in float32 at times) may have made them."""
        return 1e-6 if self.dtype == torch.float64 else 1e-5

    def run(self, changed: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output on the recorded input, some parameters or buffers in another state or shape."""
        args, kwargs = tree_map_only(Tensor, self._own, (self.given.args, dict(self.given.kwargs)))
        out = first_tensor(functional_call(self.module, dict(changed or {}), args, kwargs))
        assert out is not None
        return out

    def masked(self, path: str, columns: Tensor, changed: Mapping[str, Tensor] | None = None) -> Tensor:
        """The same with zeros in these columns of the input of one module."""

        def mask(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            wide = args[0].clone()
            wide.index_fill_(_lane(module, wide), columns, 0)
            return (wide, *args[1:])

        with _hooked([self.module.get_submodule(path).register_forward_pre_hook(mask)]):
            return self.run(changed)

    def entering(self, path: str, changed: Mapping[str, Tensor] | None = None) -> Tensor:
        """What goes into a module, [numbers, columns], all its calls together."""
        met: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            met.append(args[0].movedim(_lane(module, args[0]), -1).flatten(0, -2))

        with _hooked([self.module.get_submodule(path).register_forward_pre_hook(note)]):
            self.run(changed)
        if not met:
            raise ValueError(f"{path} does not run")
        return torch.cat(met)

    def matrices(self, names: Iterable[str]) -> list[str]:
        """The modules that hold one matrix among these parameters, in the order in which they finish."""
        owners = {n.rpartition(".")[0] for n in names if self.values[n].ndim > 1 and n in self.values}
        done: list[str] = []

        def note(path: str) -> Callable[..., None]:
            return lambda module, args, output: done.append(path) if args else None

        leaves = [(p, self.module.get_submodule(p)) for p in owners]
        with _hooked(m.register_forward_hook(note(p)) for p, m in leaves if isinstance(_weight(m), Tensor)):
            self.run()
        return list(dict.fromkeys(reversed(done)))[::-1]


def _weight(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim > 1 and not list(module.children()) else None


def _lane(module: nn.Module, wide: Tensor) -> int:
    """The dimension of a map's input that holds its columns: the second for convolutions, else the last."""
    weight = _weight(module)
    return 1 if weight is not None and weight.ndim > 2 and wide.ndim == weight.ndim else wide.ndim - 1


class Reach:
    """Which rows of the parameters reach which columns of the input of one map (`tail`) of a block."""

    def __init__(self, rig: Rig, tail: str, names: Sequence[str]) -> None:
        self.rig, self.tail = rig, tail
        self.names = [n for n in names if n in rig.values and n.rpartition(".")[0] != tail]
        leaves = {n: rig.values[n].clone().requires_grad_() for n in self.names}
        with torch.enable_grad():
            self.wide = rig.entering(tail, leaves)
        self._leaves = leaves
        self.width = self.wide.shape[1]
        self._clean = self.wide.detach()
        self._probed: dict[tuple[Axis, int], frozenset[int]] = {}
        self._noise = torch.Generator().manual_seed(rig.seed + 1)

    def rows(self, columns: Iterable[int]) -> dict[Axis, list[int]]:
        """The rows, per axis, of which these columns are made."""
        picked = self.wide[:, sorted(columns)]
        weights = 0.5 + torch.rand(picked.shape, generator=self._noise, dtype=torch.float64).to(picked)
        leaves = [self._leaves[n] for n in self.names]
        grads = torch.autograd.grad((picked * weights).sum(), leaves, retain_graph=True, allow_unused=True)
        found: dict[Axis, list[int]] = {}
        for name, grad in zip(self.names, grads, strict=True):
            if grad is None or not grad.any():
                continue
            for dim in range(grad.ndim):
                others = [d for d in range(grad.ndim) if d != dim]
                met = (grad != 0).sum(others) if others else grad != 0
                found[name, dim] = met.nonzero().flatten().tolist()
        return found

    def columns(self, rows: Mapping[Axis, Iterable[int]]) -> frozenset[int]:
        """The columns that change when these rows do."""
        changed: dict[str, Tensor] = {}
        for (name, dim), indices in rows.items():
            value = changed.setdefault(name, self.rig.values[name].clone())
            at = torch.tensor(sorted(indices), dtype=torch.long, device=value.device)
            part = value.index_select(dim, at)
            noise = torch.randn(part.shape, generator=self._noise, dtype=torch.float64).to(value)
            value.index_copy_(dim, at, part + noise * (part.square().mean().sqrt() + 0.1))
        with torch.no_grad():
            after = self.rig.entering(self.tail, changed)
        if after.shape != self._clean.shape:  # routed elsewhere
            return frozenset(range(self.width))
        moved = (after - self._clean).abs().amax(0) > self.rig.epsilon * self._clean.abs().max()
        return frozenset(moved.nonzero().flatten().tolist())

    def of_row(self, axis: Axis, row: int) -> frozenset[int]:
        """The columns that one row reaches."""
        if (axis, row) not in self._probed:
            self._probed[axis, row] = self.columns({axis: [row]})
        return self._probed[axis, row]

    def chosen(self, axis: Axis, rows: Sequence[int], fits: Callable[[frozenset[int]], bool]) -> list[int]:
        """Those of the rows whose columns fit; between two neighbours that agree all are taken to."""
        found: list[int] = []
        for run in runs(rows):
            found += self._bisect(axis, run, fits)
        return found

    def _bisect(self, axis: Axis, run: Sequence[int], fits: Callable[[frozenset[int]], bool]) -> list[int]:
        first, last = fits(self.of_row(axis, run[0])), fits(self.of_row(axis, run[-1]))
        if first == last:
            return list(run) if first else []
        middle = len(run) // 2
        return self._bisect(axis, run[:middle], fits) + self._bisect(axis, run[middle:], fits)


def runs(rows: Sequence[int]) -> list[list[int]]:
    """Sorted numbers, split where they jump."""
    found: list[list[int]] = []
    for row in sorted(rows):
        if found and row == found[-1][-1] + 1:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def configs(module: nn.Module) -> list[Any]:
    """The configs that the modules hold."""
    found = {id(c): c for m in module.modules() for c in [vars(m).get("config")] if hasattr(c, "to_dict")}
    return list(found.values())


def given_to(model: nn.Module, stacks: tuple[Stack, ...], sample: Mapping[str, Any]) -> dict[str, Given]:
    """Block's path → what it gets when the model runs, the first time that it does."""
    met: dict[str, Given] = {}
    handles = []
    for path in (b.path for k in stacks for b in k.blocks):

        def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            met.setdefault(path, Given(args, kwargs))

        handles.append(model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            call(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return met
