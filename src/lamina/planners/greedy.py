"""Greedy with a judge: what really costs least goes, and all is priced anew."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from lamina.core.documents import Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import planner, recipe
from lamina.core.sites import SUBLAYERS, Kind, depth_key

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.core.scores import Scores
    from lamina.lab.bench import Bench
    from lamina.planners._target import Target

SLEB = Paper(
    key="song2024sleb",
    title="SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
    authors=("Jiwon Song", "Kyungseok Oh", "Taesu Kim", "Hyungjun Kim", "Yulhwa Kim", "Jae-Joon Kim"),
    year=2024,
    arxiv="2402.09025",
)


@planner("greedy", SLEB, on=(Kind.BLOCK, *sorted(SUBLAYERS)), needs=Need.ABLATION, status="stable")
@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Drop, again and again, the site with the least rise of the judge's metric per unit of the budget.

    `kinds`: what may go at once (blocks by default). `metric`: "kl" from the dense model, "js" or "loss". `per`:
    "budget" divides the rise by what the site frees, "site" does not. `edges` blocks at either end of each stack
    stay. With a divergence, the scores decide only in which order candidates are tried: what can't win any more is
    given up early, without changing the choice. In each round only the `shortlist` candidates that were cheapest when
    last priced are judged, and those beside a gap, since a gap makes its neighbours cheaper (0: all); in the first
    round four times as many, by their scores. The judge hears the first `length` tokens of `sequences` of the text,
    `batch_size` sequences at once.
    """

    metric: str = "kl"
    per: Literal["budget", "site"] = "budget"
    kinds: tuple[Kind, ...] = (Kind.BLOCK,)
    edges: int = 0
    shortlist: int = 3
    sequences: int = 8
    length: int = 256
    batch_size: int = 2
    margin: float | None = 0.15

    card: ClassVar[Card]

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step per site, in the order of dropping."""
        from lamina.planners._target import Target, required

        bench = required(bench, self.card.name)
        target = Target(budget, anatomy)
        judge = bench.judge(self.metric, sequences=self.sequences, length=self.length, batch_size=self.batch_size)
        hint = {u: scores[u] for u in target.units(self.kinds) if scores is not None and u in scores}
        gone: list[str] = []
        steps: list[Step] = []
        while not target.met(gone):
            options = self._options(target, gone)
            if not options:
                raise target.refuse(target.amount(gone))
            worth = {u: hint[u] / self._weight(target, gone, u) for u in options if u in hint}
            options = self._listed(options, worth, gone, anatomy)
            judge.rebase(gone)
            weights = [self._weight(target, gone, u) for u in options]
            order = [hint.get(u, 0.0) / w for u, w in zip(options, weights, strict=True)]
            place, value = judge.least(options, weights=weights, hint=order, margin=self.margin)
            site = options[place]
            before = judge.value(judge.base)
            found = {u: judge.estimates.get(judge.base | anatomy.expand([u])) for u in options}
            hint.update({u: v - before for u, v in found.items() if v is not None})
            gone.append(site)
            steps.append(Step(rewrite="drop", sites=(site,), why={self.metric: value, "rise": value - before}))
            bench.note()
            bench.lab.progress("plan", min(target.amount(gone), target.need), target.need)
        return tuple(steps)

    def _listed(self, options: list[str], worth: dict[str, float], gone: list[str], anatomy: Anatomy) -> list[str]:
        """The options that are judged, in depth order."""
        if not self.shortlist or not worth:
            return options
        count = self.shortlist if gone else 4 * self.shortlist
        order = [x.site.id for k in anatomy.stacks for b in k.blocks for x in b.branches]
        covered = anatomy.expand(gone)
        beside = {s for s, t in pairwise(order) if t in covered} | {t for s, t in pairwise(order) if s in covered}
        cheap = sorted(options, key=lambda u: worth.get(u, math.inf))[:count]
        near = [u for u in options if anatomy.expand([u]) & beside]
        return sorted({*cheap, *near}, key=depth_key)

    def _weight(self, target: Target, gone: list[str], site: str) -> float:
        """What the site frees, in the budget's unit, as far as it is still needed; 1 where all count the same."""
        if self.per == "site":
            return 1.0
        before = target.amount(gone)
        return float(min(target.amount([*gone, site]) - before, target.need - before))

    def _options(self, target: Target, gone: list[str]) -> list[str]:
        """What may still go and helps, in depth order."""
        covered = target.anatomy.expand(gone)
        ends = {
            b.site.id
            for k in target.anatomy.stacks
            for b in (*k.blocks[: self.edges], *k.blocks[len(k.blocks) - self.edges :])
        }
        return [
            u
            for u in target.units(self.kinds)
            if target.anatomy.block(u).site.id not in ends
            and not target.anatomy.expand([u]) <= covered
            and target.allowed([*gone, u])
            and target.amount([*gone, u]) > target.amount(gone)
        ]


recipe(
    "sleb",
    SLEB,
    summary="SLEB: greedy over blocks by the loss; the first and the last stay.",
    measure="",
    planner="greedy",
    planner_options={"metric": "loss", "per": "site", "edges": 1, "shortlist": 0, "margin": None},
    kinds=(Kind.BLOCK,),
    status="stable",
)
recipe(
    "default",
    SLEB,
    summary="Greedy over blocks by the divergence from the dense model, then a closed-form refit of what stays.",
    measure="damage",
    measure_options={"sequences": 8, "length": 256},
    planner="greedy",
    kinds=(Kind.BLOCK,),
    refit=True,
    status="stable",
    deviations=(
        "KL from the dense model per parameter, not the loss",
        "the maps from the first gap on are refitted (see the rewrite refit)",
    ),
)
