"""Wanda: a weight matters by its size times the norm of what it multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.documents import Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Kind
from lamina.rewrites.drop import Problem
from lamina.rewrites.sparsify import Given, Informed, examples

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy

PAPER = Paper(
    key="sun2023wanda",
    title="A Simple and Effective Pruning Approach for Large Language Models",
    authors=("Mingjie Sun", "Zhuang Liu", "Anna Bair", "J. Zico Kolter"),
    year=2023,
    arxiv="2306.11695",
)


@rewrite(
    "wanda",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "inputs are the dense network's unless in_turn, which prunes block by block as the paper does",
        "variant: the share of a row's sum is such that int(n · sparsity) of the map's n weights go; the code bisects "
        "it until the sparsity is within 0.001, and never takes more than 0.8",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Wanda(Informed):
    """Set to zero, of each output's weights, those of lowest |w_ij| ‖x_j‖; the others stay as they are.

    int(inputs · sparsity) of each output's go, or N of every M in a pattern. `variant`: outputs lose as many as add up
    to the same share of their sum of scores, and so not equally many. One pass over the text; `in_turn`: up to two.
    """

    card: ClassVar[Card]
    powers: ClassVar[bool] = True

    variant: bool = False

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        problems = super().check(step, anatomy)
        if not problems and "pattern" in step.options and self.told(step).variant:
            problems.append(Problem(step.rewrite, "the variant has no pattern", "tell a sparsity, or variant=False"))
        return problems

    def sparse(self, given: Given) -> Tensor:
        """The weights without those of lowest score."""
        assert given.second is not None
        scores = given.weight.abs() * (given.second / given.tokens).sqrt()
        if self.variant:
            return given.weight.masked_fill(given.lowest(_parts(scores), rows=False), 0.0)
        return given.weight.masked_fill(given.lowest(scores, rows=True), 0.0)

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries, one of them block by block."""
        return examples("wanda", anatomy, {}, {"variant": True}, {"in_turn": True})


def _parts(scores: Tensor) -> Tensor:
    """Which part of its row's sum a score and all lower ones are, in [0, 1]; 0 in a row of zeros."""
    import torch

    values, order = scores.sort(dim=1, stable=True)
    sums = values.cumsum(1) / values.sum(1, keepdim=True).clamp_min(1e-300)
    return torch.empty_like(scores).scatter_(1, order, sums)
