"""The page's solver against the command's: the budget is met, the gap that is shown holds, places are not shared."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import scripted

from lamina.core.menu import Option
from lamina.planners._solve import cheapest

Case = dict[str, Any]
CODE = "return INPUT.given.map((c) => chosen(c.o, c.need, c.sets, new Set(c.without)));"


def case(draw: random.Random) -> Case:
    """A menu: options of one place or several, prices that follow what they save or don't."""
    places, several = draw.randint(1, 12), draw.choice((0.0, 0.0, 0.3, 0.6))
    options: list[dict[str, Any]] = []
    for _ in range(draw.randint(1, 36)):
        first = draw.randrange(places)
        groups = {first, (first + 1) % places} if draw.random() < several else {first}
        if draw.random() < several / 3:
            groups.add(draw.randrange(places))
        saved = draw.randint(0, 400)
        price = draw.choice((max(1e-5, saved * draw.uniform(0.2, 2) / 1000), draw.random()))
        options.append({"d": price, "s": saved, "g": sorted(groups)})
    best = [max((o["s"] for o in options if p in o["g"]), default=0) for p in range(places)]
    all_of = [draw.sample(range(len(options)), min(len(options), draw.randint(2, 4)))] if draw.random() < 0.4 else []
    without = draw.sample(range(len(options)), draw.randint(0, len(options) // 6))
    return {"o": options, "need": draw.uniform(0.05, 0.8) * sum(best), "sets": all_of, "without": without}


def exact(given: Case) -> list[int] | None:
    options = [
        Option(name=str(n), groups=tuple(map(str, o["g"])), steps=(), damage=o["d"], saves={"r": o["s"]})
        for n, o in enumerate(given["o"])
    ]
    return cheapest(options, {"r": given["need"]}, given["sets"], without=given["without"])


def price(given: Case, chosen: Sequence[int]) -> float:
    return sum(given["o"][n]["d"] for n in chosen)


def test_budgets_are_met_and_the_gap_shown_is_no_smaller_than_the_true_one() -> None:
    draw = random.Random(7)
    cases = [case(draw) for _ in range(150)]
    proven = impossible = 0
    for given, found in zip(cases, scripted.run(("solve",), CODE, cases), strict=True):
        best = exact(given)
        if best is None:
            assert found is None
            impossible += 1
            continue
        assert found is not None, "a choice is found wherever there is one"
        chosen, options = found["chosen"], given["o"]
        places = [g for n in chosen for g in options[n]["g"]]
        assert len(places) == len(set(places))
        assert not set(chosen) & {*given["without"]}
        assert not any({*members} <= {*chosen} for members in given["sets"])
        assert sum(options[n]["s"] for n in chosen) >= given["need"] - 1e-9
        assert found["price"] == pytest.approx(price(given, chosen), abs=1e-12)
        true_gap, shown = found["price"] - price(given, best), found["price"] - found["bound"]
        assert true_gap >= -1e-7
        assert shown >= true_gap - 1e-7
        if found["exact"]:
            assert true_gap <= 1e-7
            proven += 1
    assert proven > 100
    assert 0 < impossible < 40


def test_a_bound_is_shown_where_the_search_is_cut_short() -> None:
    draw = random.Random(3)
    options = [{"d": draw.random(), "s": draw.uniform(1, 2), "g": [p]} for p in range(60) for _ in range(20)]
    given = {"o": options, "need": 70.3, "sets": [], "without": []}
    (whole,) = scripted.run(("solve",), CODE, [given])
    (short,) = scripted.run(("solve",), CODE, [given], change=("const STATES = 8000;", "const STATES = 2;"))
    assert whole["exact"]
    assert not short["exact"]
    assert short["bound"] <= whole["price"] + 1e-9 <= short["price"] + 2e-9


def test_points_of_the_frontier_are_the_cheapest_for_what_they_save() -> None:
    draw = random.Random(11)
    places = range(6)
    options = [{"d": draw.random(), "s": draw.randint(1, 99), "g": [p]} for p in places for _ in range(4)]
    points = scripted.run(("solve",), "return frontier(INPUT.given, new Set(), 1000);", options)
    assert points[0] == {"s": 0, "d": 0}
    assert points[-1]["s"] == sum(max(o["s"] for o in options if o["g"] == [p]) for p in places)
    assert all(a["s"] < b["s"] and a["d"] < b["d"] for a, b in itertools.pairwise(points))
    for point in points[1:]:
        given = {"o": options, "need": point["s"], "sets": [], "without": []}
        best = exact(given)
        assert best is not None
        assert point["d"] == pytest.approx(price(given, best), abs=1e-9)
