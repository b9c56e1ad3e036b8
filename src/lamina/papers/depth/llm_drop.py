"""LLM-Drop: sublayers whose output points where their input pointed can go; attentions more than MLPs."""

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
    from lamina.lab.tally import PerToken

PAPER = Paper(
    key="he2024matters",
    title="What Matters in Transformers? Not All Attention is Needed",
    authors=("Shwai He", "Guoheng Sun", "Zheyu Shen", "Ang Li"),
    year=2024,
    arxiv="2406.15786",
)


@measure("cosine", PAPER, on=(Kind.BLOCK, *sorted(SUBLAYERS)), needs=Need.FORWARD, status="stable")
@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Keep what turns the stream: 1 - cos(x, x + f(x)), averaged over tokens, norm and residual inside (eq. 1-2)."""

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy) -> PerToken:
        """Token means of 1 - cos, for blocks and sublayers alike."""
        from lamina.lab.tally import PerToken

        return PerToken(self.card.name, self.card.on, lambda taps: 1 - taps.cosine)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


MODES = {
    "block": ((Kind.BLOCK,), "whole blocks"),
    "attention": ((Kind.ATTENTION,), "attentions"),
    "mlp": ((Kind.MLP, Kind.MOE), "MLPs"),
    "joint": ((Kind.ATTENTION, Kind.MLP, Kind.MOE), "attentions and MLPs, ranked together"),
}
for mode, (kinds, words) in MODES.items():
    recipe(
        f"llm-drop-{mode}",
        PAPER,
        summary=f"LLM-Drop on {words}: the least turning ones go, scored once.",
        measure="cosine",
        planner="lowest",
        kinds=kinds,
        status="stable",
    )
    recipe(
        f"llm-drop-{mode}-iterative",
        PAPER,
        summary=f"LLM-Drop on {words}: one goes, the rest is scored anew.",
        measure="cosine",
        planner="lowest",
        planner_options={"rescore": 1},
        kinds=kinds,
        status="stable",
        deviations=("a block that lost one sublayer runs the other when scoring (the code skips the whole block)",),
    )
