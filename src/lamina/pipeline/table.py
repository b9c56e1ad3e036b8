"""The survey as a tidy table: one row per measure, site and unit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lamina.core.errors import InputError
from lamina.core.files import atomic
from lamina.core.scores import Array, Scores

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy


def write_survey(
    path: Path, scores: Iterable[Scores], anatomy: Anatomy, *, tokens: int, seed: int, fingerprint: str
) -> None:
    """Write `survey.parquet`; runs of n blocks stand as unit n - 1 of their first block."""
    import polars as pl

    rows: list[dict[str, Any]] = []
    for table in scores:
        for site_id, values in table.values.items():
            site, cost = anatomy.site(site_id), anatomy.cost(site_id)
            units = table.spans.get(site_id, values)
            errors = table.stderr.get(site_id, np.full(len(values), np.nan))
            rows += [
                {
                    "site": site_id, "kind": str(site.kind), "block": site.block, "unit": unit,
                    "measure": table.measure,
                    "value": float(value), "stderr": float(errors[unit]) if unit < len(errors) else float("nan"),
                    "scale": table.unit, "parameters": cost.parameters, "bytes": cost.bytes, "macs": cost.macs,
                    "kv_bytes": cost.kv_bytes, "tokens": tokens, "seed": seed, "fingerprint": fingerprint,
                }
                for unit, value in enumerate(units)
            ]  # fmt: skip
    with atomic(path) as draft:
        pl.DataFrame(rows, infer_schema_length=None).write_parquet(draft)


def read_survey(path: Path) -> dict[str, Scores]:
    """The scores of every measure in `survey.parquet`."""
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"not a survey: {error}", where=path, hint="survey again") from None
    found = {}
    for (measure,), part in frame.group_by(["measure"], maintain_order=True):
        columns = {n: part[n].to_list() for n in ("site", "unit", "value", "stderr")}
        values: dict[str, list[float]] = {}
        errors: dict[str, list[float]] = {}
        for site, value, stderr in zip(columns["site"], columns["value"], columns["stderr"], strict=True):
            values.setdefault(site, []).append(value)
            errors.setdefault(site, []).append(stderr)
        spans = {s: _array(v) for s, v in values.items()} if any(columns["unit"]) else {}
        found[str(measure)] = Scores(
            measure=str(measure),
            values={s: _array(v[:1] if spans else v) for s, v in values.items()},
            stderr={s: _array(v[:1] if spans else v) for s, v in errors.items()},
            unit=part["scale"][0],
            spans=spans,
        )
    return found


def _array(values: list[float]) -> Array:
    return np.asarray(values, dtype=np.float64)
