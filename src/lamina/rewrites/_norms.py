"""Norms by what they do: which formula, which numbers, found on random inputs and never by a class's name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block, Branch

NEAR = 1e-4
"""Of the largest number: some compute in float32 whatever they are given."""


@dataclass(frozen=True)
class Norm:
    """(x - mean x) / √(var x + eps) · (offset + weight) + bias; not `centred`: no mean is taken away.

    `weight` and `bias` are the names of the module's parameters, '' where there is none.
    """

    width: int
    eps: float
    centred: bool
    weight: str
    bias: str
    offset: float = 0.0

    def gain(self, module: nn.Module) -> Tensor:
        """What each channel is multiplied by, float64 [width]."""
        return module.get_parameter(self.weight).detach().double() + self.offset

    def shift(self, module: nn.Module) -> Tensor:
        """What is added, float64 [width]."""
        held = module.get_parameter(self.bias).detach().double() if self.bias else None
        return torch.zeros(self.width, dtype=torch.float64) if held is None else held

    def of(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """The formula."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * gain + shift


def norm_of(module: nn.Module) -> Norm | None:
    """The norm that a module is; None where it is none, or holds no weight. Looks at no weight: works on meta."""
    named = dict(module.named_parameters())
    flat = all(p.ndim == 1 for p in named.values()) and len({len(p) for p in named.values()}) == 1
    if list(module.children()) or not 1 <= len(named) <= 2 or not flat:
        return None
    width = len(next(iter(named.values())))
    draw = torch.Generator().manual_seed(0)
    made = {n: 1 + 0.3 * torch.randn(width, generator=draw, dtype=torch.float64) for n in named}
    x = (2 + torch.randn(2, 3, width, generator=draw, dtype=torch.float64)) * torch.tensor([[[3.0]], [[2e-3]]])
    try:
        with torch.no_grad():
            got = functional_call(module, made, (x,))
    except Exception:  # whatever a module does with tokens that are none of its own
        return None
    if not isinstance(got, Tensor) or got.shape != x.shape:
        return None
    for one in _forms(module, list(named), width):
        want = one.of(x, one.offset + made[one.weight], made[one.bias] if one.bias else torch.zeros(width))
        if bool(((got - want).abs().amax((1, 2)) <= NEAR * want.abs().amax((1, 2))).all()):
            return one
    return None


def _forms(module: nn.Module, names: list[str], width: int) -> Iterator[Norm]:
    """What the module may be, with the small numbers that it holds."""
    small = dict.fromkeys(v for v in vars(module).values() if type(v) is float and 0 < v < 1e-1)
    for eps in small:
        for centred in (True, False):
            for offset in (0.0, 1.0):
                for order in permutations(names):
                    yield Norm(width, eps, centred, order[0], order[1] if len(order) > 1 else "", offset)


def norms_in(module: nn.Module) -> dict[str, Norm]:
    """Path → the norm there."""
    found = {path: norm_of(inner) for path, inner in module.named_modules()}
    return {path: norm for path, norm in found.items() if norm is not None}


def block_norms(anatomy: Anatomy, block: Block) -> dict[str, Norm]:
    """The norms of a block outside of its sublayers' cores, paths relative to it."""
    found = norms_in(anatomy.model.get_submodule(block.path))
    cores = tuple(f"{x.core}." for x in block.branches if not x.joins)
    return {path: norm for path, norm in found.items() if not path.startswith(cores)}


def own_norms(anatomy: Anatomy, block: Block, branch: Branch) -> dict[str, Norm]:
    """Those that serve one sublayer alone."""
    return {p: n for p, n in block_norms(anatomy, block).items() if p in branch.own or p.startswith(f"{branch.core}.")}
