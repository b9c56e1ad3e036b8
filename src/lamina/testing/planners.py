"""Checks for planners: the budget is met and no more, what is protected stays, and the choice can be repeated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from lamina.anatomy import Anatomy
from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import REWRITES
from lamina.core.sites import SUBLAYERS, Kind
from lamina.lab import Lab
from lamina.lab.bench import Bench
from lamina.testing.bench import SyntheticMeasure, expect_same, lab, picture, synthetic
from lamina.testing.measures import refuses_unknown_option
from lamina.testing.models import NAMES
from lamina.testing.suite import check, expect, made, run_checks

BUDGETS = (
    Budget(metric="parameters", keep=0.8),
    Budget(metric="parameters", keep=0.5),
    Budget(metric="bytes", keep=0.7),
    Budget(metric="blocks", drop=1),
    Budget(metric="blocks", keep=0.5),
    Budget(metric="sublayers", drop=3),
)
IMPOSSIBLE = (
    Budget(metric="parameters", limit=1),
    Budget(metric="bytes", keep=1e-6),
    Budget(metric="blocks", drop=4),
    Budget(metric="blocks", drop=40),
    Budget(metric="sublayers", drop=8),
    Budget(metric="parameters", keep=0.5, protect=tuple(f"block.{n}" for n in range(4))),
)
MODELS = ("llama", "gpt_neox", "mixtral")


def _bench(name: str = "llama", *silent: str, constant: bool = False) -> Bench:
    tiny = lab(name, *silent, batch_size=2)
    few: Any = tiny.batches[0]["input_ids"][:2, :8]
    return Bench(tiny.on(few), SyntheticMeasure(constant=constant))  # type: ignore[reportArgumentType]


def _plan(method: Any, budget: Budget, bench: Bench, *, seed: int = 0, constant: bool = False) -> tuple[Step, ...]:
    anatomy = bench.lab.anatomy
    return tuple(made(method).plan(synthetic(anatomy, seed, constant=constant), budget, anatomy, bench))


def whole(budget: Budget, anatomy: Anatomy) -> int:
    """The dense model in the budget's unit."""
    if budget.metric == "blocks":
        return len(anatomy.of_kind(Kind.BLOCK))
    if budget.metric == "sublayers":
        return len(anatomy.sublayers)
    return int(getattr(anatomy.total(), budget.metric))


def freed(budget: Budget, anatomy: Anatomy, steps: Sequence[Step]) -> int:
    """What the steps free, in the budget's unit; counted literally."""
    gone = {p.id for step in steps for s in step.sites for p in anatomy.parts(s)}
    if budget.metric == "sublayers":
        return len(gone)
    if budget.metric == "blocks":
        return sum(all(p.id in gone for p in anatomy.parts(b)) for b in anatomy.of_kind(Kind.BLOCK))
    return int(getattr(anatomy.freed(gone), budget.metric))


def meets(budget: Budget, anatomy: Anatomy, steps: Sequence[Step]) -> bool:
    """Whether the steps meet the budget (a fraction of blocks or sublayers is rounded)."""
    left = whole(budget, anatomy) - freed(budget, anatomy, steps)
    if budget.drop is not None:
        return freed(budget, anatomy, steps) >= budget.drop
    if budget.limit is not None:
        return left <= budget.limit
    keep = whole(budget, anatomy) * (budget.keep or 0)
    return left <= keep or (budget.metric in ("blocks", "sublayers") and left <= keep + 0.5)


@check("planner")
def check_budget_is_met_and_not_overshot(method: Any) -> None:
    """The steps meet the budget, and without the last one they do not."""
    for name in MODELS:
        bench = _bench(name)
        anatomy = bench.lab.anatomy
        for budget in BUDGETS:
            steps = _plan(method, budget, bench)
            amount = freed(budget, anatomy, steps)
            expect(meets(budget, anatomy, steps), f"on {name}, {budget} is not met: {amount} freed by {_sites(steps)}")
            expect(
                not meets(budget, anatomy, steps[:-1]),
                f"on {name}, {budget} is overshot: the last of {_sites(steps)} was not needed",
            )


@check("planner")
def check_nothing_asked_nothing_done(method: Any) -> None:
    """A budget that the dense model meets gives no steps."""
    for budget in (
        Budget(metric="parameters", keep=1.0),
        Budget(metric="blocks", drop=0),
        Budget(metric="bytes", limit=1 << 40),
    ):
        steps = _plan(method, budget, _bench())
        expect(not steps, f"{budget} asks for nothing, yet {_sites(steps)} go")


@check("planner")
def check_protected_sites_stay(method: Any) -> None:
    """Neither a protected sublayer, nor a block that holds it, nor any part of a protected block is chosen."""
    for protect in (("block.0", "block.3"), ("block.1.attention", "block.2.mlp"), ("block.0",)):
        for budget in (
            Budget(metric="parameters", keep=0.85, protect=protect),
            Budget(metric="sublayers", drop=2, protect=protect),
        ):
            bench = _bench()
            try:
                steps = _plan(method, budget, bench)
            except InputError:
                continue
            chosen = bench.lab.anatomy.expand(_sites(steps))
            kept = bench.lab.anatomy.expand(protect)
            expect(not chosen & kept, f"{sorted(chosen & kept)} are protected by {protect} and chosen")


