"""Layer-wise quantization: which blocks get the high bits, by what they do to the stream (LIM) or by weights (ZD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import REWRITES, measure, planner, recipe
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.tally import PerToken

PAPER = Paper(
    key="dumitru2024layerwise",
    title="Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels",
    authors=(
        "Razvan-Gabriel Dumitru",
        "Vikas Yadav",
        "Rishabh Maheshwary",
        "Paul-Ioan Clotan",
        "Sathwik Tejaswi Madhusudhan",
        "Mihai Surdeanu",
    ),
    year=2024,
    arxiv="2406.17415",
)

PIECE = 1 << 20
"""Weights that are taken to float64 at once."""


@measure(
    "lim",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=("the cosine is taken per token and then averaged; the paper's order of the two is inferred",),
)
@dataclass(frozen=True, kw_only=True)
class LayerInputModification:
    """Layer Input Modification: minus the cosine of a block's input and output, averaged over tokens.

    -1 for a block that passes its input on, 0 where the output is orthogonal to it, 1 where it points the other way.
    """

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy) -> PerToken:
        """Token means of minus the cosine."""
        from lamina.lab.tally import PerToken

        return PerToken(self.card.name, self.card.on, lambda taps: -taps.cosine)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


@measure(
    "zd",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.NOTHING,
    deviations=(
        "the score is minus the share, so that higher means keep: the paper keeps blocks with a small share",
        "a block's weights are its matrices; that norms and biases stay out is inferred",
        "z is signed, which is inferred from second-hand accounts; the option two_sided takes its size",
    ),
)
@dataclass(frozen=True, kw_only=True)
class ZScoreDistribution:
    """Minus the share of a block's weights whose z-score, among all weights of the block, is above `threshold`.

    z = (w - mean) / standard deviation; `two_sided` counts |z|. Gaussian weights score -0.1587.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_identity_block_is_lowest": "weights that are all zero have no outliers, and few outliers mean important"
    }

    threshold: float = 1.0
    two_sided: bool = False

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, not {self.threshold:g}")

    def measure(self, lab: Lab) -> Scores:
        """Reads the weights, nothing else."""
        from lamina.core.scores import Scores

        parameters = dict(lab.model.named_parameters())
        values, missing = {}, {}
        for site in lab.anatomy.of_kind(Kind.BLOCK):
            matrices = [p.detach() for t in lab.anatomy.ties(site) if (p := parameters[t.param]).ndim > 1]
            if matrices:
                values[site.id] = np.array([-self._share(matrices)])
            else:
                missing[site.id] = "it has no matrices of its own"
        return Scores(measure=self.card.name, values=values, missing=missing)

    def _share(self, matrices: list[Tensor]) -> float:
        count = sum(m.numel() for m in matrices)
        mean = sum(float(w.sum()) for w in _pieces(matrices)) / count
        deviation = (sum(float((w - mean).square().sum()) for w in _pieces(matrices)) / count) ** 0.5
        if deviation == 0:
            return 0.0
        above = 0
        for w in _pieces(matrices):
            z = (w - mean) / deviation
            above += int(((z.abs() if self.two_sided else z) > self.threshold).sum())
        return above / count


def _pieces(matrices: list[Tensor]) -> Iterator[Tensor]:
    """All weights as float64 vectors that stay in cache."""
    for matrix in matrices:
        for piece in matrix.flatten().split(PIECE):
            yield piece.double()


ROUNDS = "the check counts what dropping frees, and takes budgets of parameters, blocks and sublayers; here bytes alone"


