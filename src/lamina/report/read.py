"""A run folder as it stands: documents and scores, each of them optional."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lamina.core.documents import Document, EvidenceFile, Plan, Receipts, Recipe
from lamina.core.errors import InputError
from lamina.core.menu import Menu, Solved, Times
from lamina.core.sites import SUBLAYERS, Cost, Kind, depth_key

FILES = ("recipe.yaml", "plan.yaml", "survey.parquet", "receipts.json", "evidence.json")
COLUMNS = ("site", "kind", "block", "measure", "value", "stderr", "scale", "parameters", "bytes", "macs", "kv_bytes")
ABOUT = ("tokens", "seed", "fingerprint")
SHOWN = SUBLAYERS | {Kind.BLOCK}
MANY = 300_000
UNITS = (Kind.HEAD, Kind.KV_GROUP, Kind.EXPERT, Kind.NEURON, Kind.CHANNEL)
D = TypeVar("D", bound=Document)
_SITE = re.compile(r"^(?:(?P<stack>.+)\.)?block\.(?P<block>\d+)(?:\.(?P<kind>[^.]+))?$")


@dataclass(frozen=True)
class Place:
    """Where a block or sublayer stands: its stack, its block and its kind."""

    id: str
    stack: str
    block: int
    kind: str

    @classmethod
    def of(cls, site: str) -> Place | None:
        """The place of a site id, or None where it lies inside a sublayer or outside the blocks."""
        found = _SITE.match(site)
        if found is None:
            return None
        return cls(site, found["stack"] or "", int(found["block"]), found["kind"] or Kind.BLOCK.value)

    @property
    def whole(self) -> str:
        """The id of the block that holds this place."""
        return f"{self.stack}.block.{self.block}" if self.stack else f"block.{self.block}"


@dataclass(frozen=True)
class Score:
    """One measure's word on one site; `stderr` is None where it is not defined."""

    value: float
    stderr: float | None


@dataclass
class SiteScores:
    """`survey.parquet`, blocks and sublayers only: measure → site → score, and what each site costs."""

    scores: dict[str, dict[str, Score]] = field(default_factory=dict[str, dict[str, Score]])
    scales: dict[str, str] = field(default_factory=dict[str, str])
    costs: dict[str, Cost] = field(default_factory=dict[str, Cost])
    kinds: dict[str, str] = field(default_factory=dict[str, str])
    about: dict[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])

    def inside(self, block: str) -> list[str]:
        """The sublayers of a block."""
        return [site for site in self.kinds if site.startswith(block + ".")]


@dataclass(frozen=True)
class Run:
    """All that a run folder holds; None for what is missing."""

    folder: Path
    recipe: Recipe | None
    plan: Plan | None
    survey: SiteScores | None
    receipts: Receipts | None
    evidence: EvidenceFile | None
    published: bool
    menu: Menu | None = None
    solved: Solved | None = None
    times: Mapping[str, Times] = field(default_factory=dict[str, Times])

    @property
    def model(self) -> str:
        """The model's name, from whichever document has it."""
        for document in (self.plan, self.receipts):
            if document is not None:
                return document.model.name
        return (self.recipe.model if self.recipe else "") or "unnamed model"


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises `InputError` where it holds no file of a run, or a broken one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("no such folder", where=folder, hint="give the run folder that `lamina thin` made")
    if not any((folder / name).is_file() for name in FILES):
        raise InputError("not a run folder", where=folder, hint="it holds none of " + ", ".join(FILES))

    def load(kind: type[D], name: str) -> D | None:
        return kind.load(folder / name) if (folder / name).is_file() else None

    survey = folder / "survey.parquet"
    return Run(
        folder=folder,
        recipe=load(Recipe, "recipe.yaml"),
        plan=load(Plan, "plan.yaml"),
        survey=read_survey(survey) if survey.is_file() else None,
        receipts=load(Receipts, "receipts.json"),
        evidence=load(EvidenceFile, "evidence.json"),
        published=(folder / "model").is_dir(),
        menu=load(Menu, "menu.json"),
        solved=load(Solved, "solved.json"),
        times={f"latency@{t.work}": t for t in map(Times.load, sorted(folder.glob("latency-*.json")))},
    )


