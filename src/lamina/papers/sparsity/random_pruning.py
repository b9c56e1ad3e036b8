"""Random pruning: only how many weights of each map go is chosen with care, which ones is left to chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Paper
from lamina.core.registry import planner, rewrite
from lamina.core.sites import Kind
from lamina.planners._density import DROPS, FAILS, asked
from lamina.rewrites.sparsify import Given, Sparsify, examples

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Scores
    from lamina.lab.bench import Bench

PAPER = Paper(
    key="liu2022random",
    title="The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
    authors=(
        "Shiwei Liu",
        "Tianlong Chen",
        "Xiaohan Chen",
        "Li Shen",
        "Decebal Constantin Mocanu",
        "Zhangyang Wang",
        "Mykola Pechenizkiy",
    ),
    year=2022,
    arxiv="2202.02643",
)
TRAINED = "the weights are those of a trained network; the paper trains sparse networks from the start"


@rewrite(
    "random",
    PAPER,
    on=Kind.LINEAR,
    status="stable",
    deviations=(TRAINED, "exactly int(n · sparsity) of a map's n weights go; the code draws each weight by itself"),
)
@dataclass(frozen=True, kw_only=True)
class RandomMask(Sparsify):
    """Set weights to zero that a random draw picks.

    The draw depends on the `seed` (None takes the lab's) and on the map. Zeros are stored like other weights.
    """

    card: ClassVar[Card]

    seed: int | None = None

    def sparse(self, given: Given) -> Tensor:
        """The weights without those of lowest random number."""
        import torch

        from lamina.lab.probes import noise_of

        noise = noise_of(given.site, "mask", given.seed if self.seed is None else self.seed)
        drawn = torch.rand(given.weight.shape, generator=noise, dtype=torch.float64).to(given.weight.device)
        return given.weight.masked_fill(given.lowest(drawn, rows=False), 0.0)

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries."""
        return examples("random", anatomy)


@planner("er", PAPER, on=Kind.LINEAR, deviations=(TRAINED,))
@dataclass(frozen=True, kw_only=True)
class Er:
    """Densities that go with (outputs + inputs) / (outputs · inputs) of a linear map: larger maps are sparser.

    The budget's `keep` of parameters is the share of weights that are not zero, over the linear maps of all blocks;
    protected ones stay dense and count. A map whose density would be above 1 stays dense. One step of the rewrite named
    `rewrite`. Reads no scores and no text.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(FAILS, DROPS)

    rewrite: str = "wanda"

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step over all maps that do not stay dense."""
        from lamina.maths.ratios import er

        wanted = asked(budget, anatomy)
        return wanted.steps(self.rewrite, er(wanted.shapes, wanted.density, wanted.dense)) if wanted else ()


@planner("erk", PAPER, on=Kind.LINEAR, deviations=(TRAINED,))
@dataclass(frozen=True, kw_only=True)
class Erk:
    """As `er`, with the ratio taken to a `power`: 0 is uniform, 1 the same as `er`, since linear maps have no kernel.

    The budget and the step are as with `er`.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(FAILS, DROPS)

    power: float = 1.0
    rewrite: str = "wanda"

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step over all maps that do not stay dense."""
        from lamina.maths.ratios import erk

        wanted = asked(budget, anatomy)
        if wanted is None:
            return ()
        ratios = erk(wanted.shapes, wanted.density, wanted.dense, power=self.power)
        return wanted.steps(self.rewrite, ratios)
