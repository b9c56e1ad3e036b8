"""The lowest scores go until the budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina.core.documents import Step
from lamina.core.registry import planner
from lamina.core.sites import Kind, depth_key

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.core.scores import Scores
    from lamina.lab.bench import Bench


@planner("lowest", status="stable")
@dataclass(frozen=True, kw_only=True)
class Lowest:
    """Drop the sites of lowest score, one by one, until the budget is met; ties in depth order.

    `rescore` = n scores anew after every n sites (0: never). `kinds` restricts what is ranked (none: all sublayers).
    """

    rescore: int = 0
    kinds: tuple[Kind, ...] = ()

    def plan(self, scores: Scores, budget: Budget, anatomy: Anatomy, bench: Bench | None = None) -> tuple[Step, ...]:
        """One step per site, in the order of dropping."""
        from lamina.planners._target import Target

        target = Target(budget, anatomy)
        left = [u for u in target.units(self.kinds) if u in scores]
        steps: list[Step] = []
        gone: list[str] = []
        while not target.met(gone):
            done = anatomy.expand(gone)
            left = [u for u in left if target.allowed([*gone, u]) and not anatomy.expand([u]) <= done]
            if not left:
                raise target.refuse(target.amount(gone))
            if self.rescore and gone and len(gone) % self.rescore == 0 and bench is not None:
                scores = bench.rescore(gone)
            site = min(left, key=lambda u: (scores[u], depth_key(u)))
            left.remove(site)
            gone.append(site)
            steps.append(Step(rewrite="drop", sites=(site,), why={scores.measure: scores[site]}))
        return tuple(steps)
