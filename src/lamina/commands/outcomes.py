"""What tasks found, on the terminal: a table of tasks and a profile of capabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lamina.evaluators.tasks._evidence import CAPABILITY, LEVEL, TASK, at_chance, shown, verdict

if TYPE_CHECKING:
    from rich.table import Table

    from lamina.core.documents import Evidence, EvidenceFile


def print_outcomes(found: EvidenceFile) -> None:
    """Print the tables, where there are tasks among the evidence; accuracies in per cent."""
    from lamina.terminal import console

    changes = [e for e in found.evidence if e.name.startswith(TASK) and e.of == "difference"]
    if not changes:
        return
    table = _grid("tasks", "task", "items", "dense", "thinned", "thinned − dense [95 %]", "p", "sees", "")
    for row in sorted(changes, key=lambda e: (e.unit != "accuracy", e.capability, e.name)):
        dense, thinned = found.get(row.name, "dense"), found.get(row.name)
        said = [verdict(row)]
        said += [
            f"{of} no better than chance" for of, e in (("dense", dense), ("thinned", thinned)) if e and at_chance(e)
        ]
        name = f"{row.name.removeprefix(TASK)}, {row.unit}" if row.unit != "accuracy" else row.name.removeprefix(TASK)
        cells = (_value(dense), _value(thinned), change(row), shown(row.p), _size(row))
        table.add_row(name, str(row.n), *cells, "; ".join(said))
    console.print(table)
    rows = [e for e in found.evidence if e.name.startswith(CAPABILITY)]
    if rows:
        console.print(_profile(rows))
    console.print()


def _profile(rows: Sequence[Evidence]) -> Table:
    table = _grid("capabilities", "capability", "items", "thinned − dense [95 %]", "p harder than others", "")
    for row in rows:
        name = row.capability if row.unit == "accuracy" else f"{row.capability}, {row.unit}"
        said = "hit harder than the others" if row.p is not None and row.p < LEVEL else ""
        table.add_row(name, str(row.n), change(row), shown(row.p), said)
    return table


def change(row: Evidence) -> str:
    """A difference with its interval: points of accuracy, or its unit's number."""
    scale, digits = (100, 1) if row.unit == "accuracy" else (1, 3)
    shown = [None if v is None else _signed(scale * v, digits) for v in (row.value, row.low, row.high)]
    return f"{shown[0]} \\[{shown[1]}, {shown[2]}]" if None not in shown else str(shown[0])


def _signed(value: float, digits: int) -> str:
    """A number with its sign, nothing without one."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def _value(row: Evidence | None) -> str:
    if row is None:
        return ""
    return f"{100 * row.value:.1f} %" if row.unit == "accuracy" else f"{row.value:.3f}"


def _size(row: Evidence) -> str:
    if row.sees is None:
        return "none"
    return f"{100 * row.sees:.1f}" if row.unit == "accuracy" else f"{row.sees:.3f}"


def _grid(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        last = place == len(columns) - 1
        table.add_column(column, justify="left" if place == 0 or last else "right", no_wrap=not last)
    return table
