"""The strip: every block from left to right, one row per kind of sublayer, coloured by score.

What the plan takes out is pulled out of its slot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lamina.core.documents import Plan
from lamina.core.sites import Kind, depth_key
from lamina.report.numbers import count, data, macs, significant
from lamina.report.read import Place, Run, Score, SiteScores
from lamina.report.svg import LEVELS, Scale, el, join, line, text

FAMILIES = (
    (Kind.BLOCK,),
    (Kind.ATTENTION, Kind.MIXER),
    (Kind.CROSS_ATTENTION,),
    (Kind.MLP, Kind.MOE),
)
"""Rows of the strip. Two kinds share a row where no block has both."""
NAMES = {"attention": "Attention", "cross_attention": "Cross-att.", "mlp": "MLP", "moe": "MoE", "mixer": "Mixer"}
PITCH, LABELS = 32.0, 68.0


@dataclass(frozen=True)
class Marks:
    """What the plan does with each site: the number of its step and the rewrite, and what is protected."""

    steps: Mapping[str, tuple[int, str]]
    protected: frozenset[str]

    @classmethod
    def of(cls, plan: Plan | None) -> Marks:
        """The marks of a plan; none without one."""
        if plan is None:
            return cls({}, frozenset())
        steps = {site: (n, step.rewrite) for n, step in enumerate(plan.steps, 1) for site in step.sites}
        return cls(steps, frozenset(plan.budget.protect))

    def fate(self, place: Place, inside: Sequence[str] = ()) -> tuple[str, str]:
        """The class of a cell (`dropped`, `changed`, `part`, `protected` or `kept`) and the words for it."""
        for site, within in ((place.id, ""), (place.whole, f" with {place.whole}")):
            if site in self.steps:
                step, rewrite = self.steps[site]
                state = "dropped" if rewrite == "drop" else "changed"
                return state, f"{'dropped' if state == 'dropped' else rewrite}{within} (step {step})"
        gone = [site for site in inside if self.steps.get(site, (0, ""))[1] == "drop"]
        if place.kind == Kind.BLOCK and gone:
            return ("dropped", "all its sublayers dropped") if len(gone) == len(inside) else ("part", "partly dropped")
        if place.id in self.protected or place.whole in self.protected:
            return "protected", "protected, kept"
        return "kept", "kept"


@dataclass(frozen=True)
class Stack:
    """One stack of one panel, cut into lines of blocks that a narrow screen can wrap."""

    name: str
    chunks: tuple[tuple[Markup, Markup], ...]
    per_line: int
    columns: str
    narrow: str
    width: int


@dataclass(frozen=True)
class Panel:
    """One measure's strip."""

    measure: str
    unit: str
    blocks: bool
    stacks: tuple[Stack, ...]
    legend: Markup

    @property
    def width(self) -> int:
        """The widest stack, in pixels."""
        return max((stack.width for stack in self.stacks), default=0)


@dataclass(frozen=True)
class _Look:
    """Geometry: a large strip with drawers for what is out, or a small multiple without."""

    cell: float
    drawer: float
    gap: float = 3.0
    top: float = 18.0

    @property
    def width(self) -> float:
        """The width of a cell."""
        return PITCH - self.gap


LARGE, SMALL = _Look(cell=28, drawer=23), _Look(cell=13, drawer=0, gap=2, top=15)


def panels(run: Run, measure: str) -> list[Panel]:
    """The strip of `measure`, then one small multiple per other measure. Without a survey: the plan alone."""
    marks = Marks.of(run.plan)
    survey = run.survey or SiteScores()
    order = [measure, *(m for m in survey.scores if m != measure)]
    drawn = (_panel(survey, name, marks, main=i == 0) for i, name in enumerate(order))
    return [panel for panel in drawn if panel.stacks]


def _panel(survey: SiteScores, measure: str, marks: Marks, *, main: bool) -> Panel:
    scores = survey.scores.get(measure, {})
    scale = Scale.of([s.value for s in scores.values()]) if scores else None
    places = _places(survey, scores, marks, main=main)
    look = LARGE if main else SMALL
    if not any(marks.fate(p)[0] == "dropped" for p in places.values()):
        look = _Look(look.cell, 0, look.gap, look.top)
    pen = _Pen(survey, measure, scores, scale, marks, look)
    stacks: dict[str, list[Place]] = {}
    for place in places.values():
        stacks.setdefault(place.stack, []).append(place)
    return Panel(
        measure=measure,
        unit=_unit(survey.scales.get(measure, ""), scale),
        blocks=any(p.kind == Kind.BLOCK for p in places.values()),
        stacks=tuple(pen.stack(name, members) for name, members in stacks.items()),
        legend=legend(scale, survey.scales.get(measure, "")) if scale else Markup(""),
    )


