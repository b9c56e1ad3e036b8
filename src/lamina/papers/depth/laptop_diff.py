"""LAPTOP-Diff: a layer matters by how far the network's output moves without it; such losses nearly add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.per_trial import PerTrial

PAPER = Paper(
    key="zhang2024laptopdiff",
    title="LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models",
    authors=("Dingkun Zhang", "Sijia Li", "Chen Chen", "Qingsong Xie", "Haonan Lu"),
    year=2024,
    arxiv="2404.11098",
)


def _squares(dense: Tensor, thinned: Tensor) -> Tensor:
    """Mean squared difference of each row's features."""
    return (thinned - dense).square().mean(-1)


@measure(
    "output-mse",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.ABLATION,
    status="stable",
    deviations=(
        "the output is the model's own on the text: logits, or last hidden states where it has no head; the paper's is "
        "the noise that a diffusion model predicts",
    ),
)
@dataclass(frozen=True, kw_only=True)
class OutputMSE:
    """Keep what moves the output: the mean squared difference of the outputs with and without the site."""

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy) -> PerTrial:
        """Means over positions and features, from the shared sweep."""
        from lamina.lab.per_trial import PerTrial, over_outputs

        return PerTrial(self.card.name, self.card.on, lambda trial: over_outputs(trial, _squares))

    def measure(self, lab: Lab) -> Scores:
        """One partial forward per block and sublayer."""
        return lab.sweep([self.tally(lab.anatomy)])[0]
