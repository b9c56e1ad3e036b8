"""PQ Index: how sparse a weight matrix is, from the ratio of two of its norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.core.scores import Scores
    from lamina.lab import Lab

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
            values[site.id] = np.array([self._density(lab.anatomy.weight(site).detach())])
        return Scores(measure=self.card.name, values=values)

    def _density(self, weight: Tensor) -> float:
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
