"""A survey as lists for a terminal: the lowest sites, the agreement of the measures, their stability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lamina.core import registry
from lamina.core.errors import InputError
from lamina.core.papers import Need
from lamina.report.numbers import DASH, significant
from lamina.report.plots import clip
from lamina.report.scatter import correlation
from lamina.report.survey import TRUTH, Survey, groups
from lamina.report.views import TITLES, names, site_name

if TYPE_CHECKING:
    import polars as pl

FEW = 6
"""Up to so many measures each have a table of their own."""
MATRIX = 12
"""Up to so many measures stand in a matrix."""
LOWEST = 10
NAME, REASON = 26, 110
PASSES = {
    Need.NOTHING: "weights", Need.FORWARD: "forward", Need.GRADIENT: "backward", Need.ABLATION: "trials",
}  # fmt: skip
"""What a measure reads: the weights alone; one forward; a backward as well; forwards with sites taken out."""


@dataclass(frozen=True)
class Listing:
    """A table in plain text: a title, heads and rows, both of which may be empty, and lines below."""

    title: str = ""
    heads: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


def lowest(survey: Survey) -> list[Listing]:
    """The lowest sites by every measure: a table each, or all measures in one where there are many."""
    if len(survey.measures) > FEW:
        return [compact(survey)]
    return [listing for measure in survey.measures for listing in _measure(survey, measure)]


def _measure(survey: Survey, measure: str) -> list[Listing]:
    """One table for each group of sites that are ranked together."""
    if measure in survey.undefined:
        return [Listing(notes=(f"{measure}: not defined for this model: {survey.undefined[measure]}",))]
    kinds = survey.scored(measure)["kind"].unique().to_list()
    found = [_ranked(survey, measure, group) for group in groups([k for k in survey.kinds if k in kinds])]
    notes = _notes(survey, measure)
    if not found:
        return [Listing(notes=(f"{measure} scores no site", *notes))]
    return [*found[:-1], replace(found[-1], notes=notes)]


def _ranked(survey: Survey, measure: str, kinds: Sequence[str]) -> Listing:
    frame = survey.scored(measure, kinds)
    kind_of = dict(zip(frame["site"].to_list(), frame["kind"].to_list(), strict=True))
    scale = frame["scale"][0]
    shown = survey.rank(measure, kinds, lowest=LOWEST)
    rows = tuple(
        (
            site_name(row["site"], row["unit"], kind_of[row["site"]]),
            significant(row["value"]),
            significant(row["stderr"], 2) if math.isfinite(row["stderr"]) else "",
            _places(row["rank_low"], row["rank_high"]),
        )
        for row in shown.iter_rows(named=True)
    )
    unit = f", {scale}" if scale else ""
    many = f"{len(shown)} lowest of {len(frame)}" if len(frame) > len(shown) else f"all {len(frame)}, lowest first"
    heads = ("site", "score", "±", "rank, 95 %")
    shown_columns = len(heads) if any(row[2] for row in rows) else 2
    title = f"{measure}{unit}: {many} ({', '.join(kinds)})"
    return Listing(title, heads[:shown_columns], tuple(row[:shown_columns] for row in rows))


def _places(low: int | None, high: int | None) -> str:
    """An interval of ranks."""
    return "" if low is None else str(low) if low == high else f"{low}{DASH}{high}"


def _notes(survey: Survey, measure: str) -> tuple[str, ...]:
    """What a measure leaves out, by reason; and runs of blocks, if it scores them."""
    table = survey.table(measure)
    sites: dict[str, list[str]] = {}
    for site, why in zip(table["site"].to_list(), table["why"].to_list(), strict=True):
        if why is not None:
            sites.setdefault(why, []).append(site)
    notes = [f"  not scored: {names(found)}: {why}" for why, found in sites.items()]
    longest = table["span"].max()
    if isinstance(longest, int) and longest > 1:
        notes.append(f"  it also scores runs of 2 to {longest} blocks")
    return tuple(notes)


def compact(survey: Survey) -> Listing:
    """All measures in one table: what each scores, the three lowest, what passes it takes."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for measure in survey.measures:
        if measure in survey.undefined:
            notes.append(f"{measure}: not defined for this model: {survey.undefined[measure]}")
            continue
        frame = survey.scored(measure)
        kinds = [k for k in survey.kinds if k in set(frame["kind"].to_list())]
        first = _first(survey, measure, kinds, frame)
        rows.append((clip(measure, NAME), first, ", ".join(kinds), passes(measure)))
        notes += [f"{measure}:{note[1:]}" for note in _notes(survey, measure) if "not scored" in note]
    return Listing("", ("measure", "lowest three", "scores", "passes"), tuple(rows), tuple(notes))


