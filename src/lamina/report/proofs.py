"""Sections that only some runs have: tasks, speed engine by engine, and which engine loads the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from markupsafe import Markup

from lamina.core.documents import Evidence, EvidenceFile, plain
from lamina.core.errors import InputError
from lamina.core.files import fingerprint, read_data
from lamina.core.speeds import SpeedFile
from lamina.report import charts
from lamina.report.charts import Dot
from lamina.report.facts import TASKS
from lamina.report.numbers import NONE, fixed, percent, signed, significant, span, times
from lamina.report.read import Run

LADDERS = ("exports.json", "ladder.json")
STALE = "Measured of another checkpoint than the one in this folder."


@dataclass(frozen=True)
class TaskRow:
    """One task: dense, thinned, the difference with its interval and p, and the smallest loss that would be seen."""

    name: str
    unit: str
    dense: str
    thinned: str
    change: str
    inside: str
    p: str
    sees: str
    n: str
    how: str


def tasks(file: EvidenceFile) -> list[TaskRow]:
    """One row for each task and capability."""
    return [_task(file, name) for name in dict.fromkeys(e.name for e in file.evidence if e.name.startswith(TASKS))]


def _task(file: EvidenceFile, name: str) -> TaskRow:
    dense, thinned, change = (file.get(name, of) for of in ("dense", "thinned", "difference"))
    change = change or file.get(name, "ratio")
    first = next(e for e in file.evidence if e.name == name)
    low, high = (None, None) if change is None else (change.low, change.high)
    return TaskRow(
        name=_title(name),
        unit=first.unit,
        dense=_own(dense),
        thinned=_own(thinned),
        change=_change(change, change.value) if change else NONE,
        inside=NONE
        if change is None or low is None or high is None
        else span(_change(change, low), _change(change, high)),
        p=NONE if change is None or change.p is None else "<0.001" if change.p < 0.001 else fixed(change.p, 3),
        sees=NONE
        if change is None or change.sees is None
        else _own(Evidence(name=name, value=change.sees, unit=first.unit)),
        n=fixed(first.n, 0) if first.n else NONE,
        how=(change or first).how,
    )


def _title(name: str) -> str:
    kind, _, rest = name.replace("task.", "task:", 1).partition(":")
    return rest if kind == "task" else f"{rest} (all its tasks)"


def _share(unit: str) -> bool:
    return unit in ("accuracy", "share")


def _own(e: Evidence | None) -> str:
    return NONE if e is None else percent(e.value) if _share(e.unit) else significant(e.value)


def _change(e: Evidence, value: float) -> str:
    if e.of == "ratio":
        return times(value)
    return signed(100 * value, 1) if _share(e.unit) else signed(value)


def task_chart(file: EvidenceFile) -> Markup | None:
    """The differences with their intervals, of tasks in points, one chart for those that are shares."""
    found = [e for e in file.evidence if e.name.startswith(TASKS) and e.of == "difference" and _share(e.unit)]
    dots = [
        Dot(
            _title(e.name), 100 * e.value, _change(e, e.value),
            None if e.low is None else 100 * e.low, None if e.high is None else 100 * e.high, note=e.how,
        )
        for e in found
    ]  # fmt: skip
    if not dots:
        return None
    return charts.intervals(dots, reference=0.0, log=False, name="Thinned − dense, points", reference_name="no change")


@dataclass(frozen=True)
class Speeds:
    """`speed.json` as rows, a forest plot and notes."""

    rows: tuple[tuple[str, ...], ...]
    chart: Markup | None
    machine: str
    notes: tuple[str, ...]


def speeds(run: Run) -> Speeds | None:
    """What `lamina speed` measured; None where it did not."""
    path = run.folder / "speed.json"
    if not path.is_file():
        return None
    file = SpeedFile.load(path)
    rows, dots = list[tuple[str, ...]](), list[Dot]()
    for row in file.rows:
        what, ratio = f"{row.what}, {row.engine}, {row.batch}×{row.length}", row.ratio
        bounded = ratio.low is not None and ratio.high is not None
        inside = span(fixed(ratio.low or 0, 2), fixed(ratio.high or 0, 2)) if bounded else NONE
        sides = (significant(row.dense.value), significant(row.thinned.value))
        rows.append((what, row.unit, *sides, times(ratio.value), inside, row.verdict))
        ends = (ratio.low, ratio.high) if bounded else (None, None)
        dots.append(Dot(what, ratio.value, f"{times(ratio.value)}  ({inside})", *ends, note=row.verdict))
    name = "Ratios to the dense model, engine by engine"
    chart = charts.intervals(dots, reference=1.0, log=True, name=name, reference_name="dense") if dots else None
    machine = ", ".join(f"{k} {v}" for k, v in file.machine.items() if isinstance(v, str | int | float))
    return Speeds(tuple(rows), chart, machine, (*_stale(run, file.of), *file.notes))


def _stale(run: Run, mark: str) -> tuple[str, ...]:
    return (STALE,) if mark and run.receipts is not None and mark != fingerprint(plain(run.receipts)) else ()


@dataclass(frozen=True)
class Rung:
    """One engine: whether it loads the result, why, whether it was run here, and the nearest plan that it takes."""

    target: str
    ok: bool
    why: str
    ran: bool
    nearest: str


def ladder(folder: Path) -> list[Rung]:
    """Which engine loads the result, by the file that `lamina export` writes; empty where there is none."""
    path = next((folder / name for name in LADDERS if (folder / name).is_file()), None)
    if path is None:
        return []
    data: Any = read_data(path)
    rows = data.get("rungs", data.get("exports")) if isinstance(data, Mapping) else data
    if not isinstance(rows, list) or not all(isinstance(r, Mapping) for r in cast("list[Any]", rows)):
        raise InputError("no list of engines in it", where=path, hint="run lamina export --check again")
    return [_rung(cast("Mapping[str, Any]", r)) for r in cast("Sequence[Any]", rows)]


def _rung(row: Mapping[str, Any]) -> Rung:
    words = {k: str(row.get(k) or "") for k in ("target", "engine", "why", "nearest")}
    name = words["target"] or words["engine"] or "?"
    return Rung(name, bool(row.get("ok")), words["why"], bool(row.get("ran")), words["nearest"])