@check("planner")
def check_planner_is_deterministic(method: Any) -> None:
    """The same scores give the same steps, on a fresh bench, too."""
    for budget in BUDGETS:
        bench = _bench()
        first, again, anew = _plan(method, budget, bench), _plan(method, budget, bench), _plan(method, budget, _bench())
        expect(first == again == anew, f"{budget}: {first}, then {again}, then {anew}")


@check("planner")
def check_something_is_left(method: Any) -> None:
    """However much is asked, a rewrite accepts the plan: something of every stack stays, and an attention."""
    asked = [
        Budget(metric="sublayers", drop=7),
        Budget(metric="blocks", drop=3),
        Budget(metric="parameters", keep=0.36),
    ]
    for budget, seed in itertools.product(asked, range(4)):
        bench = _bench()
        try:
            steps = _plan(method, budget, bench, seed=seed)
        except InputError as error:
            _expect_clear(error, budget)
            continue
        step = Step(rewrite="drop", sites=tuple(_sites(steps)))
        problems = REWRITES.make("drop").check(step, bench.lab.anatomy)
        expect(not problems, f"{budget}: {_sites(steps)} can't be dropped: {problems}")


@check("planner")
def check_impossible_budget_is_one_clear_error(method: Any) -> None:
    """A budget that can't be met is one InputError of one line with a hint, never a plan."""
    for budget in IMPOSSIBLE:
        try:
            steps = _plan(method, budget, _bench())
        except LaminaError as error:
            _expect_clear(error, budget)
        else:
            raise AssertionError(f"{budget} can't be met, yet {_sites(steps)} are planned")


def _expect_clear(error: LaminaError, budget: Budget) -> None:
    expect(isinstance(error, InputError), f"{budget}: {type(error).__name__} where an InputError is due: {error}")
    expect(bool(error.hint), f"{budget}: the error says not what to do: {error}")
    expect("\n" not in str(error) and len(str(error)) < 400, f"{budget}: the error is not one line: {error}")


@check("planner")
def check_ties_go_in_depth_order(method: Any) -> None:
    """Where nothing tells sites apart, the earliest ones go first."""
    budget = Budget(metric="blocks", drop=2)
    steps = _plan(method, budget, _silent_bench(), constant=True)
    anatomy = _silent_bench().lab.anatomy
    chosen = list(anatomy.collapse(anatomy.expand(_sites(steps))))
    expect(chosen == ["block.0", "block.1"], f"all is equal, and {chosen} go, not block.0 and block.1")


def _silent_bench() -> Bench:
    anatomy = lab("llama").anatomy
    return _bench("llama", *(s.id for s in anatomy.sites if s.kind in SUBLAYERS), constant=True)


@check("planner")
def check_steps_are_explicit(method: Any) -> None:
    """Steps name known rewrites and sites of this model, each sublayer once, with finite reasons."""
    for budget in BUDGETS:
        bench = _bench()
        steps = _plan(method, budget, bench)
        anatomy = bench.lab.anatomy
        seen: list[str] = []
        for step in steps:
            expect(step.rewrite in set(REWRITES), f"{step.rewrite!r} is no rewrite")
            expect(bool(step.sites), "a step without sites")
            seen += [p.id for s in step.sites for p in anatomy.parts(anatomy.site(s))]
            expect(all(v == v and abs(v) < 1e300 for v in step.why.values()), f"a reason is no number: {step.why}")  # noqa: PLR0124
            expect(Step.from_data(step.to_data()) == step, f"{step} does not survive writing and reading")
        expect(len(seen) == len(set(seen)), f"a sublayer is named twice: {sorted(seen)}")


@check("planner")
def check_planner_leaves_the_model_untouched(method: Any) -> None:
    """Judging and scoring anew leave weights, hooks, modes and attributes as they were."""
    for name in ("llama", "nanogpt"):
        bench = _bench(name)
        before = picture(bench.lab.model)
        _plan(method, Budget(metric="parameters", keep=0.7), bench)
        expect_same(before, picture(bench.lab.model), f"on {name}, the planner")


@check("planner")
def check_planner_takes_every_model(method: Any) -> None:
    """A plan is found on every tiny architecture."""
    for name in NAMES:
        bench = _bench(name)
        steps = _plan(method, Budget(metric="parameters", keep=0.8), bench)
        expect(
            meets(Budget(metric="parameters", keep=0.8), bench.lab.anatomy, steps), f"on {name}, the budget is not met"
        )


@check("planner")
def check_unknown_planner_option_is_refused(method: Any) -> None:
    """The registry refuses an option that the planner does not have, with a hint."""
    refuses_unknown_option(method)


def _sites(steps: Sequence[Step]) -> list[str]:
    return [s for step in steps for s in step.sites]


def check_planner(method: Any) -> None:
    """Run every check that applies to a planner (its class, or an instance)."""
    run_checks("planner", method)


__all__ = ["Lab", "check_planner", "freed", "meets", "whole"]
