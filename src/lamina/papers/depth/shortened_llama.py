"""Shortened LLaMA's perplexity criterion: a site matters by how much the loss rises without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, recipe
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.per_trial import PerTrial

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


@measure("leave-one-out", PAPER, on=(Kind.BLOCK, *sorted(SUBLAYERS)), needs=Need.ABLATION, status="stable")
@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """The rise of the next-token loss, in nats, when the site alone is gone.

    Where the model predicts no tokens, what its output suffers else (see `lamina.lab.objective`).
    """

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy) -> PerTrial:
        """Means over positions, from the shared sweep."""
        from lamina.lab.per_trial import PerTrial, rise

        return PerTrial(self.card.name, self.card.on, rise, unit="damage")

    def measure(self, lab: Lab) -> Scores:
        """One partial forward per block and sublayer: half the block evaluations of the naive loop."""
        return lab.sweep([self.tally(lab.anatomy)])[0]


recipe(
    "leave-one-out",
    PAPER,
    summary="The sublayers whose absence alone costs least loss go, scored once.",
    measure="leave-one-out",
    planner="lowest",
    status="stable",
    deviations=("sublayers are ranked, not blocks alone", "loss, not perplexity: the order is the same"),
)
recipe(
    "leave-one-out-block",
    PAPER,
    summary="The blocks whose absence alone costs least loss go, scored once.",
    measure="leave-one-out",
    planner="lowest",
    kinds=(Kind.BLOCK,),
    status="stable",
    deviations=("no block is protected from the outset (the paper keeps the first four and the last two)",),
)
