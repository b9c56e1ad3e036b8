"""Budgets of weights that are not zero: what planners of sparsities share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.registry import REWRITES

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget

DROPS = "the check counts what dropping frees, and takes budgets of bytes, blocks and sublayers; zeros free nothing"
"""Why a planner of sparsities fails the checks of planners that drop."""
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
    """What a budget asks of the linear maps of a model's blocks.

    `density` is the share of all their weights that may be other than zero; `shapes` [outputs, inputs] in depth order;
    the `dense` ones are protected.
    """

    density: float
    shapes: Mapping[str, tuple[int, int]]
    dense: frozenset[str]

    @property
    def sizes(self) -> dict[str, int]:
        """Weights of each map."""
        return {site: outputs * inputs for site, (outputs, inputs) in self.shapes.items()}

    def steps(self, rewrite: str, sparsity: Mapping[str, float]) -> tuple[Step, ...]:
        """One step with all maps that lose weights. Raises InputError for a rewrite that takes no sparsity."""
        if not hasattr(REWRITES.make(rewrite), "sparse"):
            able = ", ".join(name for name in REWRITES if hasattr(REWRITES.make(name), "sparse"))
            raise InputError(f"the rewrite {rewrite} takes no sparsity", hint=f"known: {able}")
        chosen = {s: sparsity[s] for s in self.shapes if sparsity[s] > 0}
        if not chosen:
            return ()
        why = {"density": self.density, "least": min(chosen.values()), "most": max(chosen.values())}
        return (Step(rewrite=rewrite, sites=tuple(chosen), options={"sparsity": chosen}, why=why),)


def asked(budget: Budget, anatomy: Anatomy) -> Asked | None:
    """What a budget asks; None where the dense model meets it. Raises InputError for one that zeros can't meet."""
    from lamina.planners._target import Target

    target = Target(budget, anatomy)
    if target.need <= 0:
        return None
    if budget.metric != "parameters" or budget.keep is None:
        what = f"zeros free no {budget.metric}: a budget of them says which share of weights stays"
        raise InputError(what, hint="budget: {metric: parameters, keep: 0.5}")
    maps = {s.id: anatomy.weight(s).shape for x in anatomy.sublayers for s in anatomy.linears(x)}
    if not maps:
        raise InputError("the model's blocks have no linear maps that see every token", hint="drop sublayers")
    shapes = {site: (outputs, inputs) for site, (outputs, inputs) in maps.items()}
    dense = frozenset(s.id for x in target.protected for s in anatomy.linears(x))
    return Asked(density=budget.keep, shapes=shapes, dense=dense)
