"""A survey's rows as the parts of pictures: rows of the heat map, clouds of the scatters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina.core.errors import InputError
from lamina.core.sites import SUBLAYERS, Kind
from lamina.report import ranks
from lamina.report.numbers import significant
from lamina.report.plots import Cell, Row, Section
from lamina.report.scatter import Cloud, Panel, Point

if TYPE_CHECKING:
    from lamina.report.survey import Kinds, Survey

SITE = re.compile(r"^(?:(?P<stack>.+)\.)?block\.(?P<block>\d+)(?:\.(?P<rest>.+))?$")
TITLES = {
    "block": "Blocks", "attention": "Attention", "cross_attention": "Cross-attention", "mlp": "MLP",
    "moe": "Mixture of experts", "mixer": "Mixer",
}  # fmt: skip
UNITS = {
    "head": "Heads", "kv_group": "Groups of heads", "neuron": "Neurons", "channel": "Channels", "expert": "Experts",
}  # fmt: skip
POINTS = 2000
"""Points of one cloud at most; the correlation is that of all."""
Lane = tuple[str, str]
"""A stack and what its sites are called inside a block: one section of the heat map."""


@dataclass(frozen=True)
class _Mean:
    """One measure's score of one site, units averaged."""

    value: float
    stderr: float
    units: int
    unit: str


def sections(survey: Survey) -> tuple[list[Section], list[tuple[str, str]]]:
    """The heat map's rows by kind of site, and what has no row: the names and why."""
    means, whys = _means(survey), _whys(survey)
    lanes, kinds = _lanes(survey)
    depths: dict[str, int] = {}
    for (stack, _), sites in lanes.items():
        depths[stack] = max(depths.get(stack, 0), 1 + max(sites))
    found: list[Section] = []
    rowless: dict[str, list[str]] = {}
    for (stack, rest), sites in lanes.items():
        rows: list[Row] = []
        for measure in survey.measures:
            scores = {b: means[measure, s] for b, s in sites.items() if (measure, s) in means}
            if scores:
                rows.append(_row(measure, kinds[stack, rest], sites, scores, whys))
            else:
                reasons = (whys[measure, s] for s in sites.values() if (measure, s) in whys)
                for why in dict.fromkeys(reasons):
                    rowless.setdefault(why, []).append(f"{measure} ({'.'.join(p for p in (stack, rest) if p)})")
        if rows:
            found.append(
                Section(_title(stack, rest, kinds[stack, rest], several=len(depths) > 1), depths[stack], tuple(rows))
            )
    for (measure, site), why in whys.items():
        if SITE.match(site) is None:
            rowless.setdefault(why, []).append(f"{measure} ({site})" if site else measure)
    return found, [(", ".join(names), why) for why, names in rowless.items()]


def _title(stack: str, rest: str, kind: str, *, several: bool) -> str:
    name = TITLES.get(rest or "block", rest)
    if kind in UNITS:
        name = f"{UNITS[kind]} ({rest}), averaged within each block"
    return f"{stack or 'stack'}: {name}" if several else name


def _lanes(survey: Survey) -> tuple[dict[Lane, dict[int, str]], dict[Lane, str]]:
    """Every stack and kind of site → block → site, blocks and sublayers first; and → what kind that is."""
    found: dict[Lane, dict[int, str]] = {}
    kinds: dict[Lane, str] = {}
    table = survey.table()
    rows = dict.fromkeys(zip(table["site"].to_list(), table["kind"].to_list(), strict=True))
    for site, kind in rows:
        place = SITE.match(site)
        if place is not None:
            lane = place["stack"] or "", place["rest"] or ""
            found.setdefault(lane, {})[int(place["block"])] = site
            kinds[lane] = kinds.get(lane) or kind or ""
    stacks = list(dict.fromkeys(stack for stack, _ in found))
    order = {kind: n for n, kind in enumerate(survey.kinds)}
    ordered = sorted(found, key=lambda lane: (stacks.index(lane[0]), order.get(kinds[lane], 99), lane[1]))
    return {lane: dict(sorted(found[lane].items())) for lane in ordered}, kinds


def _means(survey: Survey) -> dict[tuple[str, str], _Mean]:
    import polars as pl

    told = survey.scored().group_by(["measure", "site"], maintain_order=True)
    told = told.agg(pl.col("value").mean(), pl.col("stderr").first(), pl.len().alias("units"), pl.col("scale").first())
    return {
        (row["measure"], row["site"]): _Mean(
            row["value"], row["stderr"] if row["units"] == 1 else math.nan, row["units"], row["scale"] or ""
        )
        for row in told.iter_rows(named=True)
    }


def _whys(survey: Survey) -> dict[tuple[str, str], str]:
    """(measure, site or kind) → why there is no score."""
    table = survey.table()
    rows = zip(*(table[name].to_list() for name in ("measure", "site", "why")), strict=True)
    return {(measure, site or ""): why for measure, site, why in rows if why is not None}