@planner(
    "layerwise-bits",
    PAPER,
    on=Kind.BLOCK,
    deviations=(
        "levels are GGUF types, Q8_0 and Q4_0 if not told, where the paper takes 8 and 4, or 4 and 2 bits of one grid",
        "the number of blocks at the lower level is what the budget of bytes asks for, and no setting",
        "of a map that neither level fits, the weights stay as they are",
    ),
)
@dataclass(frozen=True, kw_only=True)
class LayerwiseBits:
    """All maps of the blocks of highest score at the type `high`, those of the others at `low`, by `rewrite`.

    As few blocks are at `low` as the budget of bytes allows; of equal scores the first go there first. What is
    protected is not rounded. A map that the type of its level does not fit gets the other one.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "check_budget_is_met_and_not_overshot",
            "check_planner_is_deterministic",
            "check_ties_go_in_depth_order",
            "check_steps_are_explicit",
            "check_planner_leaves_the_model_untouched",
            "check_planner_takes_every_model",
        ),
        ROUNDS,
    )

    high: str = "Q8_0"
    low: str = "Q4_0"
    rewrite: str = "round"

    def __post_init__(self) -> None:
        from lamina.maths.grids import GRIDS

        for name in (self.high, self.low):
            if name not in GRIDS:
                raise ValueError(f"no type is named {name!r}: {', '.join(GRIDS)}")
        if GRIDS[self.high].bits_per_weight <= GRIDS[self.low].bits_per_weight:
            raise ValueError(f"high has more bits than low, and {self.high} has not more than {self.low}")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """A step for each level. Raises InputError for a budget of something else, and one that `low` does not meet."""
        from lamina.planners._target import Target

        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        if budget.metric != "bytes":
            what = f"fewer bits free no {budget.metric}"
            raise InputError(what, hint="budget: {metric: bytes, keep: 0.3}")
        if scores is None or any(b not in scores.values for b in target.blocks):
            raise InputError("no scores of all blocks", where=self.card.name, hint="take the measure lim or zd")
        order = sorted(target.blocks, key=lambda b: float(scores.values[b].mean()))
        maps = {
            b: {s.id: fits for s in anatomy.linears(b) if (fits := self._levels(anatomy, s.id, target.protected))}
            for b in order
        }
        freed = 0
        for count in range(len(order) + 1):
            steps = self._steps(anatomy, [(maps[b], n < count) for n, b in enumerate(order)])
            freed = sum(int(s.why["bytes"]) for s in steps)
            if freed >= target.need:
                return steps
        raise target.refuse(freed)

    def _levels(self, anatomy: Anatomy, site: str, protected: frozenset[str]) -> tuple[str, ...]:
        """The types that fit a map, the lower first; none where it is protected."""
        if any(site.startswith(f"{s}.") for s in protected):
            return ()
        method = REWRITES.make(self.rewrite)
        tried = {t: Step(rewrite=self.rewrite, sites=(site,), options={"type": t}) for t in (self.low, self.high)}
        return tuple(t for t, step in tried.items() if not method.check(step, anatomy))

    def _steps(self, anatomy: Anatomy, blocks: Sequence[tuple[Mapping[str, Sequence[str]], bool]]) -> tuple[Step, ...]:
        """A step for each level: of each block its maps with what fits them, and whether it is at the lower one."""
        method, found = REWRITES.make(self.rewrite), list[Step]()
        for kind in (self.high, self.low):
            sites = {s for maps, low in blocks for s, fits in maps.items() if fits[0 if low else -1] == kind}
            step = Step(
                rewrite=self.rewrite,
                sites=tuple(s.id for s in anatomy.linears() if s.id in sites),
                options={"type": kind},
            )
            if sites:
                less = (anatomy.total() - method.forecast(step, anatomy)).bytes
                found.append(Step(rewrite=step.rewrite, sites=step.sites, options=step.options, why={"bytes": less}))
        return tuple(found)


for _measure, _how in (
    ("lim", "the turn that they give the stream"),
    ("zd", "their share of weights far above the mean"),
):
    recipe(
        f"layerwise-bits-{_measure}",
        PAPER,
        summary=f"Layer-wise quantization: maps at two levels of bits, blocks ranked by {_how}.",
        measure=_measure,
        planner="layerwise-bits",
        rewrite="round",
    )