def _first(survey: Survey, measure: str, kinds: Sequence[str], frame: pl.DataFrame) -> str:
    """The three lowest of the sublayers; where there are none, of the first group of kinds."""
    if not kinds:
        return ""
    ordered = sorted(groups(kinds), key=lambda g: g == ["block"])
    sublayers = [g for g in ordered if any(k in TITLES for k in g)]
    group = (sublayers or ordered)[0]
    kind_of = dict(zip(frame["site"].to_list(), frame["kind"].to_list(), strict=True))
    shown = frame.filter(frame["kind"].is_in(group)).sort("value", maintain_order=True).head(3)
    return ", ".join(
        site_name(site, unit, kind_of[site])
        for site, unit in zip(shown["site"].to_list(), shown["unit"].to_list(), strict=True)
    )


def passes(measure: str) -> str:
    """What a measure makes the lab do; nothing where it is not known here."""
    try:
        return PASSES[registry.MEASURES.card(measure).needs]
    except InputError:
        return ""


def agreement(survey: Survey) -> list[Listing]:
    """Rank correlations between the measures by kind: a matrix, or a list of pairs where there are many measures."""
    table = survey.compare()
    found: list[Listing] = []
    for kind in dict.fromkeys(table["kind"].to_list()):
        part = table.filter(table["kind"] == kind)
        here = set(part["measure"].to_list()) | set(part["other"].to_list())
        measures = [m for m in survey.measures if m in here]
        found.append(_matrix(kind, measures, part) if len(measures) <= MATRIX else _sorted_pairs(kind, part))
    note = "Spearman's correlation of the scores; intervals of all pairs: Survey.compare()"
    return [*found, Listing(notes=(note,))] if found else [Listing(notes=("no two measures score the same sites",))]


def _matrix(kind: str, measures: Sequence[str], part: pl.DataFrame) -> Listing:
    known: dict[tuple[str, str], str] = {}
    for a, b, value in part.select("measure", "other", "spearman").iter_rows():
        known[a, b] = known[b, a] = correlation(value)
    rows = tuple(
        (f"{n} {clip(name, NAME)}", *("·" if name == other else known.get((name, other), "") for other in measures))
        for n, name in enumerate(measures, 1)
    )
    heads = (f"{kind}, {_count(part)}", *(str(n) for n in range(1, len(measures) + 1)))
    return Listing("", heads, rows)


def _count(part: pl.DataFrame) -> str:
    low, high = (int(x) for x in (part["n"].to_numpy().min(), part["n"].to_numpy().max()))
    return f"{low} sites" if low == high else f"{low}{DASH}{high} sites"


def _sorted_pairs(kind: str, part: pl.DataFrame) -> Listing:
    """The pairs with the truth, then the most and the least alike of the others, each from high to low."""
    rows: list[tuple[str, ...]] = []
    part = part.filter(part["spearman"].is_finite()).sort("spearman", descending=True, maintain_order=True)
    truth = part.filter((part["measure"] == TRUTH) | (part["other"] == TRUTH))
    others = part.filter((part["measure"] != TRUTH) & (part["other"] != TRUTH))
    most, least = (10, 10) if len(others) > 20 else (len(others), 0)
    between = f"… {len(others) - most - least} pairs between" if least else ""
    for frame, lead in ((truth, ""), (others.head(most), ""), (others.tail(least), between)):
        if rows and len(frame):
            rows.append((lead, "", "", "", ""))
        for a, b, value, low, high, n in frame.drop("kind").iter_rows():
            left, right = (b, a) if b == TRUTH else (a, b)
            sure = f"{correlation(low)} to {correlation(high)}" if math.isfinite(low) else ""
            rows.append((clip(left, 34), clip(right, 34), correlation(value), sure, str(n)))
    return Listing(f"{kind}: how alike measures rank", ("measure", "and", "Spearman", "95 %", "sites"), tuple(rows))


def stability(survey: Survey) -> list[Listing]:
    """The stability of each measure's ranks, one table for parts of the text and one for seeds."""
    table = survey.stability()
    found: list[Listing] = []
    for variation, title in (("text", "on parts of the text"), ("seed", "with other seeds")):
        part = table.filter(table["variation"] == variation)
        if len(part) == 0:
            continue
        kinds = [k for k in survey.kinds if k in set(part["kind"].to_list())]
        known = {(m, k): (v, n) for m, k, v, n in part.select("measure", "kind", "spearman", "parts").iter_rows()}
        measures = dict.fromkeys(part["measure"].to_list())
        rows = tuple(
            (
                clip(m, NAME),
                str(max(known[m, k][1] for k in kinds if (m, k) in known)),
                *(correlation(known[m, k][0]) if (m, k) in known else "" for k in kinds),
            )
            for m in measures
        )
        found.append(Listing(f"Ranks {title}: mean Spearman between parts", ("measure", "parts", *kinds), rows))
    return found
