"""WeLore: one threshold on all maps' normalised singular values gives each map its own rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.core.scores import Array, Scores
    from lamina.lab import Lab

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
            spectra.append(_normalised(singular_values(weight).cpu().numpy()))
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


def _normalised(values: Array) -> Array:
    """Between 0 for the least and 1 for the largest; all 1 where they are alike, all 0 where they are zero."""
    least, largest = values.min(), values.max()
    if largest - least <= 1e-5 * largest:  # what rounding leaves of a flat spectrum
        return np.full_like(values, float(largest > 0))
    return (values - least) / (largest - least)


def _threshold(values: Array, reduction: float) -> float:
    """The largest of the values that has at most the share `reduction` of them below itself."""
    return float(np.sort(values)[min(int(reduction * len(values) + 1e-9), len(values) - 1)])