def _unit(unit: str, scale: Scale | None) -> str:
    """What stands behind the measure's name: its unit, and the colour scale where it is not linear."""
    how = f"{scale.how} scale" if scale and scale.how != "linear" else ""
    return ", ".join(part for part in (f"in {unit}" if unit else "", how) if part)


def _places(survey: SiteScores, scores: Mapping[str, Score], marks: Marks, *, main: bool) -> dict[str, Place]:
    """The cells of a panel: what the measure scores; in the main panel also what the plan touches."""
    shown = {p.kind for p in map(Place.of, scores) if p}
    if main:
        touched = {p.kind for p in map(Place.of, (*marks.steps, *marks.protected)) if p}
        shown |= touched if not shown else touched - {Kind.BLOCK.value}
    known = {*survey.kinds, *scores, *(marks.steps if main else ())}
    places = ((site, Place.of(site)) for site in sorted(known, key=depth_key))
    return {site: place for site, place in places if place and place.kind in shown}


@dataclass(frozen=True)
class _Pen:
    """Draws one panel."""

    survey: SiteScores
    measure: str
    scores: Mapping[str, Score]
    scale: Scale | None
    marks: Marks
    look: _Look

    def stack(self, name: str, places: Sequence[Place]) -> Stack:
        """A stack as chunks of blocks with their row labels."""
        rows = rows_of(places)
        depth = 1 + max(p.block for p in places)
        size, per_line = chunking(depth)
        cells = {(r, p.block): p for r, (_, kinds) in enumerate(rows) for p in places if p.kind in kinds}
        labels = self._labels([label for label, _ in rows])
        chunks = tuple(
            (labels, self._chunk(range(first, min(first + size, depth)), size, len(rows), cells))
            for first in range(0, depth, size)
        )
        columns = f"{LABELS:g}fr repeat({per_line},{size * PITCH:g}fr)"
        narrow = f"{LABELS:g}fr {size * PITCH:g}fr"
        width = round((LABELS + size * PITCH * per_line) * (1.25 if depth <= 16 else 1.06))
        return Stack(name, chunks, per_line, columns, narrow, width)

    def _tops(self, rows: int) -> list[float]:
        """The top of each row. The last row's drawer opens downwards, every other's upwards."""
        tops, y = [], self.look.top
        for row in range(rows):
            y += self.look.drawer if row < rows - 1 else 0
            tops.append(y)
            y += self.look.cell + self.look.gap
        return tops

    def _height(self, rows: int) -> float:
        return self._tops(rows)[-1] + self.look.cell + self.look.drawer + 3

    def _labels(self, rows: Sequence[str]) -> Markup:
        height = self._height(len(rows))
        tops = self._tops(len(rows))
        words = [text(0, y + self.look.cell / 2 + 4, label, "row") for y, label in zip(tops, rows, strict=True)]
        head = text(0, self.look.top - 7, "Block", "tick")
        return el("svg", head, *words, viewBox=f"0 0 {LABELS:g} {height:g}", class_="labels", aria_hidden="true")

    def _chunk(self, blocks: range, size: int, rows: int, cells: Mapping[tuple[int, int], Place]) -> Markup:
        parts: list[Markup] = []
        out = 0
        for column, block in enumerate(blocks):
            x = column * PITCH + self.look.gap / 2
            here = [(row, cells[row, block]) for row in range(rows) if (row, block) in cells]
            drawn = [self._cell(x, row, rows, place) for row, place in here]
            gone = sum(state == "dropped" for _, state in drawn)
            out += gone
            whole = bool(drawn) and gone == len(drawn)
            style = "tick out" if whole else "tick"
            tick = text(x + self.look.width / 2, self.look.top - 7, str(block), style, "middle")
            parts += [tick, *(mark for mark, _ in drawn)]
        label = f"Blocks {blocks[0]} to {blocks[-1]} by {self.measure}: {out} of their cells dropped"
        box = f"0 0 {size * PITCH:g} {self._height(rows):g}"
        return el("svg", *parts, viewBox=box, role="img", aria_label=label)

    def _cell(self, x: float, row: int, rows: int, place: Place) -> tuple[Markup, str]:
        """One site: its colour, its fate and its tooltip."""
        look, width = self.look, self.look.width
        y = self._tops(rows)[row]
        state, words = self.marks.fate(place, self.survey.inside(place.id))
        score = self.scores.get(place.id)
        fill = self.scale.level(score.value) if score and self.scale else "unscored"
        parts = [el("title", self._tooltip(place, score, words))]
        if state == "dropped" and look.drawer:
            parts.append(el("rect", x=x + 0.5, y=y + 0.5, width=width - 1, height=look.cell - 1, rx=3, class_="slot"))
            height = look.drawer - 4
            y = y - look.drawer + 1 if row < rows - 1 else y + look.cell + 3
        else:
            height = look.cell
        radius = 3 if look.drawer else 2
        parts.append(el("rect", x=x, y=y, width=width, height=height, rx=radius, class_=f"cell {fill}"))
        parts += _mark(state, x, y, width, height)
        return el("g", *parts, class_=f"site {state}", data_site=place.id), state

    def _tooltip(self, place: Place, score: Score | None, words: str) -> str:
        unit = self.survey.scales.get(self.measure, "")
        lines = [place.id]
        if score is None:
            lines.append(f"{self.measure}: not scored")
        else:
            error = "" if score.stderr is None else f" ± {significant(score.stderr, 2)}"
            lines.append(f"{self.measure}: {significant(score.value)}{error} {unit}".rstrip())
        cost = self.survey.costs.get(place.id)
        if cost:
            lines.append(f"{count(cost.parameters)} parameters, {data(cost.bytes)}")
            lines.append(f"per token: {macs(cost.macs)} MACs, {data(cost.kv_bytes)} of KV cache")
        return "\n".join([*lines, words])


