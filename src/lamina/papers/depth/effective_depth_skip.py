"""Do Language Models Use Their Depth Efficiently: what later layers do differently when one layer is skipped."""

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
    from lamina.core.scores import Array, Grid, Scores
    from lamina.lab import Lab
    from lamina.lab.rows import Keys, Rows
    from lamina.lab.trials import Trial

PAPER = Paper(
    key="csordas2025depth",
    title="Do Language Models Use Their Depth Efficiently?",
    authors=("Róbert Csordás", "Christopher D. Manning", "Christopher Potts"),
    year=2025,
    arxiv="2505.13898",
)
REDUCTIONS = ("mean", "max")


@measure(
    "skip-effect",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.ABLATION,
    status="stable",
    deviations=(
        "a block is skipped at all tokens; the paper's code leaves the first one as it is, here it is left out of the "
        "maximum alone",
        "the paper draws the map; a block is scored by the mean (or maximum) of its row and its effect on the output",
        "where outputs are vectors, the effect on them is relative to their norm",
    ),
)
@dataclass(frozen=True, kw_only=True)
class SkipEffect:
    """Keep blocks that later blocks build on: how far their updates move, relative to their size, when it is skipped.

    E[s, l] = max over tokens of ‖u_l - ū_l‖ / max(‖u_l‖, 1e-6) with u_l what block l adds, ū_l what it adds without
    block s; and of the output, max ‖softmax - softmax without s‖. The score is their mean, or maximum, over l > s and
    the output, by `reduce`. `first`: the first token of a sequence counts too. Grid `effects`: E and the output's.
    """

    card: ClassVar[Card]

    reduce: str = "mean"
    first: bool = False

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "the error of a maximum is no square root: text that repeats itself has none"
    }

    def __post_init__(self) -> None:
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce is one of {', '.join(REDUCTIONS)}, not {self.reduce!r}")

    def tally(self, anatomy: Anatomy) -> Effects:
        """Maxima of every sequence, from the shared sweep."""
        return Effects(self.card.name, self.reduce, self.first)

    def measure(self, lab: Lab) -> Scores:
        """One partial forward per block."""
        return lab.sweep([self.tally(lab.anatomy)])[0]


class Effects:
    """Of each skipped block and sequence, the largest effects on all later blocks and on the output."""

    kinds = (Kind.BLOCK,)

    def __init__(self, measure: str, reduce: str, first: bool) -> None:
        self.measure, self.reduce, self.first = measure, reduce, first
        self.blocks: dict[str, tuple[str, ...]] = {}
        self.owners: dict[str, Keys] = {}
        self.maxima: dict[str, Array] = {}

    def add(self, site: Site, trial: Trial) -> None:
        """Take in one skipped block on one batch."""
        import torch

        front = 0 if self.first else 1
        effects = [*_updates(site, trial, front), _output(trial, front)]
        found = torch.stack(effects, 1).cpu().numpy()
        self.blocks[site.id] = trial.blocks
        self._append(site.id, trial.rows.owners, found)

    def _append(self, site: str, owners: Keys, found: Array) -> None:
        known = site in self.maxima
        self.owners[site] = np.concatenate([self.owners[site], owners]) if known else owners
        self.maxima[site] = np.concatenate([self.maxima[site], found]) if known else found

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(self.measure, self.reduce, self.first)
        for part in (self, other):
            both.blocks |= part.blocks
            for site in part.maxima:
                both._append(site, part.owners[site], part.maxima[site])
        return both

    def scores(self) -> Scores:
        """Reduced effects, [1] per block; errors by the jackknife over sequences."""
        from lamina.core.scores import Scores
        from lamina.maths.jackknife import jackknife

        reduce = np.mean if self.reduce == "mean" else np.max
        values, errors = {}, {}
        for site, maxima in self.maxima.items():
            ordered = maxima[np.argsort(self.owners[site], kind="stable")]
            value, error = jackknife(lambda rows, m=ordered: reduce(m[rows].max(0)), range(len(ordered)))
            values[site], errors[site] = np.atleast_1d(value), np.atleast_1d(error)
        return Scores(measure=self.measure, values=values, stderr=errors, grids=self._grids())

    def _grids(self) -> dict[str, Grid]:
        from lamina.core.scores import Grid

        grids = {}
        for blocks in dict.fromkeys(self.blocks.values()):
            effects = np.zeros((len(blocks), len(blocks) + 1))
            for number, block in enumerate(blocks):
                effects[number, number + 1 :] = self.maxima[block].max(0)
            name = f"{blocks[0].rpartition('block.')[0]}effects"
            grids[name] = Grid(values=effects, rows=blocks, columns=(*blocks, "output"))
        return grids


def _updates(site: Site, trial: Trial, front: int) -> list[Tensor]:
    """The largest relative change of what each later block adds, [sequences] each, float64."""
    from lamina.lab.per_trial import rows_at

    place = trial.blocks.index(site.id)
    before = trial.states(site.id)
    rows = rows_at(trial, site.id)
    found = []
    for block in trial.blocks[place + 1 :]:
        behind = trial.states(block)
        update = behind[0] - before[0]
        moved = (update - (behind[1] - before[1])).norm(dim=-1)
        found.append(_largest(moved / update.norm(dim=-1).clamp_min(1e-6), rows, front))
        before = behind
    return found


def _output(trial: Trial, front: int) -> Tensor:
    """The largest change of the output, [sequences], float64."""
    from lamina.lab.per_trial import compared

    vectors = trial.objective.name == "output"
    rows, values = compared(trial, _moved if vectors else _shifted)
    return _largest(values, rows, front)


def _moved(dense: Tensor, thinned: Tensor) -> Tensor:
    return (dense - thinned).norm(dim=-1) / dense.norm(dim=-1).clamp_min(1e-30)


def _shifted(dense: Tensor, thinned: Tensor) -> Tensor:
    return (dense.softmax(-1) - thinned.softmax(-1)).norm(dim=-1)


def _largest(values: Tensor, rows: Rows, front: int) -> Tensor:
    import torch

    from lamina.lab.sampled import behind

    kept = torch.where(behind(rows, front).to(values.device), values.double(), 0.0)
    zero = torch.zeros(rows.sequences, dtype=torch.float64, device=values.device)
    return zero.scatter_reduce(0, rows.sequence.to(values.device), kept, "amax")
