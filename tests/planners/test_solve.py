"""The exact choice against all choices, and the frontier's shape."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.core.documents import Step
from lamina.core.menu import Option
from lamina.planners._solve import cheapest, frontier, knee


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
    points = frontier(options, "parameters", 100.0, points=10)
    assert [p[0] for p in points] == [10.0 * n for n in range(1, 11)]
    assert all(a[1] < b[1] for a, b in itertools.pairwise(points))
    assert points[knee([p[:2] for p in points])][0] == 60.0
    for freed, damage, chosen in points:
        want = brute(options, {"parameters": freed}, [])
        assert damage == pytest.approx(want)
        assert sum(options[i].saves["parameters"] for i in chosen) == freed


def test_a_need_that_nothing_meets_ends_the_frontier() -> None:
    assert [p[0] for p in frontier([option("a", "x", 1.0, parameters=5)], "parameters", 10.0, points=4)] == [5.0]
    assert knee([(1.0, 1.0), (2.0, 2.0)]) == 1
