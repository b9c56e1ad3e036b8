"""FinerCut: greedily take out the sublayer whose absence changes the output distribution least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.documents import Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, planner, recipe
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.per_trial import PerTrial, Sums
    from lamina.lab.trials import Trial

PAPER = Paper(
    key="zhang2024finercut",
    title="FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models",
    authors=(
        "Yang Zhang",
        "Yawei Li",
        "Xinpeng Wang",
        "Qianli Shen",
        "Barbara Plank",
        "Bernd Bischl",
        "Mina Rezaei",
        "Kenji Kawaguchi",
    ),
    year=2024,
    arxiv="2405.18218",
)


@planner("finercut", PAPER, on=tuple(sorted(SUBLAYERS)), needs=Need.ABLATION, status="stable")
@dataclass(frozen=True, kw_only=True)
class FinerCut:
    """Drop, again and again, the sublayer whose absence moves the logits least from the dense model's (alg. 1).

    `metric`: "js-reversed" (what the paper's code computes), "js" (the textbook's) or "kl". `early` protects that share
    of the blocks from the front until that share of all sublayers has gone. The judge
    hears the first `length` tokens of `sequences` of the text, `batch_size` sequences at once.
    """

    card: ClassVar[Card]

    metric: str = "js-reversed"
    early: float = 0.0
    sequences: int = 10
    length: int = 256
    batch_size: int = 2
    kinds: tuple[Kind, ...] = ()

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step per sublayer, in the order of dropping; equal to the double loop over all candidates."""
        from lamina.planners._target import Target, required

        bench = required(bench, self.card.name)
        target = Target(budget, anatomy)
        judge = bench.judge(self.metric, sequences=self.sequences, length=self.length, batch_size=self.batch_size)
        protected, until = self._early(anatomy)
        gone: list[str] = []
        steps: list[Step] = []
        last: dict[str, float] = {}
        while not target.met(gone):
            shielded = protected if len(gone) < until else frozenset[str]()
            options = [u for u in target.units(self.kinds) if u not in gone and target.allowed([*gone, u])]
            options = [u for u in options if u not in shielded]
            if not options:
                raise target.refuse(target.amount(gone))
            judge.rebase(gone)
            place, value = judge.least(options, hint=[last.get(u, 0.0) for u in options])
            site = options[place]
            last.update({u: v for u in options if (v := judge.estimates.get(judge.base | {u})) is not None})
            gone.append(site)
            steps.append(Step(rewrite="drop", sites=(site,), why={"divergence": value}))
            bench.note()
            bench.lab.progress("plan", min(target.amount(gone), target.need), target.need)
        return tuple(steps)

    def _early(self, anatomy: Anatomy) -> tuple[frozenset[str], int]:
        """Sublayers that stay at first, and how many others must go before these may (both as the code counts)."""
        if not self.early:
            return frozenset(), 0
        blocks = anatomy.of_kind(Kind.BLOCK)
        first = blocks[: int(len(blocks) * self.early) + 1]
        return anatomy.expand(s.id for s in first), int(len(anatomy.sublayers) * self.early) + 1


METRICS = ("js-reversed", "js", "kl")


@measure(
    "output-divergence",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.ABLATION,
    status="stable",
    deviations=(
        "the mean is over positions; the code divides by the vocabulary's size too, which changes no order",
        "blocks are scored beside sublayers",
    ),
)
@dataclass(frozen=True, kw_only=True)
class OutputDivergence:
    """Keep what changes the output distribution: its divergence without the site, all sites scored once.

    `metric`: "js-reversed" (what the paper's code computes), "js" (the textbook's) or "kl"; nats per position.
    """

    card: ClassVar[Card]

    metric: str = "js-reversed"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric is one of {', '.join(METRICS)}, not {self.metric!r}")

    def tally(self, anatomy: Anatomy) -> PerTrial:
        """Means over positions, from the shared sweep."""
        from lamina.lab.per_trial import OutputKL, PerTrial, expect_distributions, over_outputs
        from lamina.maths import divergence

        compare = {"js-reversed": divergence.js_reversed, "js": divergence.js}.get(self.metric)

        def score(trial: Trial) -> Sums:
            expect_distributions(trial)
            return over_outputs(trial, compare)  # type: ignore[arg-type]

        return PerTrial(self.card.name, self.card.on, OutputKL() if compare is None else score)

    def measure(self, lab: Lab) -> Scores:
        """One partial forward per block and sublayer."""
        return lab.sweep([self.tally(lab.anatomy)])[0]


recipe(
    "finercut",
    PAPER,
    summary="FinerCut: greedy over sublayers by the divergence of the logits.",
    measure="",
    planner="finercut",
    status="stable",
    deviations=("ties go to the earlier site in depth order (the code: in order of names)",),
)
