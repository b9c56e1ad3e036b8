"""Layer-wise quantization: which blocks get the high bits, by what they do to the stream (LIM) or by weights (ZD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.tally import PerToken

PAPER = Paper(
    key="dumitru2024layerwise",
    title="Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels",
    authors=(
        "Razvan-Gabriel Dumitru",
        "Vikas Yadav",
        "Rishabh Maheshwary",
        "Paul-Ioan Clotan",
        "Sathwik Tejaswi Madhusudhan",
        "Mihai Surdeanu",
    ),
    year=2024,
    arxiv="2406.17415",
)

PIECE = 1 << 20
"""Weights that are taken to float64 at once."""


@measure(
    "lim",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=("the cosine is taken per token and then averaged; the paper's order of the two is inferred",),
)
@dataclass(frozen=True, kw_only=True)
class LayerInputModification:
    """Layer Input Modification: minus the cosine of a block's input and output, averaged over tokens.

    -1 for a block that passes its input on, 0 where the output is orthogonal to it, 1 where it points the other way.
    """

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy) -> PerToken:
        """Token means of minus the cosine."""
        from lamina.lab.tally import PerToken

        return PerToken(self.card.name, self.card.on, lambda taps: -taps.cosine)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


@measure(
    "zd",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.NOTHING,
    deviations=(
        "the score is minus the share, so that higher means keep: the paper keeps blocks with a small share",
        "a block's weights are its matrices; that norms and biases stay out is inferred",
        "z is signed, which is inferred from second-hand accounts; the option two_sided takes its size",
    ),
)
@dataclass(frozen=True, kw_only=True)
class ZScoreDistribution:
    """Minus the share of a block's weights whose z-score, among all weights of the block, is above `threshold`.

    z = (w - mean) / standard deviation; `two_sided` counts |z|. Gaussian weights score -0.1587.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_identity_block_is_lowest": "weights that are all zero have no outliers, and few outliers mean important"
    }

    threshold: float = 1.0
    two_sided: bool = False

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, not {self.threshold:g}")

    def measure(self, lab: Lab) -> Scores:
        """Reads the weights, nothing else."""
        from lamina.core.scores import Scores

        parameters = dict(lab.model.named_parameters())
        values, missing = {}, {}
        for site in lab.anatomy.of_kind(Kind.BLOCK):
            matrices = [p.detach() for t in lab.anatomy.ties(site) if (p := parameters[t.param]).ndim > 1]
            if matrices:
                values[site.id] = np.array([-self._share(matrices)])
            else:
                missing[site.id] = "it has no matrices of its own"
        return Scores(measure=self.card.name, values=values, missing=missing)

    def _share(self, matrices: list[Tensor]) -> float:
        count = sum(m.numel() for m in matrices)
        mean = sum(float(w.sum()) for w in _pieces(matrices)) / count
        deviation = (sum(float((w - mean).square().sum()) for w in _pieces(matrices)) / count) ** 0.5
        if deviation == 0:
            return 0.0
        above = 0
        for w in _pieces(matrices):
            z = (w - mean) / deviation
            above += int(((z.abs() if self.two_sided else z) > self.threshold).sum())
        return above / count


def _pieces(matrices: list[Tensor]) -> Iterator[Tensor]:
    """All weights as float64 vectors that stay in cache."""
    for matrix in matrices:
        for piece in matrix.flatten().split(PIECE):
            yield piece.double()
