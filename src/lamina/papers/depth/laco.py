"""LaCo: the layers behind collapse into one, by the differences of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Kind
from lamina.rewrites.merge import Merge

if TYPE_CHECKING:
    from torch import Tensor

PAPER = Paper(
    key="yang2024laco",
    title="LaCo: Large Language Model Pruning via Layer Collapse",
    authors=("Yifei Yang", "Zouying Cao", "Hai Zhao"),
    year=2024,
    arxiv="2402.11187",
)
FORMS = ("differences", "last")


@rewrite(
    "laco",
    PAPER,
    on=Kind.BLOCK,
    status="stable",
    deviations=("which blocks collapse is the plan's: the paper goes from the top down, by the outputs' cosine",),
)
@dataclass(frozen=True, kw_only=True)
class LaCo(Merge):
    """θ* = θ_l + Σ_k (θ_{l+k} - θ_l) of all linear maps of the run (eq. 2); the others are dropped.

    `form`: "last" takes the last block's maps with the first one's norms, which is what the released code computes: it
    adds each difference to a map that has changed already.
    """

    card: ClassVar[Card]

    form: str = "differences"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form is one of {', '.join(FORMS)}, not {self.form!r}")

    def combined(self, maps: Sequence[Tensor]) -> Tensor:
        """θ*, float64."""
        first = maps[0]
        return maps[-1] if self.form == "last" else first + sum(m - first for m in maps[1:])
