"""A run folder as it stands: documents and scores, each of them optional."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lamina.core.documents import Document, EvidenceFile, Plan, Receipts, Recipe
from lamina.core.errors import InputError
from lamina.core.sites import SUBLAYERS, Cost, Kind, depth_key

FILES = ("recipe.yaml", "plan.yaml", "survey.parquet", "receipts.json", "evidence.json")
COLUMNS = ("site", "kind", "block", "measure", "value", "stderr", "scale", "parameters", "bytes", "macs", "kv_bytes")
ABOUT = ("tokens", "seed", "fingerprint")
SHOWN = SUBLAYERS | {Kind.BLOCK}
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
    )


def read_survey(path: Path) -> SiteScores:
    """Scores of blocks and sublayers; several units of one site become their mean."""
    table = _columns(path)
    survey = SiteScores(about={name: tuple(dict.fromkeys(table[name])) for name in ABOUT})
    values: dict[tuple[str, str], list[tuple[float, float]]] = {}
    spans = table.get("span", [1] * len(table["site"]))
    for span, site, kind, _, measure, value, stderr, scale, *cost in zip(
        spans, *(table[c] for c in COLUMNS), strict=True
    ):
        if kind not in SHOWN or Place.of(site) is None or span != 1:
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


def _columns(path: Path) -> Mapping[str, Sequence[Any]]:
    """The columns as lists. pyarrow is imported in a third of the time that polars takes."""
    wanted = [*COLUMNS, *ABOUT]
    try:
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            import polars

            found = polars.read_parquet(path).to_dict(as_series=False)
        else:
            with ParquetFile(path) as file:
                found = file.read(use_threads=False).to_pydict()
    except Exception as error:  # both libraries raise their own kinds for a damaged file
        raise InputError(f"not a readable Parquet file: {error}", where=path, hint="run lamina survey again") from None
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError("no column " + ", ".join(missing), where=path, hint="run lamina survey again")
    return found
