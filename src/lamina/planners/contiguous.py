"""The run of neighbouring blocks of lowest score goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.registry import planner
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.core.scores import Scores
    from lamina.lab.bench import Bench


@planner("contiguous", on=Kind.BLOCK, status="stable")
@dataclass(frozen=True, kw_only=True)
class Contiguous:
    """Drop the shortest run of blocks that meets the budget, and of these the one of lowest span score."""

    kinds: tuple[Kind, ...] = ()

    def plan(self, scores: Scores, budget: Budget, anatomy: Anatomy, bench: Bench | None = None) -> tuple[Step, ...]:
        """One step with the whole run. Raises InputError for a measure that scores no spans."""
        from lamina.planners._target import Target

        if not scores.spans:
            raise InputError(
                f"{scores.measure} scores no runs of blocks", where="planner contiguous", hint="use angular"
            )
        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        most = 0
        for length in range(1, max(len(k.blocks) for k in anatomy.stacks) + 1):
            runs = [
                [b.site.id for b in stack.blocks[first : first + length]]
                for stack in anatomy.stacks
                for first in range(len(stack.blocks) - length + 1)
            ]
            runs = [r for r in runs if target.allowed(r)]
            most = max([most, *(target.amount(r) for r in runs)])
            fitting = [r for r in runs if target.met(r)]
            if fitting:
                run = min(fitting, key=lambda r: float(scores.spans[r[0]][length - 1]))
                why = {scores.measure: float(scores.spans[run[0]][length - 1])}
                return (Step(rewrite="drop", sites=tuple(run), why=why),)
        raise target.refuse(most)
