"""Shortened LLaMA's Taylor criterion: weights times their gradients, summed over the text, say what a site is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, recipe
from lamina.core.sites import SUBLAYERS, Kind, Site, depth_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Array, Scores
    from lamina.lab import Lab
    from lamina.lab.taps import Taps

PAPER = Paper(
    key="kim2024shortened",
    title="Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining Methods",
    authors=(
        "Bo-Kyeong Kim",
        "Geonmin Kim",
        "Tae-Ho Kim",
        "Thibault Castells",
        "Shinkook Choi",
        "Junho Shin",
        "Hyoung-Kyu Song",
    ),
    year=2024,
    arxiv="2402.02834",
)


@measure(
    "taylor",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.GRADIENT,
    status="stable",
    deviations=(
        "sublayers are scored too; a block is the sum of its own, so that norms which two of them share do not count",
        "the gradient is that of the mean loss over all tokens; the code adds up that of each batch's mean",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Taylor:
    """Keep what the first-order term says would be missed: Σ |w · g| over the site's weights, g summed over the text.

    g is the gradient of the mean next-token loss. Products w · g are added up signed before the absolute value, weight
    by weight, so that memory is 8 bytes per weight and group: sequences are dealt out to `groups` groups by what they
    hold, and the error is that of the jackknife over these; 1 takes least memory and gives no errors.
    """

    card: ClassVar[Card]

    groups: int = 4

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "errors are taken over four groups of sequences, since each takes as much "
        "memory as the model: copies of a sequence come into one group"
    }

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups is at least 1, not {self.groups}")

    def tally(self, anatomy: Anatomy) -> WeightProducts:
        """Sums of w · g of every weight."""
        from lamina.lab.lab import predicts

        return WeightProducts(self.card.name, self.groups, predicts(anatomy.model))

    def measure(self, lab: Lab) -> Scores:
        """One forward and one backward, sequence by sequence."""
        from lamina.lab.gradients import stream_gradients

        return stream_gradients(lab, [self.tally(lab.anatomy)])[0]


class WeightProducts:
    """Sums of w · g by sublayer, parameter and group, float64, and predicted tokens by group.

    All sublayers see every sequence, so that tokens are counted at each of them.
    """

    wants = frozenset({"weights"})
    probes = ("loss",)

    def __init__(self, measure: str, groups: int, predicts: bool) -> None:
        self.measure, self.groups, self.predicts = measure, groups, predicts
        self.products: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, Array] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one sublayer on one sequence."""
        from lamina.lab.rows import real

        if site.kind not in SUBLAYERS:
            return
        group = int(taps.rows.owners[0] % np.uint64(self.groups))
        self.counts.setdefault(site.id, np.zeros(self.groups))[group] += max(int(real(taps.rows.batch).sum()) - 1, 0)
        mine = self.products.setdefault(site.id, {})
        for name, (weight, gradient) in taps.weights.items():
            key = f"{group} {name}"
            product = weight.detach().float().mul(gradient.float())
            mine[key] = mine[key].add_(product) if key in mine else product.double()

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(self.measure, self.groups, self.predicts)
        for site in {**self.counts, **other.counts}:
            parts = [p for p in (self, other) if site in p.counts]
            both.counts[site] = sum((p.counts[site] for p in parts), np.zeros(self.groups))
            both.products[site] = {}
            for part in parts:
                for key, product in part.products[site].items():
                    known = both.products[site].get(key)
                    both.products[site][key] = product.clone() if known is None else known + product
        return both

    def scores(self) -> Scores:
        """Σ |Σ w · g| per predicted token, [1] per sublayer and block; errors by the jackknife over groups.

        Raises UnsupportedError where the model predicts no tokens, so that there is no loss to differentiate.
        """
        from lamina.core.errors import UnsupportedError
        from lamina.core.scores import Scores

        if not self.predicts:
            raise UnsupportedError("the model predicts no next tokens, so there is no loss", where=self.measure)
        ways = {site: self._ways(site) for site in self.products}
        for site in list(ways):
            block = site.rpartition(".")[0]
            ways[block] = ways.get(block, np.zeros(())) + ways[site]
        names = sorted(ways, key=depth_key)
        sizes = next(iter(self.counts.values()), np.zeros(self.groups))
        values = {n: ways[n][:1] for n in names}
        errors = {n: np.atleast_1d(_spread(ways[n], sizes)) for n in names}
        return Scores(measure=self.measure, values=values, stderr=errors)

    def _ways(self, site: str) -> Array:
        """The score from all groups, and with each that holds anything left out: [1 + groups in use]."""
        import torch

        counts, products = self.counts[site], self.products[site]
        used = [g for g in range(self.groups) if counts[g] > 0]
        found = np.zeros(1 + len(used))
        for name in dict.fromkeys(key.partition(" ")[2] for key in products):
            parts = {g: products[f"{g} {name}"] for g in used if f"{g} {name}" in products}
            whole = torch.stack(list(parts.values())).sum(0) if len(parts) > 1 else next(iter(parts.values()))
            found[0] += float(whole.abs().sum())
            for place, g in enumerate(used):
                found[1 + place] += float((whole - parts[g] if g in parts else whole).abs().sum())
        left = np.array([counts.sum(), *(counts.sum() - counts[g] for g in used)])
        return np.divide(found, left, out=np.zeros_like(found), where=left > 0)


def _spread(ways: Array, counts: Array) -> float:
    """Standard error from the value and those with a group left out; groups of unlike size.

    The delete-m_j jackknife (Busing, Meijer and van der Leeden, Delete-m jackknife for unequal m, 1999).
    """
    sizes = counts[counts > 0]
    if len(sizes) < 2:
        return float("nan")
    h = sizes.sum() / sizes
    pseudo = h * ways[0] - (h - 1) * ways[1:]
    centre = len(sizes) * ways[0] - ((1 - 1 / h) * ways[1:]).sum()
    return float(np.sqrt(((pseudo - centre) ** 2 / (h - 1)).mean()))


recipe(
    "taylor-block",
    PAPER,
    summary="The blocks with the least sum of weights times gradients go, scored once (Taylor).",
    measure="taylor",
    planner="lowest",
    kinds=(Kind.BLOCK,),
    deviations=("no block is protected from the outset (the paper keeps the first four and the last two)",),
)
