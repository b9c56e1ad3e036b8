"""Survey files written by hand: the columns that `lamina survey` writes, with any number of measures and blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

TEXTS = ("site", "kind", "measure", "scale", "fingerprint", "why")
WHOLES = ("block", "unit", "span", "parameters", "bytes", "macs", "kv_bytes", "tokens", "seed")
SCHEMA: dict[str, Any] = {
    **dict.fromkeys(TEXTS, pl.String), **dict.fromkeys(WHOLES, pl.Int64), "value": pl.Float64, "stderr": pl.Float64,
}  # fmt: skip
UNITS = {"head": ("attention", 9), "neuron": ("mlp", 40)}


def row(measure: str, site: str, kind: str | None, value: float, **more: Any) -> dict[str, Any]:
    """One row of survey.parquet."""
    block = next((int(p) for p in site.split(".") if p.isdigit()), None)
    head = {"measure": measure, "site": site, "kind": kind, "block": block, "value": value}
    tail = {"unit": 0, "span": 1, "stderr": math.nan, "scale": "", "tokens": 4096, "seed": 0, "fingerprint": "sha256:0"}
    costs = {"parameters": 10, "bytes": 20, "macs": 10, "kv_bytes": 0}
    return {**head, **tail, **costs, "why": None, **more}


def write(folder: Path, rows: Sequence[dict[str, Any]], parts: Sequence[Any] = (), grids: Sequence[Any] = ()) -> Path:
    """A run folder with these rows; parts as (measure, site, unit, value, variation, part), grids as
    (measure, grid, row, column, value)."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [{name: r[name] for name in SCHEMA} for r in rows]
    pl.DataFrame(columns, schema=SCHEMA).write_parquet(folder / "survey.parquet")
    if parts:
        named = ["measure", "site", "unit", "value", "variation", "part"]
        pl.DataFrame(parts, schema=named, orient="row").write_parquet(folder / "survey-parts.parquet")
    if grids:
        named = ["measure", "grid", "row", "column", "value"]
        pl.DataFrame(grids, schema=named, orient="row").write_parquet(folder / "survey-grids.parquet")
    return folder


def truth(block: int, depth: int, kind: str) -> float:
    """A plausible rise of the loss: large at both ends."""
    at = block / max(depth - 1, 1)
    edges = 4 * math.exp(-at * depth / 1.5) + 1.2 * math.exp(-(1 - at) * depth)
    base = {"attention": 0.05, "mlp": 0.11, "block": 0.18}[kind]
    return edges * (2 if kind != "attention" else 1) + base * (1 + 0.6 * math.sin(2.7 * block + len(kind)))


def many(folder: Path, *, measures: int = 8, depth: int = 12, seed: int = 0) -> Path:
    """`leave-one-out` and noisier measures of other scales; one without some sites, one of heads, one undefined;
    three parts of the text, two seeds, one grid."""
    draw = np.random.default_rng(seed)
    kinds = ("block", "attention", "mlp")
    rows: list[dict[str, Any]] = []
    parts: list[tuple[Any, ...]] = []
    for n in range(measures - 3):
        name = "leave-one-out" if n == 0 else f"measure-{n}" + ("-with-a-rather-long-name-indeed" if n % 7 == 3 else "")
        for kind in kinds if n % 3 != 1 else kinds[1:]:
            for b in range(depth):
                site = f"block.{b}" + ("" if kind == "block" else f".{kind}")
                sound = truth(b, depth, kind)
                value = sound * math.exp(0.25 * n * draw.normal()) * 10.0 ** (n % 5 - 2) - (0.05 if n % 4 == 3 else 0)
                if n == 2 and kind == "mlp" and b % 5 == 4:
                    rows.append(row(name, site, kind, math.nan, why="its inputs are not linear maps"))
                    continue
                scale = "nats" if n == 0 else ""
                error = math.nan if n % 4 == 2 else 0.2 * abs(value)
                rows.append(row(name, site, kind, value, stderr=error, scale=scale))
                parts += [(name, site, 0, value + error * draw.normal(), "text", p) for p in range(3) if n % 4 != 2]
                parts += [(name, site, 0, value * (1 + 0.1 * draw.normal()), "seed", p) for p in range(2)]
    for kind, (owner, width) in UNITS.items():
        for b in range(depth):
            site = f"block.{b}.{owner}.{kind}"
            values = draw.gamma(2.0, size=width)
            rows += [row(f"{kind}-size", site, kind, float(v), unit=u, stderr=0.1) for u, v in enumerate(values)]
    rows.append(row("of-text", "", None, math.nan, why="the model has no tokens, and this measure reads what they are"))
    rows.append(row(f"measure-{measures - 4}", "head", None, math.nan, why="defined on whole sublayers alone"))
    grids = [("leave-one-out", "pairs", f"row {r}", f"column {c}", r * 10.0 + c) for r in range(2) for c in range(3)]
    return write(folder, rows, parts, grids)
