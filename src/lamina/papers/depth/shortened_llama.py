"""Shortened LLaMA's perplexity criterion: a site matters by how much the loss rises without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, recipe
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from lamina.core.scores import Scores
    from lamina.lab import Lab

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

    With prefix reuse, so half the block evaluations of the naive loop. `batch_size` sequences are run at once.
    """

    card: ClassVar[Card]

    batch_size: int = 4

    def measure(self, lab: Lab) -> Scores:
        """One partial forward per block and sublayer."""
        import numpy as np

        from lamina.core.scores import Scores
        from lamina.lab import Judge

        judge = Judge(lab, "loss", batch_size=self.batch_size)
        judge.rebase(())
        sites = [s for s in lab.anatomy.sites if s.kind in self.card.on]
        values, errors = {}, {}
        for done, site in enumerate(sites):
            rise = judge.rises([site.id])
            values[site.id], errors[site.id] = np.atleast_1d(rise.value), np.atleast_1d(rise.stderr)
            lab.progress("leave one out", done + 1, len(sites))
        return Scores(measure=self.card.name, values=values, stderr=errors, unit="nats")


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
