"""Scores of what lies inside sublayers: heads, KV groups, experts, neurons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamina.report.read import UNITS, open_table
from lamina.report.svg import Scale

ALONE, GROUPS = 256, 64
"""Up to so many units are shown one by one; more in so many groups of like score, from the lowest to the highest."""
ROWS = 1_500_000
COLUMNS = ("site", "kind", "unit", "span", "measure", "value")


def inside(path: Path, sites: Mapping[str, int], room: int) -> tuple[list[dict[str, Any]], str]:
    """One map for each kind of unit and measure: sublayer → scores, by unit; and a line on what found no room.

    `sites` are the sublayers' numbers on the page, `room` how many characters the maps may take.
    """
    if not path.is_file():
        return [], ""
    table = open_table(path)
    if "unit" not in table.names or "span" not in table.names:
        return [], ""
    if len(table.data) > ROWS:
        return [], f"scores of single units are left out: the survey has more than {ROWS:,} rows"
    maps, lost = list[dict[str, Any]](), list[str]()
    for (kind, measure), members in _read(table.rows(UNITS, COLUMNS), sites).items():
        made = _map(kind, measure, members)
        size = sum(7 * len(v) + 8 for v in made["v"].values())
        if size > room:
            lost.append(f"{measure} of {kind}s")
            continue
        room -= size
        maps.append(made)
    return maps, f"no room on the page for the unit scores {', '.join(lost)}" if lost else ""


def _read(rows: Mapping[str, Sequence[Any]], sites: Mapping[str, int]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(kind, measure) → the sublayer's number → scores by unit; NaN where there is none."""
    found: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
    for site, kind, unit, span, measure, value in zip(*(rows[c] for c in COLUMNS), strict=True):
        at = sites.get(site.rpartition(".")[0])
        if at is not None and span == 1 and value is not None and math.isfinite(value):
            found.setdefault((kind, measure), {}).setdefault(at, {})[int(unit)] = value
    return {
        key: {at: [units.get(n, math.nan) for n in range(max(units) + 1)] for at, units in members.items()}
        for key, members in found.items()
    }


def _map(kind: str, measure: str, members: Mapping[int, list[float]]) -> dict[str, Any]:
    width = max(map(len, members.values()))
    grouped = width > ALONE
    shown = {at: _groups(values) if grouped else values for at, values in members.items()}
    every = [v for values in shown.values() for v in values if math.isfinite(v)]
    scale = Scale.of(every)
    return {
        "kind": kind, "measure": measure, "width": width, "grouped": grouped,
        "how": scale.how, "low": scale.low, "high": scale.high, "bend": scale.bend,
        "v": {str(at): [_short(v) for v in values] for at, values in shown.items()},
    }  # fmt: skip


def _groups(values: Sequence[float]) -> list[float]:
    """Means of `GROUPS` groups of like score, from the lowest to the highest."""
    ranked = sorted(v for v in values if math.isfinite(v))
    count = min(GROUPS, len(ranked))
    cuts = [round(n * len(ranked) / count) for n in range(count + 1)]
    return [sum(ranked[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None
