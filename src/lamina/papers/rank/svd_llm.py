"""SVD-LLM: whitened inputs, so that what a cut of singular values costs is their own size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.documents import Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Kind
from lamina.rewrites.factorise import Factorise, examples

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy

PAPER = Paper(
    key="wang2025svdllm",
    title="SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    authors=("Xin Wang", "Yu Zheng", "Zhongwei Wan", "Mi Zhang"),
    year=2025,
    arxiv="2403.07378",
)


@rewrite(
    "svd-llm",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "B spans the first eigenvectors U of W S Sᵀ Wᵀ, A is Uᵀ W: the same product, without a Cholesky factor",
        "maps behind are not fitted anew to the inputs that the cut ones give them",
    ),
)
@dataclass(frozen=True, kw_only=True)
class SvdLlm(Factorise):
    """W as B A, the best of rank `options["rank"]` for the outputs: least ‖(W - B A) X‖, S Sᵀ = X Xᵀ."""

    card: ClassVar[Card]
    informed: ClassVar[bool] = True

    def factored(self, weight: Tensor, rank: int, seen: tuple[Tensor, Tensor, int] | None) -> tuple[Tensor, Tensor]:
        """A and B from the eigenvectors of W X Xᵀ Wᵀ."""
        from lamina.maths.whitening import leading

        return super().factored(weight, rank, None) if seen is None else leading(weight, seen[0], rank)

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries."""
        return examples("svd-llm", anatomy)
