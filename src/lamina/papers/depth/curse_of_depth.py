"""The Curse of Depth: in pre-norm models the stream's variance grows with depth, and deep blocks come to do little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.scores import Array, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.taps import Taps
    from lamina.maths.sums import Sums

PAPER = Paper(
    key="sun2025curse",
    title="The Curse of Depth in Large Language Models",
    authors=("Wenfang Sun", "Xinyuan Song", "Pengxiang Li", "Lu Yin", "Yefeng Zheng", "Shiwei Liu"),
    year=2025,
    arxiv="2502.05795",
)


@measure(
    "variance-growth",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "the paper shows the variance of each layer; a block is scored by the size of its logarithm's step",
        "the first token of a sequence is left out: in many models its huge norm would be all of the variance "
        "(front=0 takes all tokens)",
    ),
)
@dataclass(frozen=True, kw_only=True)
class VarianceGrowth:
    """Keep what changes the stream's variance: |ln(variance behind / variance before the block)|.

    The variance is that over all tokens and channels. Grid `variance`: at all depths. The paper's map of angles
    between depths is the measure `angular`.
    """

    card: ClassVar[Card]

    front: int = 1

    def __post_init__(self) -> None:
        if self.front < 0:
            raise ValueError(f"front must not be negative, not {self.front}")

    def tally(self, anatomy: Anatomy) -> Variances:
        """Sums of the stream and of its squares around every block."""
        return Variances(self.card.name, [[b.site.id for b in k.blocks] for k in anatomy.stacks], self.front)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


class Variances:
    """Per block, sums over sequences of (numbers, Σx, Σx², Σy, Σy²), x before and y behind it."""

    def __init__(self, measure: str, stacks: list[list[str]], front: int) -> None:
        self.measure, self.stacks, self.front = measure, stacks, front
        self.sums: dict[str, Sums] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one block on one batch."""
        from lamina.lab.sampled import behind, masked
        from lamina.maths.sums import Sums

        if site.kind is not Kind.BLOCK:
            return
        mask, width = behind(taps.rows, self.front), taps.x.shape[-1]
        parts = [masked(taps, v, mask) for v in (taps.x.sum(-1), taps.xx, taps.leaving.sum(-1), taps.yy)]
        vectors = np.stack([width * parts[0][1], *(sums for sums, _ in parts)], 1)
        self.sums.setdefault(site.id, Sums()).add(vectors)

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        from lamina.maths.sums import Sums

        both = type(self)(self.measure, self.stacks, self.front)
        for key in {**self.sums, **other.sums}:
            both.sums[key] = self.sums.get(key, Sums()).merge(other.sums.get(key, Sums()))
        return both

    def scores(self) -> Scores:
        """Steps of the variance's logarithm, and the variances themselves."""
        from lamina.core.scores import Scores
        from lamina.lab.sampled import curves, stack_of

        values, errors, grids = {}, {}, {}
        for blocks in self.stacks:
            seen = [self.sums[b] for b in blocks if b in self.sums]
            if len(seen) < len(blocks):
                continue
            around = [(_variance(s.total, 1), _variance(s.total, 3)) for s in seen]
            for block, sums, (before, after) in zip(blocks, seen, around, strict=True):
                defined = before > 0 and after > 0
                values[block] = np.array([abs(np.log(after / before)) if defined else 0.0])
                gradient = _gradient(sums.total, 3) / after - _gradient(sums.total, 1) / before if defined else 0.0
                errors[block] = np.array([sums.stderr(gradient * np.ones(5))])
            grid = curves(blocks, variance=[around[0][0], *(after for _, after in around)])
            grids[f"{stack_of(blocks)}variance"] = grid
        return Scores(measure=self.measure, values=values, stderr=errors, grids=grids)


def _variance(total: Array, first: int) -> float:
    """Σz²/n - (Σz/n)², with Σz at `first` and Σz² behind it."""
    return float(total[first + 1] / total[0] - (total[first] / total[0]) ** 2)


def _gradient(total: Array, first: int) -> Array:
    """Its gradient with respect to the sums [5]."""
    n, z, zz = total[0], total[first], total[first + 1]
    found = np.zeros(5)
    found[0] = -zz / n**2 + 2 * z**2 / n**3
    found[first], found[first + 1] = -2 * z / n**2, 1 / n
    return found
