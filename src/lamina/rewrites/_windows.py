"""Learn how maps are rounded, a window of blocks at a time, so that it gives what the dense network's would."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lamina.anatomy.linears import matrix
from lamina.core.errors import InputError
from lamina.lab.lab import real
from lamina.lab.walk import Walk
from lamina.maths.grids import BLOCK, Grid, blocks_of

if TYPE_CHECKING:
    from lamina.lab import Lab

CLIP = 4.0
"""Steps begin as sigmoid(4) = 0.982 of what reaches over their blocks."""


class Learnt:
    """A map's weight plus B A / rank on the grid, with every block's step times sigmoid(clip)."""

    def __init__(self, module: nn.Module, grid: Grid, rank: int, generator: torch.Generator) -> None:
        weight = matrix(module).detach()
        (outputs, inputs), device = weight.shape, weight.device
        self.grid, self.rank, self.dtype, self.weight = grid, rank, weight.dtype, weight.float()
        self.turned = not isinstance(module, nn.Linear)
        drawn = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5
        self.down = drawn.to(device).requires_grad_()
        self.up = torch.zeros(outputs, rank, device=device, requires_grad=True)
        self.clip = torch.full((outputs, inputs // BLOCK, 1), CLIP, device=device, requires_grad=True)

    def made(self, share: float = 1.0) -> Tensor:
        """The weight [outputs, inputs], float32, with the first `share` of its inputs on the grid.

        Gradients go to the three learnables as if rounding were none.
        """
        cut = blocks_of(self.weight + self.up @ self.down / self.rank)
        first = round(share * cut.shape[1])
        return torch.cat([self._rounded(cut[:, :first], self.clip[:, :first]), cut[:, first:]], 1).flatten(1)

    def _rounded(self, cut: Tensor, clip: Tensor) -> Tensor:
        grid, factor = self.grid, clip.sigmoid()
        step, low = (x * factor for x in grid.extent(cut))
        with torch.no_grad():
            scales = grid.held(step, low, self.dtype)
            codes, hard = grid.codes(cut, scales), grid.nearest(cut, scales)
        place = (cut - low) / torch.where(step == 0, 1.0, step)
        inside = (place >= grid.least) & (place <= grid.most)
        soft = torch.where(inside, place + (codes - place).detach(), codes) * step + low
        return hard + (soft - soft.detach())

    def stored(self, share: float) -> Tensor:
        """`made` as the module stores it."""
        made = self.made(share).to(self.dtype)
        return made.T if self.turned else made


Maps = Sequence[Mapping[str, Learnt]]
"""Of each block of a stack, path inside the block → the map."""


class Windows(Walk):
    """A walk of two streams through a stack: the dense network's, and that of its maps as they are rounded so far."""

    def __init__(self, lab: Lab, maps: Maps, place: int = 0) -> None:
        super().__init__(lab, (), place)
        self.maps, self._start = maps, list(self.streams)
        self.rough = list(self.streams)

    def restart(self) -> None:
        """Back to the first block."""
        self.at, self.streams, self.rough = 0, list(self._start), list(self._start)

    @torch.no_grad()
    def go(self, to: int, share: float) -> None:
        """On to a block, with that share of the inputs rounded."""
        for at in range(self.at, to):
            self.streams = [self._through(at, n, x, None) for n, x in enumerate(self.streams)]
            self.rough = [self._through(at, n, x, share) for n, x in enumerate(self.rough)]
        self.at = to

    def _through(self, at: int, place: int, stream: Tensor, share: float | None) -> Tensor:
        """A block's output [batch, tokens, width] for a batch's stream, dense or with a share rounded."""
        block = self.stack.blocks[at]
        module = self.lab.model.get_submodule(block.path)
        args, kwargs = self._calls[place][at]
        if isinstance(block.stream, int):
            args = (*args[: block.stream], stream, *args[block.stream + 1 :])
        else:
            kwargs = {**kwargs, block.stream: stream}
        self.lab.counts.blocks += int(real(self.lab.batches[place]).sum())
        held = {} if share is None else {f"{path}.weight": m.stored(share) for path, m in self.maps[at].items()}
        out = functional_call(module, held, args, dict(kwargs)) if held else module(*args, **kwargs)
        while isinstance(out, tuple | list):
            out = next(x for x in out if x is not None)
        return out

    def loss(self, window: range, place: int, share: float, target: Tensor) -> Tensor:
        """Mean squared difference of the rounded window's output from the target, over a batch's real tokens."""
        x = self.rough[place]
        for at in window:
            x = self._through(at, place, x, share)
        keep = real(self.lab.batches[place]).to(x.device)
        return (x[keep].float() - target[keep].float()).square().mean()

    @torch.no_grad()
    def targets(self, window: range) -> Iterator[Tensor]:
        """Batch by batch, what the dense window makes of the dense stream."""
        for place, stream in enumerate(self.streams):
            x = stream
            for at in window:
                x = self._through(at, place, x, None)
            yield x

    def train(self, window: range, share: float, epochs: int, rates: tuple[float, float]) -> list[float]:
        """Learn the window's maps, from its first block's streams; the losses step by step.

        AdamW with `rates` per sequence of a batch, of factors and of clips, which fall to 0 on a line.
        """
        self.go(window.start, share)
        maps = [m for at in window for m in self.maps[at].values()]
        if not maps or not epochs:
            return []
        wanted, batches = list(self.targets(window)), self.lab.batches
        groups = [[x for m in maps for x in (m.down, m.up)], [m.clip for m in maps]]
        optimizer = torch.optim.AdamW(({"params": g} for g in groups), lr=0.0, weight_decay=0.0, foreach=False)
        steps, losses = epochs * len(batches), list[float]()
        for number in range(steps):
            place = number % len(batches)
            with torch.enable_grad():
                loss = self.loss(window, place, share, wanted[place])
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise InputError("the loss is no number", where=self.stack.blocks[window.start].site.id)
            free = [x for g in groups for x in g]
            for x, gradient in zip(free, torch.autograd.grad(loss, free), strict=True):
                x.grad = gradient
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * len(real(batches[place])) * (1 - number / steps)
            optimizer.step()
        return losses


def learn(
    walk: Windows,
    windows: Sequence[range],
    shares: Sequence[float],
    epochs: int,
    rates: tuple[float, float],
    progress: Callable[[str, int, int], None],
) -> None:
    """Slide over the windows once for each share of the inputs, with as many epochs in all for each window."""
    for turn, share in enumerate(shares):
        walk.restart()
        for number, window in enumerate(windows):
            walk.train(window, share, epochs // len(shares) + (turn < epochs % len(shares)), rates)
            progress("windows", turn * len(windows) + number + 1, len(shares) * len(windows))
