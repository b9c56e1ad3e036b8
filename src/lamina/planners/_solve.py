"""The exact choice from a menu: multiple choice under budgets, by branch and bound (HiGHS)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lamina.core.menu import Option


def cheapest(
    options: Sequence[Option],
    needs: Mapping[str, float],
    some: Iterable[Iterable[int]] = (),
    *,
    seconds: float = 60.0,
) -> list[int] | None:
    """Places of the options of least total damage that free `needs` of every resource; None where none do.

    Of options that share a group at most one is taken. `some`: sets of options of which at least one must stay out.
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
    damage = np.array([o.damage for o in options])
    scale = max(float(np.abs(damage).max()), 1e-12)
    found: Any = milp(
        damage / scale,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
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


def frontier(
    options: Sequence[Option], resource: str, most: float, some: Iterable[Iterable[int]] = (), points: int = 12
) -> list[tuple[float, float, list[int]]]:
    """(freed, damage, places) of plans that free ever more of a resource, up to `most`; none is dominated."""
    found: list[tuple[float, float, list[int]]] = []
    held = [list(s) for s in some]
    for step in range(1, points + 1):
        chosen = cheapest(options, {resource: most * step / points}, held)
        if chosen is None:
            break
        freed = sum(float(options[i].saves.get(resource, 0.0)) for i in chosen)
        found.append((freed, sum(options[i].damage for i in chosen), chosen))
    kept = [p for p in found if not any(q[0] >= p[0] and q[1] < p[1] for q in found)]
    return [p for n, p in enumerate(kept) if n == 0 or p[:2] != kept[n - 1][:2]]


def knee(points: Sequence[tuple[float, float]]) -> int:
    """The place of the point that lies farthest below the line from the first to the last, both axes scaled to 1."""
    if len(points) < 3:
        return len(points) - 1
    x = np.array([p[0] for p in points], dtype=float)
    y = np.array([p[1] for p in points], dtype=float)
    x, y = (x - x[0]) / max(x[-1] - x[0], 1e-300), (y - y[0]) / max(y[-1] - y[0], 1e-300)
    return int(np.argmax(x - y))
