"""The exact choice from a menu: multiple choice under budgets, by branch and bound (HiGHS)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lamina.core.errors import InputError
from lamina.core.menu import Option, Point, Reason, repriced

if TYPE_CHECKING:
    from lamina.core.documents import Budget


@dataclass(frozen=True, eq=False)
class Problem:
    """What may be chosen from, what must be freed, sets of options of which one must stay out, and the dense whole.

    `prices`: of each option in nats, where they are not what the menu says.
    """

    options: Sequence[Option]
    needs: Mapping[str, float]
    some: Sequence[Sequence[int]] = ()
    whole: Mapping[str, float] = field(default_factory=dict[str, float])
    prices: Sequence[float] | None = None

    def cheapest(self, without: Iterable[int] = ()) -> list[int] | None:
        """The best choice; None where none meets the needs."""
        return cheapest(self.options, self.needs, self.some, prices=self.prices, without=without)

    def at(self, factors: Mapping[str, float], level: float = 1.0) -> Problem:
        """The same at other prices: rewrite → what its prices are multiplied by, and all of them by `level`."""
        return replace(self, prices=[level * p for p in repriced(self.options, factors)])

    def price(self, chosen: Iterable[int]) -> float:
        """What a choice should cost, in nats."""
        return sum(self.options[i].damage if self.prices is None else self.prices[i] for i in chosen)

    def refuse(self, budget: Budget) -> InputError:
        """The error for needs that no choice meets."""
        hint = "keep more, or protect less" if budget.protect else "keep more"
        told = ""
        for name, need in self.needs.items():
            told = f"the budget asks to free {_told(need)} of {_told(self.whole[name])} {name}"
            best: dict[tuple[str, ...], float] = {}
            for option in self.options:
                best[option.groups] = max(best.get(option.groups, 0.0), option.saves.get(name, 0.0))
            most = sum(best.values())
            if most < need:
                return InputError(f"{told}, but at most {_told(most)} may go this way", hint=hint)
        if len(self.needs) == 1:
            return InputError(f"{told}, which no choice of options does", hint=hint)
        return InputError("no plan meets all these budgets at once", hint="keep more of one of them")


def cheapest(
    options: Sequence[Option],
    needs: Mapping[str, float],
    some: Iterable[Iterable[int]] = (),
    *,
    prices: Sequence[float] | None = None,
    without: Iterable[int] = (),
    seconds: float = 60.0,
) -> list[int] | None:
    """Places of the options of least total damage that free `needs` of every resource; None where none do.

    Of options that share a group at most one is taken, and of those `without` none. `prices` stand in for the options'
    own. `some`: sets of options of which at least one must stay out.
    The choice is exact: no gap is left between it and the bound, unless `seconds` are over.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not options:
        return [] if all(n <= 0 for n in needs.values()) else None
    rows: list[dict[int, float]] = []
    low: list[float] = []
    high: list[float] = []
    groups: dict[str, list[int]] = {}
    for place, option in enumerate(options):
        for group in option.groups:
            groups.setdefault(group, []).append(place)
    for members in groups.values():
        _row(rows, low, high, dict.fromkeys(members, 1.0), -np.inf, 1.0)
    for resource, need in needs.items():
        if need > 0:
            saved = {i: float(o.saves.get(resource, 0.0)) / need for i, o in enumerate(options)}
            _row(rows, low, high, saved, 1.0 - 1e-12, np.inf)
    for members in some:
        held = list(members)
        _row(rows, low, high, dict.fromkeys(held, 1.0), -np.inf, len(held) - 1.0)
    cells = [(r, c, v) for r, row in enumerate(rows) for c, v in row.items()]
    at_row, at_column, value = zip(*cells, strict=True)
    bounds: Any = np.array(low), np.array(high)
    matrix = csr_array((value, (at_row, at_column)), shape=(len(rows), len(options)))
    damage = np.array([o.damage for o in options] if prices is None else prices)
    top = np.ones(len(options))
    top[list(without)] = 0
    scale = max(float(np.abs(damage).max()), 1e-12)
    ends: Any = Bounds(np.zeros(len(options)), top)  # type: ignore[arg-type]
    found: Any = milp(
        damage / scale,
        integrality=np.ones(len(options)),
        bounds=ends,
        constraints=LinearConstraint(matrix, *bounds),
        options={"mip_rel_gap": 0.0, "time_limit": seconds},
    )
    if found.x is None:
        return None
    return [i for i, x in enumerate(found.x) if x > 0.5]


def _row(
    rows: list[dict[int, float]], low: list[float], high: list[float], row: dict[int, float], least: float, most: float
) -> None:
    rows.append(row)
    low.append(least)
    high.append(most)


def frontier(problem: Problem, resource: str, points: int = 12) -> list[Point]:
    """Plans that free ever more of a resource, as far as may be, within the other needs; none is dominated."""
    best: dict[tuple[str, ...], float] = {}
    for option in problem.options:
        best[option.groups] = max(best.get(option.groups, 0.0), option.saves.get(resource, 0.0))
    most = sum(best.values())
    others = {k: v for k, v in problem.needs.items() if k != resource}
    found: list[tuple[float, float, list[int]]] = []
    for step in range(1, points + 1):
        one = replace(problem, needs={**others, resource: most * step / points * (1 - 1e-9)})
        chosen = one.cheapest()
        if chosen is not None:
            freed = sum(float(one.options[i].saves.get(resource, 0.0)) for i in chosen)
            found.append((freed, one.price(chosen), chosen))
    kept = [p for p in found if not any(q[0] >= p[0] and q[1] < p[1] for q in found)]
    kept = [p for n, p in enumerate(kept) if n == 0 or p[:2] != kept[n - 1][:2]]
    bend = knee([p[:2] for p in kept]) if kept else -1
    return [
        Point(
            freed=freed, damage=price, knee=n == bend,
            uses=Counter(" + ".join(problem.options[i].kinds) for i in chosen),
        )
        for n, (freed, price, chosen) in enumerate(kept)
    ]  # fmt: skip


def reasons(problem: Problem, chosen: Sequence[int]) -> list[Reason]:
    """Of each option of a choice what the cheapest plan without it costs beyond it, and does in its place."""
    base, found = problem.price(chosen), []
    for place in chosen:
        option = problem.options[place]
        other = problem.cheapest(without=[place])
        there = [problem.options[i].name for i in other or () if {*problem.options[i].groups} & {*option.groups}]
        more = math.inf if other is None else problem.price(other) - base
        second = "no plan" if other is None else " and ".join(there) or "nothing"
        found.append(Reason(option=option, damage=problem.price([place]), more=more, second=second))
    return found


def _told(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def knee(points: Sequence[tuple[float, float]]) -> int:
    """The place of the point that lies farthest below the line from the first to the last, both axes scaled to 1."""
    if len(points) < 3:
        return len(points) - 1
    x = np.array([p[0] for p in points], dtype=float)
    y = np.array([p[1] for p in points], dtype=float)
    x, y = (x - x[0]) / max(x[-1] - x[0], 1e-300), (y - y[0]) / max(y[-1] - y[0], 1e-300)
    return int(np.argmax(x - y))
