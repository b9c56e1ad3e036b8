"""Budgets that ranks of linear maps must meet: what planners of ranks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.registry import REWRITES

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.planners._target import Target

FACTORS = "the check counts what dropping frees, and takes budgets of blocks and sublayers; here maps get lower ranks"
"""Why a planner of ranks fails the checks of planners that drop."""
FAILS = (
    "check_budget_is_met_and_not_overshot",
    "check_planner_is_deterministic",
    "check_something_is_left",
    "check_ties_go_in_depth_order",
    "check_steps_are_explicit",
    "check_planner_takes_every_model",
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a budget asks of the linear maps that are not protected.

    `need` is how much must go, in the budget's unit; `shapes` [outputs, inputs] in depth order; `each` what a weight
    takes in that unit: 1, or its bytes.
    """

    target: Target
    need: float
    shapes: Mapping[str, tuple[int, int]]
    each: Mapping[str, int]

    @property
    def whole(self) -> int:
        """What all these maps take as they are, in the budget's unit."""
        return sum(self.each[s] * outputs * inputs for s, (outputs, inputs) in self.shapes.items())

    def step(self, rewrite: str, ranks: Mapping[str, int], why: Mapping[str, float], **options: Any) -> Step:
        """One step with all maps that get a rank; its reasons are `why`, and what it frees."""
        anatomy = self.target.anatomy
        step = Step(rewrite=rewrite, sites=tuple(ranks), options={**options, "rank": dict(ranks)})
        saves = anatomy.total() - REWRITES.make(rewrite, options).forecast(step, anatomy)
        frees = {k: float(v) for k, v in dataclasses.asdict(saves).items() if v}
        return dataclasses.replace(step, why={**why, **frees})


def asked(budget: Budget, anatomy: Anatomy) -> Asked | None:
    """What a budget asks; None where the dense model meets it. Raises InputError for one that ranks can't meet."""
    from lamina.anatomy.neighbours import tied
    from lamina.planners._target import Target

    several = bool(getattr(budget, "also", ()))
    if not several and budget.metric in ("blocks", "sublayers") and Target(budget, anatomy).need <= 0:
        return None
    if several or budget.metric not in ("parameters", "bytes"):
        raise InputError("lower ranks meet budgets of parameters, or of bytes", hint="--keep 75%, or --bytes 200MB")
    target = Target(budget, anatomy)
    if target.need <= 0:
        return None
    shared = tied(anatomy)
    shapes, each = {}, {}
    for sublayer in anatomy.sublayers:
        for site in anatomy.linears(sublayer) if sublayer.id not in target.protected else ():
            weight = anatomy.weight(site)
            outputs, inputs = weight.shape
            if outputs + inputs < outputs * inputs and site.id not in shared:
                shapes[site.id] = outputs, inputs
                each[site.id] = 1 if budget.metric == "parameters" else weight.element_size()
    found = Asked(target=target, need=target.need, shapes=shapes, each=each)
    if target.need >= found.whole:
        raise target.refuse(found.whole)
    return found
