"""OWL: blocks with more outliers among their scores keep more of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.errors import InputError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import planner
from lamina.core.sites import Kind
from lamina.planners._density import DROPS, FAILS, asked
from lamina.rewrites.sparsify import InputPowers

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Scores
    from lamina.lab.bench import Bench

PAPER = Paper(
    key="yin2023owl",
    title="Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
    authors=(
        "Lu Yin",
        "You Wu",
        "Zhenyu Zhang",
        "Cheng-Yu Hsieh",
        "Yaqing Wang",
        "Yiling Jia",
        "Gen Li",
        "Ajay Jaiswal",
        "Mykola Pechenizkiy",
        "Yi Liang",
        "Michael Bendersky",
        "Zhangyang Wang",
        "Shiwei Liu",
    ),
    year=2023,
    arxiv="2310.05175",
)


@planner(
    "owl",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    deviations=(
        "the mean sparsity is weighted by parameters, so that the budget is met where blocks differ in size",
        "a sparsity is held within [0, 0.99], and the other blocks make up for it",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Owl:
    """A sparsity for each block: the more of its scores |w_ij| ‖x_j‖ exceed `threshold` times their mean, the lower.

    The budget's `keep` of parameters is the share of weights that are not zero, over the linear maps of all blocks;
    protected ones stay dense and count. The sparsities of two blocks differ by at most 2 · `spread`. One step of the
    rewrite named `rewrite`; one pass over the text.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(FAILS, DROPS)

    threshold: float = 5.0
    spread: float = 0.08
    rewrite: str = "wanda"

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold is above 0, not {self.threshold:g}")
        if not 0 <= self.spread < 0.5:
            raise ValueError(f"spread is at least 0 and below 0.5, not {self.spread:g}")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step over all maps that are not protected. Raises InputError where those can't carry the budget."""
        from lamina.maths.ratios import owl
        from lamina.planners._target import required

        lab = required(bench, self.card.name).lab
        wanted = asked(budget, anatomy)
        if wanted is None:
            return ()
        blocks = {b.site.id: [s.id for s in anatomy.linears(b.site)] for k in anatomy.stacks for b in k.blocks}
        free = {b: [s for s in maps if s not in wanted.dense] for b, maps in blocks.items()}
        sizes = {b: sum(wanted.sizes[s] for s in maps) for b, maps in free.items() if maps}
        zeros = (1 - wanted.density) * sum(wanted.sizes.values())
        if zeros >= sum(sizes.values()):
            raise InputError("the maps that are not protected are too small a part", hint="keep more, or protect less")
        seen = InputPowers(wanted.shapes)
        lab.stream([seen], "outliers", score=False)
        outliers = {b: outlier_share(anatomy, blocks[b], seen, self.threshold) for b in sizes}
        found = owl(outliers, zeros / sum(sizes.values()), self.spread, sizes)
        sparsity = dict.fromkeys(wanted.shapes, 0.0) | {s: found[b] for b in sizes for s in free[b]}
        return wanted.steps(self.rewrite, sparsity)


def outlier_share(anatomy: Anatomy, maps: Iterable[str], seen: InputPowers, threshold: float) -> float:
    """Percentage of the scores |w_ij| √(mean x_j²) of all these maps that are above `threshold` times their mean."""

    def scores(site: str) -> Tensor:
        powers, tokens = seen.of(site)
        return anatomy.weight(site).detach().double().abs() * (powers / tokens).sqrt()

    maps = tuple(maps)
    count = sum(anatomy.weight(s).numel() for s in maps)
    edge = threshold * sum(float(scores(s).sum()) for s in maps) / count
    return 100 * sum(int((scores(s) > edge).sum()) for s in maps) / count
