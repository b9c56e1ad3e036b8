"""The exact choice against all choices, and the frontier's shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.core.documents import Step
from lamina.core.menu import Option, repriced
from lamina.planners._rounds import settled
from lamina.planners._solve import Problem, cheapest, frontier, knee, reasons


def option(name: str, groups: Sequence[str], damage: float, **saves: float) -> Option:
    return Option(
        name=name, groups=tuple(groups), steps=(Step(rewrite="drop", sites=(name,)),), damage=damage, saves=saves
    )


def brute(options: Sequence[Option], needs: dict[str, float], some: Sequence[Sequence[int]]) -> float | None:
    """The least damage over all sets of options, one by one."""
    best = None
    for count in range(len(options) + 1):
        for chosen in itertools.combinations(range(len(options)), count):
            taken = [g for i in chosen for g in options[i].groups]
            if len(set(taken)) < len(taken) or any(set(s) <= set(chosen) for s in some):
                continue
            if any(sum(options[i].saves.get(r, 0.0) for i in chosen) < n for r, n in needs.items()):
                continue
            damage = sum(options[i].damage for i in chosen)
            best = damage if best is None or damage < best else best
    return best


menus = st.lists(
    st.tuples(
        st.sets(st.sampled_from("abcd"), min_size=1, max_size=2),
        st.integers(-2, 20),
        st.integers(0, 9),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=150, deadline=None)
@given(menus, st.integers(0, 25), st.integers(0, 25), st.booleans())
def test_the_choice_is_the_best_of_all(
    rows: list[tuple[set[str], int, int, int]], parameters: int, kv: int, held: bool
) -> None:
    options = [option(f"o{n}", sorted(g), d, parameters=p, kv_bytes=k) for n, (g, d, p, k) in enumerate(rows)]
    needs = {"parameters": float(parameters), "kv_bytes": float(kv)}
    some = [[0, len(options) - 1]] if held and len(options) > 1 else []
    want = brute(options, needs, some)
    got = cheapest(options, needs, some)
    assert (got is None) == (want is None)
    if got is not None:
        assert sum(options[i].damage for i in got) == pytest.approx(want)
        taken = [g for i in got for g in options[i].groups]
        assert len(set(taken)) == len(taken)
        assert all(sum(options[i].saves[r] for i in got) >= n for r, n in needs.items())


def test_without_needs_only_what_helps_is_taken() -> None:
    options = [option("a", "x", -1.0, parameters=1), option("b", "y", 2.0, parameters=9)]
    assert cheapest(options, {"parameters": 0.0}) == [0]
    assert cheapest([], {"parameters": 0.0}) == []
    assert cheapest([], {"parameters": 1.0}) is None


def test_the_frontier_rises_and_its_knee_is_where_it_bends() -> None:
    options = [option(f"o{n}", [f"g{n}"], 0.01 * (n + 1) if n < 6 else 3.0 * n, parameters=10) for n in range(10)]
    points = frontier(Problem(options, {}), "parameters", points=10)
    assert [p.freed for p in points] == [10.0 * n for n in range(1, 11)]
    assert all(a.damage < b.damage for a, b in itertools.pairwise(points))
    assert [p.freed for p in points if p.knee] == [60.0]
    for n, point in enumerate(points, start=1):
        assert point.damage == pytest.approx(brute(options, {"parameters": point.freed}, []))
        assert point.uses == {"drop": n}


def test_a_frontier_keeps_the_other_needs() -> None:
    options = [
        option("a", "x", 1.0, parameters=5),
        option("b", "x", 3.0, kv_bytes=4),
        option("c", "y", 2.0, kv_bytes=4),
    ]
    points = frontier(Problem(options, {"kv_bytes": 4.0}), "parameters", points=2)
    assert [(p.freed, p.damage) for p in points] == [(5.0, 3.0)]
    assert knee([(1.0, 1.0), (2.0, 2.0)]) == 1


@settings(max_examples=60, deadline=None)
@given(menus, st.integers(1, 25))
def test_a_reason_is_the_cheapest_plan_without_the_option(
    rows: list[tuple[set[str], int, int, int]], parameters: int
) -> None:
    options = [option(f"o{n}", sorted(g), d, parameters=p) for n, (g, d, p, _) in enumerate(rows)]
    problem = Problem(options, {"parameters": float(parameters)})
    chosen = problem.cheapest()
    if chosen is None:
        return
    for place, reason in zip(chosen, reasons(problem, chosen), strict=True):
        want = brute([o for n, o in enumerate(options) if n != place], dict(problem.needs), [])
        assert reason.option is options[place]
        assert reason.more == (math.inf if want is None else pytest.approx(want - problem.price(chosen)))
        assert reason.more >= -1e-9
        assert (reason.second == "no plan") == (want is None)


def test_prices_are_multiplied_step_by_step() -> None:
    steps = tuple(
        Step(rewrite=r, sites=("a",), why={"damage": d} if d else {}) for r, d in (("narrow", 3.0), ("round", 1.0))
    )
    both = Option(name="both", groups=("a",), steps=steps, damage=4.0)
    assert repriced([both], {"round": 5.0, "drop": 9.0}) == [3.0 + 5.0]
    assert repriced([option("a", "x", 2.0)], {"drop": 3.0}) == [6.0]


class Truth:
    """Trials in which rounding costs four times what it should."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def rise(self, options: Sequence[Option]) -> float:
        self.asked.append([o.name for o in options])
        return sum(o.damage * (4.0 if o.kinds == ("round",) else 1.0) for o in options)


