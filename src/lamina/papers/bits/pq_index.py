"""PQ Index: how sparse a weight matrix is, from the ratio of two of its norms; and how much of it can go by that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.errors import InputError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, planner
from lamina.core.sites import Kind
from lamina.planners._density import DROPS, FAILS, asked

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.bench import Bench

PAPER = Paper(
    key="diao2023pruning",
    title="Pruning Deep Neural Networks from a Sparsity Perspective",
    authors=("Enmao Diao", "Ganghua Wang", "Jiawei Zhang", "Yuhong Yang", "Jie Ding", "Vahid Tarokh"),
    year=2023,
    arxiv="2302.05601",
)

PIECE = 1 << 20
"""Weights that are taken to float64 at once, in whole rows."""


@measure(
    "pq-index",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.NOTHING,
    status="stable",
    deviations=(
        "the score is 1 - PQI, so that higher means keep: a sparser map can lose more of its weights",
        "weights that are zero count as weights: there is no mask of pruned ones",
        "a map or row of zeros, for which the index is 0/0, counts as wholly sparse",
    ),
)
@dataclass(frozen=True, kw_only=True)
class PQIndex:
    """1 - PQI = d^(1/q - 1/p) · ‖w‖_p / ‖w‖_q over a map's d weights, in (0, 1]; 1 where all have one size.

    `scope` "layer" takes the whole map as one vector, "neuron" averages over the vectors of its outputs.
    """

    card: ClassVar[Card]

    p: float = 0.5
    q: float = 1.0
    scope: str = "layer"

    def __post_init__(self) -> None:
        if not 0 < self.p < self.q:
            raise ValueError(f"p and q must be 0 < p < q, not p = {self.p:g}, q = {self.q:g}")
        if self.scope not in ("layer", "neuron"):
            raise ValueError(f"scope must be layer or neuron, not {self.scope!r}")

    def measure(self, lab: Lab) -> Scores:
        """Reads the weights, nothing else."""
        from lamina.core.scores import Scores

        values = {}
        for site in lab.anatomy.of_kind(Kind.LINEAR):
            values[site.id] = np.array([self.density(lab.anatomy.weight(site).detach())])
        return Scores(measure=self.card.name, values=values)

    def density(self, weight: Tensor) -> float:
        """1 - PQI of a matrix [outputs, inputs]."""
        import torch

        powers = []
        for rows in weight.split(max(1, PIECE // weight.shape[1])):
            size = rows.double().abs()
            powers.append(torch.stack([size.pow(self.p).sum(1), size.pow(self.q).sum(1)], 1))
        sums, count = torch.cat(powers), weight.shape[1]
        if self.scope == "layer":
            sums, count = sums.sum(0, keepdim=True), weight.numel()
        means = sums / count
        ratio = means[:, 0] ** (1 / self.p) / means[:, 1].clamp_min(1e-300) ** (1 / self.q)
        return float(torch.where(means[:, 1] > 0, ratio, 0.0).mean())


@planner(
    "sap",
    PAPER,
    on=Kind.LINEAR,
    deviations=(
        "one round: the paper trains, prunes a little, goes back to the first weights and trains again, sixteen times",
        "gamma is what meets the budget, and no setting; the shares of maps stand to each other as in the paper",
    ),
)
@dataclass(frozen=True, kw_only=True)
class SparsityAware:
    """A sparsity for each map by its PQ index: of d weights gamma (d - m) go, at most `most` of them (SAP).

    m = d (1 + `eta`)^(q/(p-q)) (1 - PQI)^(pq/(q-p)) weights carry the map's norms, so that sparser maps lose more. The
    budget's `keep` of parameters is the share of weights that are not zero, over the linear maps of all blocks;
    protected ones stay dense and count. One step of the rewrite named `rewrite`. Reads no scores and no text.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(FAILS, DROPS)

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    most: float = 0.9
    rewrite: str = "magnitude"

    def __post_init__(self) -> None:
        PQIndex(p=self.p, q=self.q)
        if not self.eta >= 0:
            raise ValueError(f"eta is not below 0, not {self.eta:g}")
        if not 0 < self.most < 1:
            raise ValueError(f"most lies between 0 and 1, not {self.most:g}")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step over all maps that lose weights. Raises InputError where `most` of those that may is too little."""
        from lamina.maths.ratios import pq

        wanted = asked(budget, anatomy)
        if wanted is None:
            return ()
        index = PQIndex(p=self.p, q=self.q)
        free = [s for s in wanted.shapes if s not in wanted.dense]
        indices = {s: 1 - index.density(anatomy.weight(s).detach()) for s in free}
        zeros = (1 - wanted.density) * sum(wanted.sizes.values())

        def shares(gamma: float) -> dict[str, float]:
            told = {"p": self.p, "q": self.q, "eta": self.eta, "most": self.most}
            return pq(indices, wanted.sizes, gamma=gamma, **told)

        def enough(found: Mapping[str, float]) -> bool:
            return sum(wanted.sizes[s] * share for s, share in found.items()) >= zeros - len(free)

        low, high = 0.0, 1.0
        while not enough(shares(high)):
            low, high = high, 2 * high
            if high > 1e12:
                raise InputError("the indices let no more weights go", hint="keep more, protect less, or raise `most`")
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if enough(shares(middle)) else (middle, high)
        return wanted.steps(self.rewrite, dict.fromkeys(wanted.shapes, 0.0) | shares(high))
