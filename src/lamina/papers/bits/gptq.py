"""GPTQ: weights are rounded input by input, and those still to come make up for each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.documents import Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Kind
from lamina.rewrites.quantise import Quantise, examples

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.maths.grids import AnyGrid

PAPER = Paper(
    key="frantar2023gptq",
    title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    authors=("Elias Frantar", "Saleh Ashkboos", "Torsten Hoefler", "Dan Alistarh"),
    year=2023,
    arxiv="2210.17323",
)


@rewrite(
    "gptq",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "inputs are those of the network as it was: the paper shows each block what the rounded ones before it give",
        "grids are GGUF's, 16 or 32 inputs to a step: the paper takes one per row, or groups with whole zero points",
        "inputs go in their own order: sorted by the moment's diagonal, as the code can, blocks would not be runs",
        "inputs that are never used keep their weights, rounded to nearest: the code sets them to zero",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Gptq(Quantise):
    """Weights on a grid with the least ‖(W - W') X‖ that one pass over the inputs finds (OBQ in a fixed order).

    `damping` raises the diagonal of X Xᵀ by that share of its mean.
    """

    card: ClassVar[Card]
    informed: ClassVar[bool] = True

    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], not {self.damping}")

    def rounded(self, weight: Tensor, grid: AnyGrid, dtype: torch.dtype, moment: Tensor | None, tokens: int) -> Tensor:
        """Input by input, by the inverse moment's Cholesky factor."""
        from lamina.maths.grids import compensated

        assert moment is not None
        return compensated(weight, moment, grid, dtype, self.damping)

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries."""
        return examples("gptq", anatomy)
