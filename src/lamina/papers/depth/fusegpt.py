"""FuseGPT: a block matters by how far the last block's output turns when it is gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.per_trial import PerTrial

PAPER = Paper(
    key="pei2024fusegpt",
    title="FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers",
    authors=("Zehua Pei", "Hui-Ling Zhen", "Xianzhi Yu", "Sinno Jialin Pan", "Mingxuan Yuan", "Bei Yu"),
    year=2024,
    arxiv="2411.14507",
)


@measure(
    "macro-influence",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.ABLATION,
    status="stable",
    deviations=("in a model of several stacks, the last block is that of the block's own stack",),
)
@dataclass(frozen=True, kw_only=True)
class MacroInfluence:
    """Keep blocks whose absence turns the end: 1 - cos of the last block's outputs with and without the block.

    The mean over tokens, before the final norm.
    """

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy) -> PerTrial:
        """Token means, from the shared sweep."""
        from lamina.lab.per_trial import PerTrial, over_states, turned

        return PerTrial(self.card.name, self.card.on, lambda trial: over_states(trial, trial.blocks[-1], turned))

    def measure(self, lab: Lab) -> Scores:
        """One partial forward per block."""
        return lab.sweep([self.tally(lab.anatomy)])[0]
