"""Scores: what a measure says of each site, higher = keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lamina.core.sites import Site, depth_key

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A diagnostic that is no score: `values` [rows, columns] with the names of both, such as a map of layers."""

    values: Array
    rows: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One measure's table.

    `values[site]` has shape `[width]`, float64, higher = keep; `stderr[site]` is its standard error over
    sequences (NaN where it is not defined). `unit` is `nats` where the score is an expected rise of the
    loss. `spans[site][n-1]`, where a measure gives it, scores the n contiguous blocks that begin at `site`.
    `grids` are maps and curves that the measure finds beside its scores; `missing` tells of a site, or a kind of
    sites, why it has no score.
    """

    measure: str
    values: Mapping[str, Array]
    stderr: Mapping[str, Array] = field(default_factory=dict[str, Array])
    unit: str = ""
    spans: Mapping[str, Array] = field(default_factory=dict[str, Array])
    grids: Mapping[str, Grid] = field(default_factory=dict[str, Grid])
    missing: Mapping[str, str] = field(default_factory=dict[str, str])

    def __getitem__(self, site: Site | str) -> float:
        """The score of a site of width 1, or the mean over its units."""
        return float(np.mean(self.values[site if isinstance(site, str) else site.id]))

    def __contains__(self, site: object) -> bool:
        return (site.id if isinstance(site, Site) else site) in self.values

    def ranked(self) -> list[str]:
        """Site ids, lowest score first; ties in depth order."""
        return sorted(self.values, key=lambda s: (self[s], depth_key(s)))

    def to_data(self) -> dict[str, Any]:
        """The table in plain data; numbers that are none are told as null."""
        tables = {
            name: {s: _plain(v) for s, v in getattr(self, name).items()} for name in ("values", "stderr", "spans")
        }
        grids = {k: [_plain(row) for row in g.values] for k, g in self.grids.items()}
        named = {k: [list(g.rows), list(g.columns), grids[k]] for k, g in self.grids.items()}
        return {"measure": self.measure, "unit": self.unit, "missing": dict(self.missing), **tables, "grids": named}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """The table from plain data."""
        tables = {name: {s: _array(v) for s, v in data[name].items()} for name in ("values", "stderr", "spans")}
        grids = {
            k: Grid(values=np.array([_array(r) for r in v], dtype=np.float64), rows=tuple(rows), columns=tuple(columns))
            for k, (rows, columns, v) in data["grids"].items()
        }
        return cls(measure=data["measure"], unit=data["unit"], missing=data["missing"], grids=grids, **tables)

    @classmethod
    def none(cls, measure: str, why: str) -> Self:
        """The table of a measure that is not defined for a model."""
        return cls(measure=measure, values={}, missing={"": why})


def _plain(values: Array) -> list[float | None]:
    return [float(v) if math.isfinite(v) else None for v in values]


def _array(values: list[float | None]) -> Array:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)
