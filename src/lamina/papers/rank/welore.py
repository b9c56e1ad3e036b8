"""WeLore: one threshold on all maps' normalised singular values gives each map its own rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, planner, recipe
from lamina.core.sites import Kind
from lamina.planners._ranks import FACTORS, FAILS, asked

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Array, Scores
    from lamina.lab import Lab
    from lamina.lab.bench import Bench

PAPER = Paper(
    key="jaiswal2024welore",
    title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    authors=(
        "Ajay Jaiswal",
        "Lu Yin",
        "Zhenyu Zhang",
        "Shiwei Liu",
        "Jiawei Zhao",
        "Yuandong Tian",
        "Zhangyang Wang",
    ),
    year=2024,
    arxiv="2407.11239",
)


@measure(
    "welore-rank",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.NOTHING,
    status="stable",
    deviations=(
        "a map's singular values are normalised between their least and largest, as in the code; the paper divides by "
        "the largest",
        "the threshold is found exactly, by sorting all values; the code looks it up in a table of two models",
        "the singular values of a map that are all alike are kept, those of a map of zeros cut (0/0 in the code)",
    ),
)
@dataclass(frozen=True, kw_only=True)
class WeLoreRank:
    """The share of a map's rank that stays when one threshold over all maps cuts the share `reduction` of all ranks.

    σ is kept where (σ - min σ) / (max σ - min σ) ≥ threshold, the largest that cuts no more than was asked for. The
    grid `ranks` has of each map the rank kept, the full rank, and the rank below which two factors are smaller than it.
    """

    card: ClassVar[Card]

    reduction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.reduction < 1:
            raise ValueError(f"reduction must be at least 0 and below 1, not {self.reduction:g}")

    def measure(self, lab: Lab) -> Scores:
        """Reads the weights, nothing else."""
        from lamina.core.scores import Grid, Scores
        from lamina.maths.spectra import singular_values

        sites = lab.anatomy.of_kind(Kind.LINEAR)
        spectra, even = [], []
        for done, site in enumerate(sites):
            weight = lab.anatomy.weight(site).detach()
            spectra.append(normalised(singular_values(weight).cpu().numpy()))
            even.append(weight.numel() / sum(weight.shape))
            lab.progress("singular values", done + 1, len(sites))
        if not sites:
            return Scores(measure=self.card.name, values={})
        tau = _threshold(np.concatenate(spectra), self.reduction)
        kept = [int((s >= tau).sum()) for s in spectra]
        full = [len(s) for s in spectra]
        names = tuple(s.id for s in sites)
        ranks = Grid(
            values=np.array([kept, full, even], dtype=np.float64).T, rows=names, columns=("kept", "full", "break-even")
        )
        whole = np.array([[tau, 1 - sum(kept) / sum(full)]])
        threshold = Grid(values=whole, rows=("all maps",), columns=("threshold", "reduction"))
        return Scores(
            measure=self.card.name,
            values={n: np.array([k / f]) for n, k, f in zip(names, kept, full, strict=True)},
            grids={"ranks": ranks, "threshold": threshold},
        )


@planner(
    "welore",
    PAPER,
    on=Kind.LINEAR,
    deviations=(
        "the threshold is the least that meets the budget; the paper's one cuts a share of all ranks, and what that "
        "saves depends on the maps' shapes",
        "a map whose factors would take more than itself is kept too: half the rank of a square map saves nothing",
        "nothing is trained: the paper goes on with the factors alone and leaves the kept maps as they are",
    ),
)
@dataclass(frozen=True, kw_only=True)
class WeLore:
    """Ranks by one threshold on all maps' normalised singular values, the least one that meets the budget.

    A map that loses more than the share `least` of its rank becomes factors of the rank that stays; the others are
    kept, such as those with flat spectra. The budget's parameters or bytes are all taken from maps that are not
    protected; reads the weights alone.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(FAILS, FACTORS)

    least: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.least < 1:
            raise ValueError(f"least is at least 0 and below 1, not {self.least:g}")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step over all maps that lose rank. Raises InputError where the highest threshold is not enough."""
        from lamina.maths.spectra import singular_values

        wanted = asked(budget, anatomy)
        if wanted is None:
            return ()
        spectra = {s: normalised(singular_values(anatomy.weight(s).detach()).cpu().numpy()) for s in wanted.shapes}

        def ranks(threshold: float) -> dict[str, int]:
            return cut(spectra, wanted.shapes, threshold, self.least)

        def freed(threshold: float) -> int:
            found = ((wanted.shapes[s], wanted.each[s], k) for s, k in ranks(threshold).items())
            return sum(each * (o * i - k * (o + i)) for (o, i), each, k in found)

        steps = np.unique(np.concatenate(list(spectra.values())))
        if freed(steps[-1]) < wanted.need:
            raise wanted.target.refuse(freed(steps[-1]))
        low, high = 0, len(steps) - 1  # the higher the threshold, the more is freed
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if freed(steps[middle]) >= wanted.need else (middle + 1, high)
        return (wanted.step("svd", ranks(steps[low]), {"threshold": float(steps[low])}),)


def cut(
    spectra: Mapping[str, Array], shapes: Mapping[str, tuple[int, int]], threshold: float, least: float
) -> dict[str, int]:
    """Map → rank, of those that become factors: all that lose more than the share `least` of it, and get smaller."""
    found = {}
    for site, values in spectra.items():
        outputs, inputs = shapes[site]
        rank = max(int((values >= threshold).sum()), 1)
        if 1 - rank / len(values) > least and rank * (outputs + inputs) < outputs * inputs:
            found[site] = rank
    return found


def normalised(values: Array) -> Array:
    """Between 0 for the least and 1 for the largest; all 1 where they are alike, all 0 where they are zero."""
    least, largest = values.min(), values.max()
    if largest - least <= 1e-5 * largest:  # what rounding leaves of a flat spectrum
        return np.full_like(values, float(largest > 0))
    return (values - least) / (largest - least)


def _threshold(values: Array, reduction: float) -> float:
    """The largest of the values that has at most the share `reduction` of them below itself."""
    return float(np.sort(values)[min(int(reduction * len(values) + 1e-9), len(values) - 1)])


recipe(
    "welore",
    PAPER,
    summary="WeLore: ranks by one threshold on normalised singular values; maps with flat spectra are kept.",
    measure="",
    planner="welore",
    rewrite="svd",
    deviations=("see the planner welore; without training",),
)
