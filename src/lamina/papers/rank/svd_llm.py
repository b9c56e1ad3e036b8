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
FLOOR = 1e-9
"""Eigenvalues of the moment are held above this share of the largest."""


@rewrite(
    "svd-llm",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "S is the moment's symmetric root and not a Cholesky factor: the same product B A, and no jitter",
        "maps behind are not fitted anew to the inputs that the cut ones give them",
    ),
)
@dataclass(frozen=True, kw_only=True)
class SvdLlm(Factorise):
    """W as B A, the best of rank `options["rank"]` for the outputs: least ‖(W - B A) X‖, S Sᵀ = X Xᵀ."""

    card: ClassVar[Card]
    informed: ClassVar[bool] = True

    def scaling(self, weight: Tensor, moment: Tensor, size: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The root of the moment and its inverse."""
        import torch

        values, vectors = torch.linalg.eigh(moment)
        roots = values.clamp_min(FLOOR * values[-1].clamp_min(1e-300)).sqrt()
        return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries."""
        return examples("svd-llm", anatomy)
