"""Fit each depth of a network whose blocks share their maps: a factor and a map of low rank for every branch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lamina.lab.lab import real
from lamina.lab.walk import Walk
from lamina.rewrites.factorise import factors_of
from lamina.rewrites.narrow import write

if TYPE_CHECKING:
    from lamina.lab import Lab

Rows = tuple[Tensor, Tensor, Tensor]
"""What is missing, what the branch adds [tokens, width], and its last map's inputs [tokens, features]."""


@dataclass(frozen=True)
class Fit:
    """A branch adds gain · f + scale · up (down z), f what it adds without, z its last map's inputs.

    `gain` [1], `down` [rank, features], `up` [width, rank].
    """

    gain: Tensor
    down: Tensor
    up: Tensor
    scale: float

    def added(self, f: Tensor, z: Tensor) -> Tensor:
        """What the branch adds [batch, tokens, width]."""
        return self.gain * f + self.scale * (z @ self.down.T @ self.up.T)

    def numbers(self, bias: Tensor | None) -> dict[str, Tensor]:
        """Those of the module that stands in the last map's place, but the shared ones; `bias` is the map's."""
        own = {"gain": self.gain, **({} if bias is None else {"bias": self.gain * bias.detach()})}
        return own | ({"down.weight": self.down, "up.weight": self.up} if len(self.down) else {})


@torch.no_grad()
def fitted(lab: Lab, place: int, weights: Mapping[str, Tensor], rank: int, ridge: float) -> dict[str, Fit]:
    """Path of a branch's last map → its fit, for the blocks of stack `place` that `weights` (path → shared map) name.

    Walks the dense network and the one with the shared maps side by side; the maps are written as it goes.
    """
    stack = lab.anatomy.stacks[place]
    inside = [[p for p in weights if p.startswith(f"{b.path}.")] for b in stack.blocks]
    numbers = [n for n, paths in enumerate(inside) if paths]
    if not numbers:
        return {}
    dense, thin, found = Walk(lab, (), place), Walk(lab, (), place), dict[str, Fit]()
    for number in range(numbers[-1] + 1):
        lab.progress("sharing", number + 1, numbers[-1] + 1)
        entering = list(dense.streams)
        added, _ = dense.step()
        if number < numbers[0]:
            thin.streams = list(dense.streams)
            thin.skip()
        elif not inside[number]:
            thin.step()
        else:
            for path in inside[number]:
                write(lab.model.get_submodule(path), weights[path])
            found |= _block(lab, thin, entering, added, rank, ridge)
    return found


def _block(
    lab: Lab, thin: Walk, target: list[Tensor], added: Sequence[Mapping[str, Tensor]], rank: int, ridge: float
) -> dict[str, Fit]:
    """Fit the branches of one block in turn; the walk goes on behind it."""
    block, found, start = thin.block, dict[str, Fit](), list(thin.streams)
    given: list[list[Tensor]] = []
    for branch in block.branches:
        thin.streams = _sums(start, (given[n] for n in branch.reads))
        after, inputs = thin.look(branch, [x.site.id for x in block.branches if x is not branch])
        alone = [a - x for a, x in zip(after, thin.streams, strict=True)]
        target = _sums(target, [[notes[branch.site.id] for notes in added]])
        gain, first, second = solved(_rows(lab, target, _sums(start, given), alone, inputs), rank, ridge)
        dtype, device = alone[0].dtype, alone[0].device
        made = (t.to(device, dtype) for t in (gain, first, second / branch.scale))
        fit = Fit(*made, scale=branch.scale)
        given.append([fit.added(f, z) for f, z in zip(alone, inputs, strict=True)])
        found[f"{block.path}.{branch.tail}"] = fit
    thin.streams = _sums(start, given)
    thin.skip()
    return found


def _sums(start: Sequence[Tensor], added: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Per batch, a stream and what is added to it."""
    streams = list(start)
    for parts in added:
        streams = [x + part for x, part in zip(streams, parts, strict=True)]
    return streams


def _rows(lab: Lab, target: list[Tensor], here: list[Tensor], alone: list[Tensor], inputs: list[Tensor]) -> list[Rows]:
    """Per batch, the rows of real tokens over the size of the target, float32."""
    found = []
    for y, x, f, z, batch in zip(target, here, alone, inputs, lab.batches, strict=True):
        keep = real(batch).to(y.device)
        size = y[keep].float().norm(dim=-1, keepdim=True).clamp_min(1e-6)
        found.append(((y[keep].float() - x[keep].float()) / size, f[keep].float() / size, z[keep].float() / size))
    return found


def solved(batches: Sequence[Rows], rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """b [1], and the factors [rank, features] and [width, rank] of P, float64.

    b = argmin Σ_t ‖r - b f‖², 1 where f is zero; P = argmin of that rank of Σ_t ‖r - b f - P z‖² +
    ridge · mean(diag Σ_t z zᵀ) ‖P‖²: the best one's nearest in the norm that the sum defines.
    """

    def summed(parts: Iterator[Tensor]) -> Tensor:
        return torch.stack(list(parts)).sum(0)

    square = summed((f.double() ** 2).sum() for _, f, _ in batches)
    along = summed((r.double() * f.double()).sum() for r, f, _ in batches)
    gain = torch.where(square > 0, along / square.clamp_min(1e-300), torch.ones_like(square))
    features, width = batches[0][2].shape[-1], batches[0][0].shape[-1]
    if not rank:
        return gain.reshape(1), gain.new_zeros(0, features), gain.new_zeros(width, 0)
    gram = summed((z.T @ z).double() for _, _, z in batches)
    moment = summed(((r - gain.float() * f).T @ z).double() for r, f, z in batches)
    level = (ridge * gram.diagonal().mean()).clamp_min(1e-12)
    values, vectors = torch.linalg.eigh(gram + level * torch.eye(features, dtype=gram.dtype, device=gram.device))
    roots = values.clamp_min(1e-12 * values[-1]).sqrt()
    root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    return gain.reshape(1), *factors_of(moment @ inverse @ inverse, rank, (root, inverse))