def test_rounds_put_right_what_a_rewrite_costs_beside_others() -> None:
    def one(name: str, group: str, rewrite: str, damage: float) -> Option:
        step = Step(rewrite=rewrite, sites=(group,), why={"damage": damage})
        return Option(name=name, groups=(group,), steps=(step,), damage=damage, saves={"bytes": 1.0})

    options = [one("a1", "a", "round", 1.0), one("a2", "a", "drop", 2.0), one("b", "b", "drop", 1.0)]
    problem, truth = Problem(options, {"bytes": 2.0}), Truth()
    first = problem.cheapest()
    assert first == [0, 2]
    found = settled(problem, truth, first, 2)  # type: ignore[arg-type]
    assert truth.asked == [["a1", "b"], ["b"], ["a1"], ["a2", "b"]], "whole, then without each rewrite, then anew"
    assert found.chosen == [1, 2]
    assert found.rises == (5.0, 3.0)
    assert found.factors == {"round": 4.0, "drop": 1.0}
    assert found.level * problem.at(found.factors).price(found.chosen) == pytest.approx(3.0)
    kept = settled(problem, Truth(), first, 0)  # type: ignore[arg-type]
    assert (kept.chosen, kept.level, kept.rises) == (first, 1.0, ())
    assert settled(problem, Truth(), first, 1).chosen == [1, 2], "of drops alone"  # type: ignore[arg-type]


def test_the_cheapest_plan_of_one_kind_is_tried_too() -> None:
    class Interactions(Truth):
        """Trials in which two kinds beside each other cost ten times more."""

        def rise(self, options: Sequence[Option]) -> float:
            kinds = {k for o in options for k in o.kinds}
            return super().rise(options) * (10.0 if len(kinds) > 1 else 1.0)

    def one(name: str, group: str, rewrite: str, damage: float) -> Option:
        step = Step(rewrite=rewrite, sites=(group,), why={"damage": damage})
        return Option(name=name, groups=(group,), steps=(step,), damage=damage, saves={"bytes": 1.0})

    options = [one("a1", "a", "narrow", 1.0), one("a2", "a", "drop", 2.0), one("b", "b", "drop", 1.0)]
    problem = Problem(options, {"bytes": 2.0})
    found = settled(problem, Interactions(), [0, 2], 1)  # type: ignore[arg-type]
    assert (found.chosen, found.rises, found.factors, found.level) == ([1, 2], (20.0, 3.0), {}, 1.0)
    dear = [*options[:1], one("a2", "a", "drop", 200.0), options[2]]
    kept = settled(Problem(dear, {"bytes": 2.0}), Interactions(), [0, 2], 1)  # type: ignore[arg-type]
    assert (kept.chosen, kept.rises) == ([0, 2], (20.0,)), "what promises to be far dearer is not tried"
