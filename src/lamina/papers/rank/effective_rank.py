"""D-Rank: the effective rank of a map on what it really gets, from the entropy of its whitened spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind, Site

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Array, Scores
    from lamina.lab import Lab
    from lamina.lab.taps import Taps

PAPER = Paper(
    key="mi2025drank",
    title="Layer-wise dynamic rank for compressing large language models",
    authors=("Zhendong Mi", "Bian Sun", "Grace Li Zhang", "Shaoyi Huang"),
    year=2025,
    arxiv="2509.25622",
)


@measure(
    "effective-rank",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "every map is a group of its own; the paper joins maps of two neighbouring layers where keys are not shared",
        "the spectrum comes from the second moment of the map's outputs, which has the same one: no Cholesky factor, "
        "and none of the jitter that the code adds where the inputs' moment is singular",
        "moments are summed over one token of four, chosen by its key (every=1 takes all, as the paper does)",
    ),
)
@dataclass(frozen=True, kw_only=True)
class EffectiveRank:
    """exp(-Σ p ln p), p the squared singular values of S W over their sum, SᵀS = XᵀX the moment of the map's inputs.

    1 for a map of rank one, min(inputs, outputs) for a flat spectrum. The error is that of the delta method over
    `groups` groups of sequences, each with sums of its own; 1 saves their memory, and gives no error. One token of
    `every` is taken: with few of them the rank is that of the tokens and not of the map.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "a few groups of sequences tell the error roughly, and copies of a "
        "sequence fall into the same group"
    }

    groups: int = 4
    every: int = 4

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, not {self.groups}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")

    def tally(self, anatomy: Anatomy) -> Moments:
        """Second moments of all maps."""
        return Moments(self.card.name, anatomy, self.groups, self.every)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


class Moments:
    """Sums of YᵀY [outputs, outputs], Y = X Wᵀ, or of XᵀX where a map has more outputs than inputs; float64.

    Each group of sequences has its own; what a sequence holds decides on its group, so that parts of a text agree.
    """

    wants: ClassVar[frozenset[str]] = frozenset({"linears"})

    def __init__(self, measure: str, anatomy: Anatomy, groups: int, every: int) -> None:
        self.measure, self.anatomy, self.groups, self.every = measure, anatomy, groups, every
        self.sums: dict[str, dict[int, Tensor]] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one map on one batch."""
        import torch

        if site.kind is not Kind.LINEAR:
            return
        rows = taps.rows
        taken = torch.from_numpy(np.flatnonzero(rows.keys % np.uint64(self.every) == 0))
        weight, seen = self.anatomy.weight(site).detach(), taps.entering[taken].float()
        if weight.shape[0] <= weight.shape[1]:
            seen = seen @ weight.float().T
        groups = torch.from_numpy((rows.owners % np.uint64(self.groups)).astype(np.int64))
        group = groups[taps.sequence.cpu()[taken]].to(seen.device)
        held = self.sums.setdefault(site.id, {})
        for number in group.unique().tolist():
            own = seen[group == number]
            held[number] = held.get(number, 0) + (own.T @ own).double()

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(self.measure, self.anatomy, self.groups, self.every)
        for part in (self, other):
            for site, held in part.sums.items():
                mine = both.sums.setdefault(site, {})
                for number, moment in held.items():
                    mine[number] = mine.get(number, 0) + moment
        return both

    def scores(self) -> Scores:
        """Effective ranks so far, with errors over groups of sequences (NaN for one group), [1] per site."""
        from lamina.core.scores import Scores

        values, errors, missing = {}, {}, {}
        for site in self.anatomy.of_kind(Kind.LINEAR):
            if site.id not in self.sums:
                missing[site.id] = "its input was not seen"
                continue
            groups = [self.sums[site.id][g] for g in sorted(self.sums[site.id])]
            rank, error = self._rank(self.anatomy.weight(site).detach(), groups)
            values[site.id], errors[site.id] = np.array([rank]), error
        return Scores(measure=self.measure, values=values, stderr=errors, missing=missing)

    def _rank(self, weight: Tensor, groups: list[Tensor]) -> tuple[float, Array]:
        """The effective rank on all sequences, and its error [1]: the gradient along each group's own moment."""
        import torch

        from lamina.lab.sampled import error_of
        from lamina.maths.spectra import effective_rank_of

        whole = torch.stack(groups).sum(0)
        if weight.shape[0] > weight.shape[1]:
            factor = torch.linalg.qr(weight.double(), mode="r").R
            rank, slope = effective_rank_of(factor @ whole @ factor.T)
            slope = factor.T @ slope @ factor
        else:
            rank, slope = effective_rank_of(whole)
        along = [float((slope * g).sum()) for g in groups]
        return rank, error_of(along, np.arange(len(groups)))