def read_survey(path: Path) -> SiteScores:
    """Scores of blocks and sublayers; several units of one site become their mean."""
    whole = open_table(path)
    table = whole.rows(SHOWN, [*COLUMNS, *(c for c in ("span",) if c in whole.names)])
    survey = SiteScores(about={name: tuple(whole.values(name)) for name in ABOUT})
    values: dict[tuple[str, str], list[tuple[float, float]]] = {}
    spans = table.get("span", [1] * len(table["site"]))
    for span, site, kind, _, measure, value, stderr, scale, *cost in zip(
        spans, *(table[c] for c in COLUMNS), strict=True
    ):
        if Place.of(site) is None or span != 1:
            continue
        values.setdefault((measure, site), []).append((_number(value), _number(stderr)))
        survey.scales.setdefault(measure, scale or "")
        survey.kinds.setdefault(site, kind)
        survey.costs.setdefault(site, Cost(*(int(c or 0) for c in cost)))
    for (measure, site), rows in sorted(values.items(), key=lambda item: depth_key(item[0][1])):
        finite = [v for v, _ in rows if math.isfinite(v)]
        if finite:
            error = rows[0][1] if len(rows) == 1 else math.nan
            score = Score(sum(finite) / len(finite), error if math.isfinite(error) else None)
            survey.scores.setdefault(measure, {})[site] = score
    return survey


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Table:
    """A Parquet file, read by pyarrow, which is imported in a third of the time that polars takes; else by polars."""

    data: Any
    arrow: bool

    @property
    def names(self) -> list[str]:
        """The names of its columns."""
        return self.data.column_names if self.arrow else self.data.columns

    def rows(self, kinds: Collection[str], columns: Sequence[str]) -> dict[str, list[Any]]:
        """These columns of the sites of these kinds, as lists."""
        if not self.arrow:
            kept = self.data.filter(self.data["kind"].is_in([str(k) for k in kinds]))
            return kept.select(columns).to_dict(as_series=False)
        data = self.data.select(list(columns))
        if data.num_rows > MANY:  # else the import of pyarrow.compute takes longer than it spares
            data = data.filter(self._any(kinds))
        found = {name: data[name].to_pylist() for name in columns}
        here = [n for n, kind in enumerate(found["kind"]) if kind in kinds]
        return {name: [values[n] for n in here] for name, values in found.items()}

    def _any(self, kinds: Iterable[str]) -> Any:
        """Which rows are of sites of these kinds, kind by kind: pyarrow makes arrays of lists by way of pandas."""
        from functools import reduce

        from pyarrow import compute

        each = [compute.equal(self.data["kind"], str(k)) for k in kinds]  # type: ignore[attr-defined]
        return reduce(compute.or_, each)  # type: ignore[attr-defined]

    def values(self, column: str) -> list[Any]:
        """Every value of a column, once, in order."""
        series = self.data[column]
        return list(dict.fromkeys(series.to_pylist())) if self.arrow else series.unique(maintain_order=True).to_list()


def open_table(path: Path) -> Table:
    """A survey's file. Raises `InputError` for a damaged one, or one that lacks a column."""
    table = _opened(path)
    missing = [name for name in (*COLUMNS, *ABOUT) if name not in table.names]
    if missing:
        raise InputError("no column " + ", ".join(missing), where=path, hint="run lamina survey again")
    return table


def _opened(path: Path) -> Table:
    try:
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            import polars

            return Table(polars.read_parquet(path), arrow=False)
        with ParquetFile(path) as file:
            return Table(file.read(use_threads=False), arrow=True)
    except Exception as error:  # both libraries raise their own kinds for a damaged file
        raise InputError(f"not a readable Parquet file: {error}", where=path, hint="run lamina survey again") from None
