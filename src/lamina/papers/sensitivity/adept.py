"""ADEPT: layers whose weights times gradients are small carry little of a model's general ability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import SUBLAYERS, Kind, Site, depth_key
from lamina.maths.moments import Mean

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.taps import Taps

PAPER = Paper(
    key="zhang2025adept",
    title="ADEPT: Continual Pretraining via Adaptive Expansion and Dynamic Decoupled Tuning",
    authors=(
        "Jinyang Zhang",
        "Yue Fang",
        "Hongxin Ding",
        "Weibin Liao",
        "Muyang Ye",
        "Xu Chu",
        "Junfeng Zhao",
        "Yasha Wang",
    ),
    year=2025,
    arxiv="2510.10071",
)


@measure(
    "adept",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.GRADIENT,
    status="stable",
    deviations=(
        "sequences are run one by one, whatever the batches: the code takes the gradient of a batch",
        "sublayers are scored too; a block is the sum of its own, so that norms which two of them share do not count",
        "scores are sums, and not divided by the largest",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Adept:
    """Keep what every sequence pulls at: Σ |g · w| over the site's weights, averaged over sequences.

    g is the gradient of a sequence's mean next-token loss; absolute values are taken before the mean over sequences.
    """

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy) -> Pulls:
        """Sums of |g · w| of every sequence."""
        from lamina.lab.lab import predicts

        return Pulls(self.card.name, predicts(anatomy.model))

    def measure(self, lab: Lab) -> Scores:
        """One forward and one backward, sequence by sequence."""
        from lamina.lab.gradients import stream_gradients

        return stream_gradients(lab, [self.tally(lab.anatomy)])[0]


class Pulls:
    """Σ |g · w| of each sublayer and sequence, in one order of sequences for all sublayers."""

    wants = frozenset({"weights"})
    probes = ("loss",)

    def __init__(self, measure: str, predicts: bool) -> None:
        self.measure, self.predicts = measure, predicts
        self.sums: dict[str, list[float]] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one sublayer on one sequence."""
        from lamina.lab.rows import real

        if site.kind in SUBLAYERS:
            tokens = max(int(real(taps.rows.batch).sum()) - 1, 1)
            pulls = (float((w.float() * g.float()).abs().double().sum()) for w, g in taps.weights.values())
            self.sums.setdefault(site.id, []).append(sum(pulls) / tokens)

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(self.measure, self.predicts)
        for site in {**self.sums, **other.sums}:
            both.sums[site] = self.sums.get(site, []) + other.sums.get(site, [])
        return both

    def scores(self) -> Scores:
        """Means over sequences, [1] per sublayer and block.

        Raises UnsupportedError where the model predicts no tokens, so that there is no loss to differentiate.
        """
        from lamina.core.errors import UnsupportedError
        from lamina.core.scores import Scores

        if not self.predicts:
            raise UnsupportedError("the model predicts no next tokens, so there is no loss", where=self.measure)
        pulls = {site: np.array(found) for site, found in self.sums.items()}
        for site, found in list(pulls.items()):
            block = site.rpartition(".")[0]
            pulls[block] = pulls.get(block, 0.0) + found
        values, errors = {}, {}
        for site in sorted(pulls, key=depth_key):
            mean = Mean()
            mean.add(pulls[site], np.ones(len(pulls[site])))
            values[site], errors[site] = np.atleast_1d(mean.value), np.atleast_1d(mean.stderr)
        return Scores(measure=self.measure, values=values, stderr=errors)
