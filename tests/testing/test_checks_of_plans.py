"""The checks of planners and rewrites tell a bad method from a good one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.papers import Card
from lamina.core.registry import PLANNERS, REWRITES
from lamina.testing import checks_for

LOWEST = type(PLANNERS.make("lowest"))


class Planner:
    """`lowest`, with a mistake added."""

    card: ClassVar[Card] = PLANNERS.card("lowest")

    def plan(self, scores: Any, budget: Any, anatomy: Any, bench: Any = None) -> tuple[Step, ...]:
        return LOWEST().plan(scores, budget, anatomy, bench)


class OneMore(Planner):
    def plan(self, scores: Any, budget: Any, anatomy: Any, bench: Any = None) -> tuple[Step, ...]:
        steps = super().plan(scores, budget, anatomy, bench)
        left = [s.id for s in anatomy.sublayers if s.id not in {i for t in steps for i in t.sites}]
        return (*steps, Step(rewrite="drop", sites=(left[0],)))


class OneLess(Planner):
    def plan(self, scores: Any, budget: Any, anatomy: Any, bench: Any = None) -> tuple[Step, ...]:
        return super().plan(scores, budget, anatomy, bench)[:-1]


class Unprotected(Planner):
    def plan(self, scores: Any, budget: Any, anatomy: Any, bench: Any = None) -> tuple[Step, ...]:
        return super().plan(scores, replace(budget, protect=()), anatomy, bench)


class Shy(Planner):
    """Gives an empty plan where the budget can't be met."""

    def plan(self, scores: Any, budget: Any, anatomy: Any, bench: Any = None) -> tuple[Step, ...]:
        try:
            return super().plan(scores, budget, anatomy, bench)
        except Exception:
            return ()


class Vague(Planner):
    """Raises a bare error where the budget can't be met."""

    def plan(self, scores: Any, budget: Any, anatomy: Any, bench: Any = None) -> tuple[Step, ...]:
        try:
            return super().plan(scores, budget, anatomy, bench)
        except Exception:
            raise InputError("no") from None


class LastFirst(Planner):
    def plan(self, scores: Any, budget: Any, anatomy: Any, bench: Any = None) -> tuple[Step, ...]:
        values = {k: v - 1e-9 * i for i, (k, v) in enumerate(scores.values.items())}
        return super().plan(replace(scores, values=values), budget, anatomy, bench)


class Twice(Planner):
    def plan(self, scores: Any, budget: Any, anatomy: Any, bench: Any = None) -> tuple[Step, ...]:
        steps = super().plan(scores, budget, anatomy, bench)
        return (*steps, *steps[:1])


class Dice(Planner):
    count = 0

    def plan(self, scores: Any, budget: Any, anatomy: Any, bench: Any = None) -> tuple[Step, ...]:
        Dice.count += 1
        values = {k: v * ((7 * i + Dice.count) % 5) for i, (k, v) in enumerate(scores.values.items())}
        return super().plan(replace(scores, values=values), budget, anatomy, bench)


@pytest.mark.parametrize(
    ("bad", "check"),
    [
        (OneMore, "budget_is_met_and_not_overshot"),
        (OneLess, "budget_is_met_and_not_overshot"),
        (OneMore, "nothing_asked_nothing_done"),
        (Unprotected, "protected_sites_stay"),
        (Shy, "impossible_budget_is_one_clear_error"),
        (Vague, "impossible_budget_is_one_clear_error"),
        (LastFirst, "ties_go_in_depth_order"),
        (Twice, "steps_are_explicit"),
        (Dice, "planner_is_deterministic"),
    ],
)
def test_a_bad_planner_is_told(bad: type, check: str) -> None:
    function = {c.__name__: c for c in checks_for("planner")}[f"check_{check}"]
    function(Planner)
    with pytest.raises(AssertionError):
        function(bad)


DROP = type(REWRITES.make("drop"))


class Optimist(DROP):  # type: ignore[misc,valid-type]
    """Forecasts one product too few."""

    def forecast(self, step: Any, anatomy: Any) -> Any:
        return replace(super().forecast(step, anatomy), macs=super().forecast(step, anatomy).macs - 1)


class Careless(DROP):  # type: ignore[misc,valid-type]
    """Checks nothing."""

    def check(self, step: Any, anatomy: Any) -> list[Any]:
        return []


class Forgetful(DROP):  # type: ignore[misc,valid-type]
    """Its receipts do not tell the branches."""

    def apply(self, step: Any, lab: Any) -> Any:
        receipt = super().apply(step, lab)
        return replace(receipt, structure={"steps": [{**s, "branches": []} for s in receipt.structure["steps"]]})


@pytest.mark.parametrize(
    ("bad", "check"),
    [
        (Optimist, "forecast_is_the_fact"),
        (Careless, "refuses_unknown_sites"),
        (Careless, "refuses_to_leave_nothing"),
        (Forgetful, "replay_rebuilds_the_structure"),
        (Forgetful, "twice_applied"),
    ],
)
def test_a_bad_rewrite_is_told(bad: type, check: str) -> None:
    function = {c.__name__: c for c in checks_for("rewrite")}[f"check_{check}"]
    with pytest.raises((AssertionError, KeyError, ValueError)):
        function(bad)