def _row(
    measure: str,
    kind: str,
    sites: Mapping[int, str],
    scores: Mapping[int, _Mean],
    whys: Mapping[tuple[str, str], str],
) -> Row:
    """One measure over the blocks: colour by mid-rank, numbers by the order in which sites go."""
    values = [mean.value for mean in scores.values()]
    n = len(values)
    middles = dict(zip(scores, ranks.midranks(values), strict=True))
    places = dict(zip(scores, ranks.order(values), strict=True))
    cells: list[Cell] = []
    for block, site in sites.items():
        mean = scores.get(block)
        if mean is None:
            why = whys.get((measure, site), whys.get((measure, kind), "not scored"))
            cells.append(Cell(block, None, 0, f"{measure}\n{site}: {why}"))
            continue
        error = f" ± {significant(mean.stderr, 2)}" if math.isfinite(mean.stderr) else ""
        told = f"{significant(mean.value)}{error} {mean.unit}".rstrip()
        units = f", mean of {mean.units} units" if mean.units > 1 else ""
        place = (middles[block] - 1) / (n - 1) if n > 1 else 0.5
        note = f"{measure}\n{site}: {told}{units}\nrank {places[block]} of {n}"
        cells.append(Cell(block, float(place), int(places[block]), note))
    unit = next(iter(scores.values())).unit
    span = f"{significant(min(values), 2)} to {significant(max(values), 2)} {unit}".rstrip()
    return Row(measure, tuple(cells), span)


def against(survey: Survey, truth: str, measure: str, kind: Kinds = None) -> list[Panel]:
    """One panel for each kind of site that both score."""
    clouds = _clouds(survey, truth, measure, kind)
    if not clouds:
        raise InputError(
            f"{measure} and {truth} score no sites in common",
            where=survey.folder,
            hint=survey.undefined.get(measure) or survey.undefined.get(truth) or "",
        )
    return [
        Panel(TITLES.get(cloud.kind, UNITS.get(cloud.kind, cloud.kind)), in_unit(survey, measure), (cloud,))
        for cloud in clouds
    ]


def in_unit(survey: Survey, measure: str) -> str:
    """The name of a measure with its unit."""
    scale = survey.scored(measure)["scale"]
    return f"{measure} ({scale[0]})" if len(scale) and scale[0] else measure


def each_against(survey: Survey, truth: str, kind: Kinds = None) -> list[Panel]:
    """One panel for each other measure, those that agree best with the truth first."""
    found: list[tuple[float, Panel]] = []
    for measure in survey.measures:
        clouds = _clouds(survey, truth, measure, kind) if measure != truth else []
        if clouds:
            known = [c.spearman for c in clouds if math.isfinite(c.spearman)]
            agreement = sum(known) / len(known) if known else -2.0
            found.append((agreement, Panel(measure, in_unit(survey, measure), tuple(clouds))))
    if not found:
        raise InputError(
            f"no other measure scores a site that {truth} scores",
            where=survey.folder,
            hint=survey.undefined.get(truth, ""),
        )
    return [panel for _, panel in sorted(found, key=lambda pair: -pair[0])]


def _clouds(survey: Survey, truth: str, measure: str, kind: Kinds) -> list[Cloud]:
    import polars as pl

    columns = ["kind", "site", "unit", "value", "stderr"]
    mine = survey.scored(measure, kind).select(columns)
    both = mine.join(survey.scored(truth, kind).select(columns), on=columns[:3], maintain_order="left", suffix="_true")
    found: list[Cloud] = []
    for name in survey.kinds:
        part = both.filter(pl.col("kind") == name)
        if len(part) == 0:
            continue
        value, n = ranks.spearman(part["value"].to_numpy(), part["value_true"].to_numpy())
        low, high = ranks.interval(value, n)
        shown = part.gather_every(max(1, math.ceil(len(part) / POINTS)))
        points = tuple(_point(row, name) for row in shown.iter_rows(named=True))
        found.append(Cloud(name, points, value, low, high, n))
    return found


def _point(row: Mapping[str, Any], kind: str) -> Point:
    name = site_name(row["site"], row["unit"], kind)
    return Point(name, row["value"], row["value_true"], row["stderr"], row["stderr_true"])


def site_name(site: str, unit: int, kind: str) -> str:
    """What a row is called: a block or a sublayer by its site, a unit with its number."""
    return site if kind in SUBLAYERS or kind in (Kind.BLOCK, Kind.LINEAR, Kind.NORM) else f"{site}[{unit}]"


def names(sites: Sequence[str], most: int = 4) -> str:
    """Some sites in a line."""
    more = f" and {len(sites) - most} more" if len(sites) > most else ""
    return ", ".join(sites[:most]) + more
