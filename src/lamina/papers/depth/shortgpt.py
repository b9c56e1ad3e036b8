"""ShortGPT: blocks that barely turn the hidden state can go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, recipe
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.tally import PerToken

PAPER = Paper(
    key="men2024shortgpt",
    title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    authors=(
        "Xin Men",
        "Mingyu Xu",
        "Qingyu Zhang",
        "Bingning Wang",
        "Hongyu Lin",
        "Yaojie Lu",
        "Xianpei Han",
        "Weipeng Chen",
    ),
    year=2024,
    arxiv="2403.03853",
)


@measure("block-influence", PAPER, on=Kind.BLOCK, needs=Need.FORWARD, status="stable")
@dataclass(frozen=True, kw_only=True)
class BlockInfluence:
    """Keep blocks by 1 - cos(input, output), averaged over tokens (eq. 1)."""

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy) -> PerToken:
        """Token means of 1 - cos over blocks, the last one's output taken before the final norm."""
        from lamina.lab.tally import PerToken

        return PerToken(self.card.name, self.card.on, lambda taps: 1 - taps.cosine)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


recipe(
    "shortgpt",
    PAPER,
    summary="ShortGPT: the blocks of least influence go, scored once.",
    measure="block-influence",
    planner="lowest",
    kinds=(Kind.BLOCK,),
    status="stable",
)