def _mark(state: str, x: float, y: float, width: float, height: float) -> list[Markup]:
    """What is drawn over a cell: a cross, a bar, an underline, or a dot."""
    if state == "dropped":
        high = height / 2 - min(4.0, height / 4)
        wide = min(width / 2 - 4, 1.6 * high)
        left, right = x + width / 2 - wide, x + width / 2 + wide
        top, bottom = y + height / 2 - high, y + height / 2 + high
        ends = ((left, top, right, bottom), (left, bottom, right, top))
        return [line(*end, name) for name in ("halo", "cross") for end in ends]
    if state == "changed":
        low = y + height - min(3.0, height / 4)
        return [line(x + 5, low, x + width - 5, low, "halo"), line(x + 5, low, x + width - 5, low, "fitted")]
    if state == "part":
        end = (x + 4, y + height / 2, x + width - 4, y + height / 2)
        return [line(*end, "halo"), line(*end, "cross")]
    if state == "protected":
        return [el("circle", cx=x + width / 2, cy=y + height / 2, r=min(4.0, height / 4), class_="keep")]
    return []


def rows_of(places: Sequence[Place]) -> list[tuple[str, tuple[str, ...]]]:
    """The rows that these places need, with their labels."""
    blocks: dict[str, set[int]] = {}
    for place in places:
        blocks.setdefault(place.kind, set()).add(place.block)
    rows: list[tuple[str, tuple[str, ...]]] = []
    for family in FAMILIES:
        here = [k.value for k in family if k.value in blocks]
        names = [NAMES.get(k, k.capitalize()) for k in here]
        if len(here) == 2 and not blocks[here[0]] & blocks[here[1]]:
            rows.append((" / ".join("Att." if n == "Attention" else n for n in names), tuple(here)))
        else:
            rows += [(name, (kind,)) for name, kind in zip(names, here, strict=True)]
    return rows


def chunking(depth: int) -> tuple[int, int]:
    """Blocks per chunk and chunks per line: at most 40 blocks in a line, at most 14 in a chunk."""
    lines = math.ceil(depth / 40)
    line = math.ceil(depth / lines)
    per_line = next(k for k, most in ((1, 14), (2, 24), (3, 33), (4, 40)) if line <= most)
    return math.ceil(line / per_line), per_line


def legend(scale: Scale, unit: str) -> Markup:
    """The palette with the scores at its ends and its middle."""
    width = 260.0
    step = width / LEVELS
    bars = [el("rect", x=i * step, y=0, width=step, height=10, class_=f"q{i}") for i in range(LEVELS)]
    places = (0.0, 0.5, 1.0) if scale.high > scale.low else (0.0,)
    anchors = {0.0: "start", 0.5: "middle", 1.0: "end"}
    words = [text(width * at, 24, significant(scale.at(at), 2), "tick", anchors[at]) for at in places]
    label = f"Colour scale from {significant(scale.low)} to {significant(scale.high)} {unit}, {scale.how}"
    return el("svg", join(bars), *words, viewBox="0 0 260 28", role="img", aria_label=label, class_="legend")
