"""Iterative Feature Merging: how many of an MLP's neurons are left when the most alike are merged, again and again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Array, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab

PAPER = Paper(
    key="chen2023beyond",
    title="Going Beyond Neural Network Feature Similarity: The Network Feature Complexity and Its Interpretation "
    "Using Category Theory",
    authors=("Yiting Chen", "Zhanpeng Zhou", "Junchi Yan"),
    year=2023,
    arxiv="2310.06756",
)

COLUMNS = ("neurons", "left", "largest group", "nearest/farthest")
"""Of the grid `merging`; the last is the ratio of distances before any merge: merging begins where it is below beta."""


@measure(
    "feature-complexity",
    PAPER,
    on=Kind.MLP,
    needs=Need.NOTHING,
    status="stable",
    deviations=(
        "on the neurons of a transformer's MLP; the code merges channels of VGG and ResNet",
        "in a gated MLP the rows of both maps upstream are summed, so that even twins do not merge exactly there",
        "weights are as they are: the gain of the norm before an MLP is not folded into them",
        "of pairs that are equally close, the first merges (the code takes any)",
    ),
)
@dataclass(frozen=True, kw_only=True)
class FeatureComplexity:
    """The share of an MLP's neurons left when pairs within `beta` of the largest distance are merged, closest first.

    d(i, j) sums ‖w_i - w_j‖² over all matrices that hold a row or column per neuron. Merged neurons have the sum of the
    rows upstream and the mean of the columns downstream, weighted with how many neurons each stands for. At most the
    share `max_ratio` of the neurons goes.
    """

    card: ClassVar[Card]

    beta: float = 0.1
    max_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be at least 0 and below 1, not {self.beta:g}")
        if not 0 < self.max_ratio <= 1:
            raise ValueError(f"max_ratio must be above 0 and at most 1, not {self.max_ratio:g}")

    def measure(self, lab: Lab) -> Scores:
        """Reads the weights, nothing else."""
        from lamina.core.scores import Grid, Scores

        values, rows, missing = {}, {}, {}
        sites = lab.anatomy.of_kind(Kind.MLP)
        for done, site in enumerate(sites):
            units = lab.anatomy.units(site, Kind.NEURON)
            if units:
                upstream, downstream = _grams(lab.anatomy, units[0])
                groups, nearness = merged(upstream, downstream, self.beta, math.ceil(len(upstream) * self.max_ratio))
                values[site.id] = np.array([len(groups) / len(upstream)])
                rows[site.id] = (len(upstream), len(groups), max(map(len, groups)), nearness)
            else:
                missing[site.id] = next(iter(lab.anatomy.refused_units(site).values()), "its neurons were not found")
            lab.progress("merging neurons", done + 1, len(sites))
        table = np.array(list(rows.values()), dtype=np.float64).reshape(len(rows), len(COLUMNS))
        grid = Grid(values=table, rows=tuple(rows), columns=COLUMNS)
        return Scores(measure=self.card.name, values=values, grids={"merging": grid} if rows else {}, missing=missing)


def _grams(anatomy: Anatomy, neurons: Site) -> tuple[Array, Array]:
    """Inner products [neurons, neurons] of neurons' rows upstream, and of their columns downstream; float64."""
    parameters = dict(anatomy.model.named_parameters())
    tail = anatomy.tail(neurons)
    sums = [np.zeros((neurons.width, neurons.width)) for _ in range(2)]
    for tie in anatomy.ties(neurons):
        parameter: Tensor = parameters[tie.param].detach()
        if parameter.ndim > 1:
            own = parameter.movedim(tie.dim, 0)[tie.start : tie.start + tie.size * neurons.width]
            flat = own.reshape(neurons.width, -1).double()
            sums[tie.param.rpartition(".")[0] == tail] += (flat @ flat.T).cpu().numpy()
    return sums[0], sums[1]


def merged(upstream: Array, downstream: Array, beta: float, most: int) -> tuple[list[list[int]], float]:
    """The groups of neurons after at most `most` merges, and the ratio of the least distance to the largest before.

    Inner products [neurons, neurons] of rows upstream and of columns downstream are all that merging needs; they are
    changed in place. After a merge only the nearest and farthest of neurons that lost theirs are looked for again.
    """
    pairs = _Pairs(upstream, downstream)
    i, j, least, largest = pairs.extremes()
    nearness = least / largest if largest > 0 else 0.0
    for _ in range(most):
        if len(pairs.alive) < 2 or least > beta * largest:
            break
        pairs.merge(i, j)
        i, j, least, largest = pairs.extremes()
    return [pairs.groups[i] for i in pairs.alive], nearness


class _Pairs:
    """The neurons that are left, with the nearest and the farthest of each."""

    def __init__(self, upstream: Array, downstream: Array) -> None:
        self.upstream, self.downstream = upstream, downstream
        self.norms = upstream.diagonal() + downstream.diagonal()
        count = len(upstream)
        self.alive = np.arange(count)
        self.groups = [[i] for i in range(count)]
        self.near, self.far = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self.least, self.most = np.full(count, np.inf), np.full(count, -np.inf)
        for i in range(count):
            self._look(i)

    def distances(self, i: int) -> Array:
        """d(i, ·) to those that are left, in the order of `alive`; infinite to itself."""
        found = (self.norms[i] + self.norms - 2 * (self.upstream[i] + self.downstream[i]))[self.alive]
        found = np.maximum(found, 0.0)  # rounding
        found[self.alive == i] = np.inf
        return found

    def extremes(self) -> tuple[int, int, float, float]:
        """The closest pair, its distance, and the largest of all distances."""
        i = int(self.alive[np.argmin(self.least[self.alive])])
        return i, int(self.near[i]), float(self.least[i]), float(self.most[self.alive].max())

    def merge(self, i: int, j: int) -> None:
        """Put j into i: rows upstream are summed, columns downstream averaged by how many neurons each stands for."""
        one, two = len(self.groups[i]), len(self.groups[j])
        for gram, a, b in ((self.upstream, 1.0, 1.0), (self.downstream, one / (one + two), two / (one + two))):
            row = a * gram[i] + b * gram[j]
            row[i] = a * row[i] + b * row[j]
            gram[i] = gram[:, i] = row
        self.norms[i] = self.upstream[i, i] + self.downstream[i, i]
        self.groups[i] = self.groups[i] + self.groups[j]
        self.alive = self.alive[self.alive != j]
        lost = np.isin(self.near[self.alive], (i, j)) | np.isin(self.far[self.alive], (i, j)) | (self.alive == i)
        for k in self.alive[lost]:
            self._look(int(k))
        self._compare(i)

    def _look(self, i: int) -> None:
        """Find the nearest and the farthest of one neuron."""
        found = self.distances(i)
        if len(found) < 2:
            self.least[i], self.most[i] = np.inf, -np.inf
            return
        place = int(np.argmin(found))
        self.near[i], self.least[i] = self.alive[place], found[place]
        found[self.alive == i] = -np.inf
        place = int(np.argmax(found))
        self.far[i], self.most[i] = self.alive[place], found[place]

    def _compare(self, i: int) -> None:
        """Let the others see the new neuron."""
        found = self.distances(i)
        others = self.alive != i
        ids, found = self.alive[others], found[others]
        nearer, farther = found < self.least[ids], found > self.most[ids]
        self.near[ids[nearer]], self.least[ids[nearer]] = i, found[nearer]
        self.far[ids[farther]], self.most[ids[farther]] = i, found[farther]
