"""Prices: what changes to sublayers should cost in nats, from what each of them changes where it is made.

One forward and a backward per probe over the text keep what every sublayer adds and the gradients along the stream. A
change is then tried on its own block, on the stream that enters it in the dense network: with δ what its sublayer adds
otherwise, its price has the first-order term -g·δ and two estimates of the second-order one: the Gauss-Newton form
½ E[(z·δ)²], and that form damped as in the measure `damage`, ‖δ‖/‖x‖ · √F, which whole branches follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lamina.core.scores import Scores
from lamina.core.sites import SUBLAYERS
from lamina.lab.bends import bends
from lamina.lab.gradients import stream_gradients
from lamina.lab.taps import Taps
from lamina.lab.walk import Walk

if TYPE_CHECKING:
    from lamina.core.sites import Site
    from lamina.lab.lab import Lab

Array = NDArray[np.float64]
Trial = Callable[[], AbstractContextManager[None]]
"""Inside the context that it gives, the model has the change."""
CHUNK, WINDOW = 8, 64


@dataclass(frozen=True)
class Priced:
    """Of each sequence, in nats summed over tokens: the first-order term, the curvature F, and F damped; and the count
    of predicted tokens. All float64 [sequences].
    """  # fmt: skip

    slope: Array
    curve: Array
    damped: Array
    count: Array

    def mean(self) -> tuple[float, float, float]:
        """The three terms, per predicted token."""
        total = max(float(self.count.sum()), 1.0)
        return float(self.slope.sum()) / total, float(self.curve.sum()) / total, float(self.damped.sum()) / total


@dataclass(eq=False)
class _Kept:
    """Of one sublayer on one batch, padding gone: what it adds, the gradients there, and the stream's energies."""

    added: Tensor
    gradient: Tensor
    xx: Tensor
    taps: Taps


@dataclass(eq=False)
class Keeper:
    """A tally that keeps what prices need of every sublayer and batch, in the model's own type."""

    probes: tuple[str, ...] = ("loss", "fisher")
    kept: dict[str, list[_Kept]] = field(default_factory=dict[str, list[_Kept]])

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one sublayer on one batch."""
        if site.kind in SUBLAYERS:
            assert taps.gradient is not None
            bare = Taps(taps.entering[:, :0], taps.added[:, :0], taps.sequence, taps.sequences, rows=taps.rows)
            row = _Kept(taps.added.detach(), taps.gradient.to(taps.added.dtype), taps.xx, bare)
            self.kept.setdefault(site.id, []).append(row)

    def merge(self, other: Keeper) -> Keeper:
        """What both kept."""
        both = Keeper(self.probes)
        for site in {**self.kept, **other.kept}:
            both.kept[site] = self.kept.get(site, []) + other.kept.get(site, [])
        return both

    def scores(self) -> Scores:
        """A tally's table; these sums score nothing."""
        return Scores.none("prices", "kept for prices, no scores")


class Pricing:
    """Prices of changes to the sublayers of a lab's model, on the lab's text.

    `probes`: whose gradients make the curvature (see `lamina.lab.probes`); without "loss" there is no first-order term.
    Memory: what every sublayer adds and two gradients of it, for all tokens of the text.
    """

    def __init__(self, lab: Lab, probes: tuple[str, ...] = ("loss", "fisher")) -> None:
        self.lab = lab
        self.keeper = Keeper(probes)
        stream_gradients(lab, [self.keeper], what="gradients", score=False)

    def silence(self, site: str) -> Priced:
        """The price of dropping a sublayer; no run of anything."""
        return _joined([self._priced(k, -k.added.float()) for k in self.keeper.kept[site]])

    @torch.no_grad()
    def price(
        self, offers: Callable[[str], Iterable[tuple[str, Trial]]], what: str = "prices"
    ) -> dict[tuple[str, str], Priced]:
        """(sublayer, name of the change) → its price. `offers` are asked of each sublayer once, in depth order.

        Each change runs its sublayer once over the text (its block, where that is more than a sum of branches).
        """
        found: dict[tuple[str, str], Priced] = {}
        total, done = len(self.lab.anatomy.sublayers), 0
        for place, stack in enumerate(self.lab.anatomy.stacks):
            walk = Walk(self.lab, (), place)
            for block in stack.blocks:
                dense, streams = walk.run()
                for branch in block.branches:
                    site = branch.site.id
                    for name, trial in offers(site):
                        with trial():
                            added = walk.tried(branch, dense)
                        rows = zip(self.keeper.kept[site], added, strict=True)
                        found[site, name] = _joined([self._priced(k, _change(k, a)) for k, a in rows])
                    done += 1
                    self.lab.progress(what, done, total)
                walk.go(streams)
        return found

    def _priced(self, kept: _Kept, delta: Tensor) -> Priced:
        """One change on one batch: `delta` [tokens, width] float32."""
        along = (kept.gradient.float() * delta).sum(-1).double()
        taps = kept.taps
        taps.__dict__["dots"] = (kept.xx, kept.xx, (delta * delta).sum(-1).double())
        told = "loss" in self.keeper.probes
        first = along[self.keeper.probes.index("loss")] if told else torch.zeros_like(along[0])
        slope, damped, count = bends(taps, first, along, CHUNK, WINDOW)
        curve = curvature(taps, along)
        return Priced(slope, curve, damped, count)


def curvature(taps: Taps, along: Tensor, chunk: int = CHUNK) -> Array:
    """½ E[(z·δ)²] summed over each sequence's tokens, float64 [sequences]: z·δ is summed over chunks of positions.

    `along` [probes, tokens] is z·δ at each token.
    """
    lengths = torch.bincount(taps.sequence, minlength=taps.sequences)
    position = torch.arange(len(taps.sequence), device=lengths.device) - (lengths.cumsum(0) - lengths)[taps.sequence]
    each = -(lengths // -chunk)
    place = (each.cumsum(0) - each)[taps.sequence] + position // chunk
    sums = torch.zeros(len(along), int(each.sum()), dtype=torch.float64, device=along.device)
    sums.index_add_(1, place, along)
    owner = torch.repeat_interleave(torch.arange(taps.sequences, device=lengths.device), each)
    found = torch.zeros(taps.sequences, dtype=torch.float64, device=along.device)
    return found.index_add_(0, owner, sums.square().mean(0) / 2).cpu().numpy()


def _change(kept: _Kept, added: Tensor) -> Tensor:
    """What a sublayer adds otherwise, where `added` [batch, tokens, width] is what it adds now."""
    return kept.taps.rows.strip(added).float() - kept.added.float()


def _joined(parts: Sequence[Priced]) -> Priced:
    names = ("slope", "curve", "damped", "count")
    return Priced(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))


@contextmanager
def written(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, linear maps have these weights [outputs, inputs]; afterwards their own."""
    held: list[tuple[Any, Tensor]] = []
    try:
        for path, weight in weights.items():
            module: Any = model.get_submodule(path)
            held.append((module.weight, module.weight.data))
            module.weight.data = (weight if isinstance(module, nn.Linear) else weight.T).to(module.weight.data)
        yield
    finally:
        for parameter, data in held:
            parameter.data = data
