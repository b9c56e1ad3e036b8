"""ASVD: channels that are often large count more."""

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
    key="yuan2023asvd",
    title="ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    authors=("Zhihang Yuan", "Yuzhang Shang", "Yue Song", "Dawei Yang", "Qiang Wu", "Yan Yan", "Guangyu Sun"),
    year=2023,
    arxiv="2312.05821",
)


@rewrite(
    "asvd",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    status="stable",
    deviations=("ranks are the plan's: the paper searches them by the perplexity of each map cut alone",),
)
@dataclass(frozen=True, kw_only=True)
class Asvd(Factorise):
    """W as B A, the best of rank `options["rank"]` by ‖(W - B A) S‖, S = diag((mean |x|)^`alpha`)."""

    card: ClassVar[Card]
    informed: ClassVar[bool] = True

    alpha: float = 0.5

    def scaling(self, weight: Tensor, moment: Tensor, size: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The diagonal and its inverse; a channel that is never used gets the least of the others' scales."""
        scale = (size / tokens) ** self.alpha
        used = scale > 0
        scale = scale.where(used, scale[used].min() if bool(used.any()) else 1.0)
        return scale, 1 / scale

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries."""
        return examples("asvd", anatomy)
