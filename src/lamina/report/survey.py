"""A survey as people use it: tables, ranks with intervals, agreement of measures, stability, pictures."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from lamina.core.errors import InputError, did_you_mean
from lamina.core.files import write_text
from lamina.core.scores import Grid, Scores
from lamina.core.sites import SUBLAYERS, Kind, depth_key
from lamina.report import ranks

if TYPE_CHECKING:
    import polars as pl

SURVEY, PARTS, GRIDS = "survey.parquet", "survey-parts.parquet", "survey-grids.parquet"
TRUTH = "leave-one-out"
NEEDED = ("site", "kind", "block", "unit", "span", "measure", "value", "stderr", "scale", "why")
ORDER = (Kind.BLOCK, Kind.ATTENTION, Kind.CROSS_ATTENTION, Kind.MIXER, Kind.MLP, Kind.MOE)
Kinds = str | Sequence[str] | None


class Survey(Mapping[str, Scores]):
    """The scores of a run folder: `survey[measure]` is a `Scores`, the methods give polars tables and SVG.

    Raises `InputError` where the folder has no survey, or a broken or an older one.
    """

    def __init__(self, folder: Path, frame: pl.DataFrame, parts: pl.DataFrame | None, grids: pl.DataFrame | None):
        self.folder = folder
        self._frame, self._parts, self._grids = frame, parts, grids

    @classmethod
    def open(cls, folder: str | Path) -> Survey:
        """The survey of a run folder."""
        folder = Path(folder)
        path = folder / SURVEY
        if not path.is_file():
            raise InputError("no survey", where=path, hint="run lamina survey first")
        frame = _read(path)
        assert frame is not None
        lost = [name for name in NEEDED if name not in frame.columns]
        if lost:
            raise InputError("no column " + ", ".join(lost), where=path, hint="survey again")
        return cls(folder, frame, _read(folder / PARTS), _read(folder / GRIDS))

    @cached_property
    def _tables(self) -> dict[str, Scores]:
        from lamina.pipeline.table import read_survey

        found = read_survey(self.folder / SURVEY)
        grids: dict[str, dict[str, Grid]] = {}
        for measure, name in self.grids:
            grids.setdefault(measure, {})[name] = self.grid(measure, name)
        return {name: dataclasses.replace(table, grids=grids.get(name, {})) for name, table in found.items()}

    @cached_property
    def _depth(self) -> dict[str, int]:
        """Every site's place in depth order."""
        return {site: n for n, site in enumerate(sorted(set(self._frame["site"].to_list()), key=depth_key))}

    def __getitem__(self, measure: str) -> Scores:
        if measure not in self.measures:
            raise KeyError(f"no measure {measure!r} in this survey: {did_you_mean(str(measure), self.measures)}")
        return self._tables[measure]

    def __iter__(self) -> Iterator[str]:
        return iter(self.measures)

    def __len__(self) -> int:
        return len(self.measures)

    def __repr__(self) -> str:
        return f"Survey({str(self.folder)!r}: {len(self)} measures of {len(self._depth)} sites)"

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """The measures that were asked for, in the survey's order; those of `undefined` are among them."""
        return tuple(dict.fromkeys(self._frame["measure"].to_list()))

    @cached_property
    def undefined(self) -> dict[str, str]:
        """Measures that are not defined for this model, and why."""
        rows = zip(*(self._frame[name].to_list() for name in ("measure", "site", "why")), strict=True)
        return {measure: why for measure, site, why in rows if not site and why is not None}

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that some measure scores: blocks, their sublayers, then what lies inside."""
        import polars as pl

        found = self._frame.filter(pl.col("value").is_finite())["kind"].drop_nulls().unique().to_list()
        return tuple(sorted(found, key=lambda k: (ORDER.index(k) if k in ORDER else len(ORDER), k)))

    @property
    def grids(self) -> tuple[tuple[str, str], ...]:
        """The (measure, name) of every diagnostic map or curve."""
        if self._grids is None:
            return ()
        return tuple(dict.fromkeys(zip(self._grids["measure"].to_list(), self._grids["grid"].to_list(), strict=True)))

    def table(self, measure: str | None = None, kind: Kinds = None) -> pl.DataFrame:
        """The tidy rows: one per measure, site, unit and span, in nats where `scale` says so, else in no unit.

        `span` is 1 for the site itself, n for the n contiguous blocks that begin at it. Where `value` is NaN, `why`
        says why the measure does not score the site.
        """
        import polars as pl

        frame = self._frame
        if measure is not None:
            self._known(measure)
            frame = frame.filter(pl.col("measure") == measure)
        wanted = self._wanted(kind)
        return frame if wanted is None else frame.filter(pl.col("kind").is_in(wanted))

    def scored(self, measure: str | None = None, kind: Kinds = None) -> pl.DataFrame:
        """The rows of `table` that hold a score of a site itself, in depth order."""
        import polars as pl

        frame = self.table(measure, kind).filter(pl.col("value").is_finite() & (pl.col("span") == 1))
        place = pl.col("site").replace_strict(self._depth, return_dtype=pl.Int64)
        return frame.sort(place, "unit", maintain_order=True).with_columns(pl.col("stderr").fill_null(math.nan))

    def rank(self, measure: str, kind: Kinds = None, *, lowest: int | None = None) -> pl.DataFrame:
        """The sites of one kind, or all that the measure scores, ranked: rank 1 has the least score and goes first.

        Columns: site, unit, value, stderr, rank, and rank_low and rank_high, the 95 % interval of the rank among
        these sites by 1000 seeded draws of value + stderr·N(0, 1); null where the score has no standard error. Ties
        rank in depth order. `lowest` gives so many rows only. Empty where the measure scores none of these.
        """
        import polars as pl

        frame = self.scored(measure, kind)
        values, errors = frame["value"].to_numpy(), frame["stderr"].to_numpy()
        low, high = ranks.rank_intervals(values, errors, lowest=lowest)
        made = frame.select("site", "unit", "value", "stderr").with_columns(
            pl.Series("rank", ranks.order(values), dtype=pl.Int64),
            pl.Series("rank_low", low).fill_nan(None).cast(pl.Int64),
            pl.Series("rank_high", high).fill_nan(None).cast(pl.Int64),
        )
        return made.sort("rank").head(len(made) if lowest is None else lowest)

    def compare(self, kind: Kinds = None) -> pl.DataFrame:
        """How alike the measures rank sites: Spearman's correlation of each pair, for each kind apart.

        Columns: kind, measure, other, spearman, low, high (95 % by Fisher's z with the variance of Bonett and Wright,
        see `ranks.interval`), n: the sites, or units, that both score. Every pair stands once; pairs with fewer than
        three sites are left out. Neighbouring sites are no independent draws: the interval tells how far so few sites
        settle the correlation, not what another model would give.
        """
        rows: list[dict[str, Any]] = []
        for name in self._each(kind):
            measures, columns = _wide(self.scored(kind=name), "measure")
            for i, j in itertools.combinations(range(len(measures)), 2):
                value, n = ranks.spearman(columns[:, i], columns[:, j])
                if n >= 3:
                    low, high = ranks.interval(value, n)
                    pair = {"kind": name, "measure": measures[i], "other": measures[j]}
                    rows.append({**pair, "spearman": value, "low": low, "high": high, "n": n})
        return _frame(rows, ("kind", "measure", "other"), ("spearman", "low", "high"), ("n",))

    def stability(self) -> pl.DataFrame:
        """How alike a measure ranks the sites on other parts of the text, and with other seeds.

        Columns: measure, kind, variation ("text" or "seed"), spearman: the mean over all pairs of parts of their
        rank correlation, parts: how many parts, n: the sites or units. Parts of the text are smaller than the whole,
        so that their scores are noisier than the survey's own. Empty where the survey did not ask for it.
        """
        import polars as pl

        rows: list[dict[str, Any]] = []
        for kind in self.kinds if self._parts is not None else ():
            assert self._parts is not None
            sites = self.scored(kind=kind)["site"].unique()
            here = self._parts.filter(pl.col("site").is_in(sites.implode()))
            for (measure, variation), part in here.group_by(["measure", "variation"], maintain_order=True):
                names, columns = _wide(part, "part")
                pairs = itertools.combinations(range(len(names)), 2)
                values = (ranks.spearman(columns[:, i], columns[:, j])[0] for i, j in pairs)
                finite = [value for value in values if math.isfinite(value)]
                if finite:
                    row = {"measure": measure, "kind": kind, "variation": variation}
                    rows.append({**row, "spearman": float(np.mean(finite)), "parts": len(names), "n": len(columns)})
        return _frame(rows, ("measure", "kind", "variation"), ("spearman",), ("parts", "n"))

    def grid(self, measure: str, name: str) -> Grid:
        """A diagnostic map or curve that a measure found beside its scores, with the names of rows and columns."""
        import polars as pl

        self._known(measure)
        here = [grid for owner, grid in self.grids if owner == measure]
        if name not in here or self._grids is None:
            raise InputError(f"{measure} has no grid named {name!r}", hint=did_you_mean(name, here))
        part = self._grids.filter((pl.col("measure") == measure) & (pl.col("grid") == name))
        named = [{n: i for i, n in enumerate(dict.fromkeys(part[side].to_list()))} for side in ("row", "column")]
        values = np.full((len(named[0]), len(named[1])), math.nan)
        for row, column, value in zip(*(part[c].to_list() for c in ("row", "column", "value")), strict=True):
            values[named[0][row], named[1][column]] = math.nan if value is None else value
        return Grid(values=values, rows=tuple(named[0]), columns=tuple(named[1]))

    def heatmap(self, path: str | Path | None = None) -> str:
        """Measures × depth as SVG, coloured by rank within each row so that measures of any scale compare.

        Sites without a score are hatched, the reason in their tooltip. Written to `path` where one is given.
        """
        from lamina.report.plots import heatmap
        from lamina.report.views import sections

        return _written(heatmap(*sections(self), "Measures by depth"), path)

    def scatter(
        self, truth: str = TRUTH, measure: str | None = None, path: str | Path | None = None, *, kind: Kinds = None
    ) -> str:
        """A measure against the truth as SVG, one panel for each kind of site; without `measure`, a small panel each.

        Bars are one standard error, titles have Spearman's correlation of each kind. Written to `path` where one is
        given. Raises `InputError` where the survey does not hold the truth, or no site that both score.
        """
        from lamina.report.scatter import scatter
        from lamina.report.views import against, each_against, in_unit

        self._known(truth, "as the truth")
        if measure is None:
            panels, title = each_against(self, truth, kind), f"All measures against {truth}"
        else:
            self._known(measure)
            panels, title = against(self, truth, measure, kind), f"{measure} against {truth}"
        return _written(scatter(panels, in_unit(self, truth), title, large=measure is not None), path)

    def _repr_html_(self) -> str:
        """A compact table and the heat map."""
        from lamina.report.listing import compact

        listing = compact(self)
        head = Markup("").join(Markup("<th style='text-align:left'>{}</th>").format(h) for h in listing.heads)
        rows = Markup("").join(
            Markup("<tr>{}</tr>").format(
                Markup("").join(Markup("<td style='text-align:left'>{}</td>").format(cell) for cell in row)
            )
            for row in listing.rows
        )
        notes = Markup("").join(Markup("<div>{}</div>").format(escape(note)) for note in listing.notes)
        table = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, rows)
        return str(Markup("<div>{}{}{}</div>").format(table, notes, Markup(self.heatmap())))

    def _known(self, measure: str, role: str = "") -> None:
        if measure not in self.measures:
            role = f" {role}" if role else ""
            raise InputError(
                f"no measure named {measure!r} in this survey{role}",
                where=self.folder,
                hint=did_you_mean(measure, self.measures) + "; lamina survey --measures adds others",
            )

    def _wanted(self, kind: Kinds) -> list[str] | None:
        if kind is None:
            return None
        asked = [str(kind)] if isinstance(kind, str) else [str(k) for k in kind]
        known = {*(str(k) for k in Kind), *self.kinds}
        for name in asked:
            if name not in known:
                raise InputError(f"no kind of site named {name!r}", hint=did_you_mean(name, known))
        return asked

    def _each(self, kind: Kinds) -> list[str]:
        wanted = self._wanted(kind)
        return [k for k in self.kinds if wanted is None or k in wanted]


def groups(kinds: Sequence[str]) -> list[list[str]]:
    """Kinds whose sites are ranked together: blocks; the sublayers; each other kind by itself."""
    together = [k for k in kinds if k in SUBLAYERS]
    return [g for g in ([k for k in kinds if k == Kind.BLOCK], together) if g] + [
        [k] for k in kinds if k not in SUBLAYERS and k != Kind.BLOCK
    ]


def _written(drawn: Markup, path: str | Path | None) -> str:
    if path is not None:
        write_text(Path(path), str(drawn) + "\n")
    return str(drawn)


def _read(path: Path) -> pl.DataFrame | None:
    """A Parquet file, or None where there is none."""
    import polars as pl

    if not path.is_file():
        return None
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"not a readable survey: {error}", where=path, hint="survey again") from None


def _wide(frame: pl.DataFrame, by: str) -> tuple[list[Any], np.ndarray]:
    """The names of the columns and the values [sites and units, columns], NaN where there is none."""
    names = list(dict.fromkeys(frame[by].to_list()))
    if not names:
        return [], np.empty((0, 0))
    wide = frame.pivot(on=by, index=["site", "unit"], values="value", aggregate_function="first", maintain_order=True)
    columns = [wide[str(name)].cast(float).fill_null(math.nan).to_numpy() for name in names]
    return names, np.stack(columns, axis=1)


def _frame(
    rows: list[dict[str, Any]], texts: Sequence[str], reals: Sequence[str], wholes: Sequence[str]
) -> pl.DataFrame:
    import polars as pl

    types: dict[Any, Any] = dict.fromkeys(texts, pl.String)
    types |= dict.fromkeys(reals, pl.Float64) | dict.fromkeys(wholes, pl.Int64)
    return pl.DataFrame(rows, schema=types)
