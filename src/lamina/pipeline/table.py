"""The survey as tidy tables: one row per measure, site, unit and span; parts of the text; grids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lamina.core.errors import InputError
from lamina.core.files import atomic
from lamina.core.scores import Array, Grid, Scores

if TYPE_CHECKING:
    import polars as pl

    from lamina.anatomy import Anatomy

SURVEY, PARTS, GRIDS = "survey.parquet", "survey-parts.parquet", "survey-grids.parquet"


def write_survey(
    path: Path, scores: Iterable[Scores], anatomy: Anatomy, *, tokens: int, seed: int, fingerprint: str
) -> None:
    """Write `survey.parquet` and, beside it, `survey-grids.parquet` where a measure has grids.

    `span` is 1 but for the rows that score so many blocks from one on. What has no score has a row with `why`; a
    measure that is not defined for the model at all has one row, of the site "".
    """
    tables = list(scores)
    about = {"tokens": tokens, "seed": seed, "fingerprint": fingerprint}
    rows = [{**row, **about} for table in tables for row in _rows(table, anatomy)]
    _write(path, rows, _types())
    grids = [row for table in tables for name, grid in table.grids.items() for row in _cells(table.measure, name, grid)]
    if grids:
        _write(path.with_name(GRIDS), grids)
    else:
        path.with_name(GRIDS).unlink(missing_ok=True)


def write_parts(path: Path, parts: Mapping[tuple[str, int], Iterable[Scores]]) -> None:
    """Write `survey-parts.parquet`: the scores of each (variation, part), as of part 2 of the text."""
    rows = [
        {"measure": t.measure, "site": s, "unit": u, "value": float(v), "variation": variation, "part": part}
        for (variation, part), tables in parts.items()
        for t in tables
        for s, values in t.values.items()
        for u, v in enumerate(values)
    ]
    if rows:
        _write(path, rows)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, rows: Sequence[Mapping[str, Any]], schema: Mapping[str, Any] | None = None) -> None:
    import polars as pl

    with atomic(path) as draft:
        pl.DataFrame(list(rows), schema=schema, infer_schema_length=None).write_parquet(draft)


def _types() -> dict[str, Any]:
    import polars as pl

    text, whole, real = pl.String, pl.Int64, pl.Float64
    return {
        "site": text, "kind": text, "block": whole, "unit": whole, "span": whole, "measure": text, "value": real,
        "stderr": real, "scale": text, "parameters": whole, "bytes": whole, "macs": whole, "kv_bytes": whole,
        "tokens": whole, "seed": whole, "fingerprint": text, "why": text,
    }  # fmt: skip


def _rows(table: Scores, anatomy: Anatomy) -> Iterator[dict[str, Any]]:
    for site_id, values in table.values.items():
        errors = table.stderr.get(site_id, np.full(len(values), math.nan))
        about = _about(site_id, anatomy)
        for unit, value in enumerate(values):
            yield _row(table, about, unit, 1, float(value), float(errors[unit]))
        for place, value in enumerate(table.spans.get(site_id, ())):
            if place:
                yield _row(table, about, 0, place + 1, float(value), math.nan)
    for site_id, why in table.missing.items():
        known = _about(site_id, anatomy) if site_id not in table.values and "." in site_id else {"site": site_id}
        yield {**_row(table, known, 0, 1, math.nan, math.nan), "why": why}


def _row(table: Scores, about: Mapping[str, Any], unit: int, span: int, value: float, error: float) -> dict[str, Any]:
    named = {"measure": table.measure, "scale": table.unit}
    return {**about, **named, "unit": unit, "span": span, "value": value, "stderr": error}


def _about(site_id: str, anatomy: Anatomy) -> dict[str, Any]:
    try:
        site = anatomy.site(site_id)
    except InputError:
        return {"site": site_id}
    cost = anatomy.cost(site)
    return {
        "site": site_id, "kind": str(site.kind), "block": site.block, "parameters": cost.parameters,
        "bytes": cost.bytes, "macs": cost.macs, "kv_bytes": cost.kv_bytes,
    }  # fmt: skip


def _cells(measure: str, name: str, grid: Grid) -> Iterator[dict[str, Any]]:
    for row, numbers in zip(grid.rows, grid.values, strict=True):
        for column, value in zip(grid.columns, numbers, strict=True):
            yield {"measure": measure, "grid": name, "row": row, "column": column, "value": float(value)}


def read_survey(path: Path) -> dict[str, Scores]:
    """The scores of every measure in `survey.parquet`, grids left out."""
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"not a survey: {error}", where=path, hint="survey again") from None
    if "span" not in frame.columns:
        raise InputError("a survey of an older lamina", where=path, hint="survey again")
    return {str(name): _read(str(name), part) for (name,), part in frame.group_by(["measure"], maintain_order=True)}


def _read(measure: str, frame: pl.DataFrame) -> Scores:
    values: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    spans: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    columns = [frame[n].to_list() for n in ("site", "span", "value", "stderr", "why")]
    for site, span, value, stderr, why in zip(*columns, strict=True):
        if why is not None:
            missing[site] = why
        elif span == 1:
            values.setdefault(site, []).append(value)
            errors.setdefault(site, []).append(stderr)
        else:
            spans.setdefault(site, list(values[site])).append(value)
    whole = {s: spans.get(s, v) for s, v in values.items()} if spans else {}
    return Scores(
        measure=measure,
        values={s: _array(v) for s, v in values.items()},
        stderr={s: _array(v) for s, v in errors.items()},
        unit=frame["scale"][0] or "",
        spans={s: _array(v) for s, v in whole.items()},
        missing=missing,
    )


def _array(values: Sequence[float]) -> Array:
    return np.asarray(values, dtype=np.float64)
