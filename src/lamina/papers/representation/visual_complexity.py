"""Feature complexity by V-information: from which depth on the last depth's features can be read off linearly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Array, Scores
    from lamina.lab import Lab
    from lamina.lab.sample import Sampled
    from lamina.lab.sampled import Found, PerSample

PAPER = Paper(
    key="fel2024complexity",
    title="Understanding Visual Feature Reliance through the Lens of Complexity",
    authors=("Thomas Fel", "Louis Bethune", "Andrew Kyle Lampinen", "Thomas Serre", "Katherine Hermann"),
    year=2024,
    arxiv="2407.06076",
)


@measure(
    "decodability",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=(
        "features are principal directions of the last depth's states; the paper's are a dictionary of 10,000 from NMF",
        "states of single tokens, not of pooled images",
        "ridge regression, judged on held-out sequences, each in turn",
        "the paper scores features; a block is scored by the size of the step of their mean information across it",
        "the first token of a sequence is left out: in many models its huge norm would be the first feature",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Decodability:
    """Keep what makes the final features readable: |the step of their mean R² across the block|.

    R² is that of a ridge regression from the states at a depth to `features` principal directions of the last depth,
    each scaled to variance 1: the V-information of linear maps. `ridge` is relative to the number of tokens times their
    median energy. Errors take features and maps as known. Grids: `decodability`, the mean R² at all depths;
    `complexity`, of each feature K = 1 - the mean of its R² (at least 0) over the depths behind blocks, and its share
    of the variance.
    """

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "errors take features and maps as known"
    }

    card: ClassVar[Card]

    sequences: int = 64
    each: int = 8
    features: int = 16
    ridge: float = 0.002

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ValueError(f"features must be at least 1, not {self.features}")
        if self.ridge <= 0:
            raise ValueError(f"ridge must be above 0, not {self.ridge:g}")

    def tally(self, anatomy: Anatomy) -> PerSample:
        """A sample of tokens; the maps are fitted in the end."""
        from lamina.lab.sampled import PerSample

        return PerSample(self.card.name, self._found, self.sequences, self.each)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]

    def _found(self, sampled: Sampled) -> Found:
        from lamina.core.errors import UnsupportedError
        from lamina.core.scores import Grid
        from lamina.lab.sampled import Found, curves, over_sequences, sampled_behind, sequences_of
        from lamina.maths.maps import Ridge
        from lamina.maths.similarity import principal

        sampled = sampled_behind(sampled, 1)
        basis, sizes = principal(sampled.states[-1], self.features)
        if not basis.shape[1]:
            raise UnsupportedError("the last depth's states do not vary", hint="give it more text")
        wanted = basis * len(basis) ** 0.5
        left = [Ridge(standard(s), self.ridge).held_out(wanted, sampled.owner) for s in sampled.states]
        lost = np.stack([(e**2).mean(1).numpy() for e in left])
        _, error = over_sequences(np.diff(lost, axis=0), 1.0, sequences_of(sampled))
        read = np.stack([1 - ((e**2).sum(0) / (wanted**2).sum(0)).numpy() for e in left])
        complexity = 1 - np.clip(read[1:], 0.0, 1.0).mean(0)
        energy = ((sampled.states[-1] - sampled.states[-1].mean(0)).double() ** 2).sum()
        table = np.column_stack([complexity, (sizes**2 / energy).numpy()])
        names = tuple(f"feature {i}" for i in range(len(complexity)))
        return Found(
            values=steps(read),
            stderr=error,
            grids={
                "decodability": curves(sampled.blocks, r2=read.mean(1)),
                "complexity": Grid(values=table, rows=names, columns=("K", "share of variance")),
            },
        )


def standard(states: Tensor) -> Tensor:
    """Each channel with mean 0 and variance 1; channels that do not vary are 0."""
    states = states.double()
    spread = states.std(0, correction=0)
    return (states - states.mean(0)) / spread.clamp_min(1e-12) * (spread > 0)


def steps(read: Array) -> Array:
    """The sizes of the steps of the mean over features, of [depths, features]."""
    return np.abs(np.diff(read.mean(1)))
