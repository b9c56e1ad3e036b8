"""Pictures of a survey as SVG files of their own: what they share, and the heat map of ranks.

Colours stand in the elements, so that a picture looks the same in a page, in a notebook and in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lamina.report.svg import LIGHT, el, join, mix

FONT = 'system-ui, "Segoe UI", "Liberation Sans", "DejaVu Sans", Arial, sans-serif'
PAPER, INK, SOFT, RULE, FAINT = "#fcfbf8", "#1d2026", "#5b616b", "#dedbd2", "#f2f0e9"
MARGIN = 16.0
LETTER = 5.9
"""The mean width of a letter at 11 pixels."""
NAME = 34
"""Letters of a measure's name that are shown."""


@dataclass(frozen=True)
class Cell:
    """One site: `place` is its rank within its row as 0 (least) … 1, None where it has no score."""

    block: int
    place: float | None
    rank: int
    note: str


@dataclass(frozen=True)
class Row:
    """One measure on one kind of site; `note` tells its range."""

    name: str
    cells: tuple[Cell, ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """The rows of one kind of site in one stack of `depth` blocks."""

    title: str
    depth: int
    rows: tuple[Row, ...]


def clip(words: str, letters: int) -> str:
    """At most so many letters, with an ellipsis where some are gone."""
    return words if len(words) <= letters else words[: letters - 1].rstrip() + "…"


def heatmap(sections: Sequence[Section], notes: Sequence[tuple[str, str]], title: str) -> Markup:
    """Measures × depth, coloured by rank within the row; `notes` tell what has no row, and why."""
    rows = [row for section in sections for row in section.rows]
    names = max((len(clip(row.name, NAME)) for row in rows), default=10)
    left = MARGIN + LETTER * names + 10
    deepest = max((section.depth for section in sections), default=1)
    wide = max(5.0, min(34.0, max(720.0 / deepest, min(12.5, 1100.0 / deepest))))
    high = 20.0 if len(rows) <= 15 else 16.0 if len(rows) <= 45 else 13.0
    right = left + _column(deepest, wide) + 10
    ranges = LETTER * max((len(row.note) for row in rows), default=0)
    width = max(right + ranges + MARGIN, 460.0)
    parts: list[Markup] = [words(MARGIN, 27, title, size=14, weight=600), *_key(MARGIN, 42)]
    y = 74.0
    for section in sections:
        parts.append(_section(section, left, y, wide, high, right))
        y += 32 + high * len(section.rows) + 12
    parts.append(_notes(notes, y + 14, width))
    height = y + (32 + 15 * len(notes) if notes else 4) + 8
    hatch = el("path", d="M-1,1 l2,-2 M0,5 l5,-5 M4,6 l2,-2", stroke="#b9b5a8", stroke_width=1.0)
    under = el("rect", width=5, height=5, fill=FAINT)
    pattern = el("pattern", under, hatch, id="lamina-hatch", width=5, height=5, patternUnits="userSpaceOnUse")
    return picture(width, height, title, el("defs", pattern), *parts)


def _column(block: int, wide: float) -> float:
    """The left edge of a block's column; every ten blocks stand a little apart."""
    return block * wide + (block // 10) * 3


def _section(section: Section, left: float, y: float, wide: float, high: float, right: float) -> Markup:
    """One kind of site: its name, the numbers of the blocks, a row for each measure."""
    every = next((n for n in (1, 2, 5, 10, 20) if n * wide >= 17), 50)
    parts = [words(MARGIN, y + 12, section.title, size=12, weight=600)]
    numbers = ((left + _column(block, wide) + wide / 2, str(block)) for block in range(0, section.depth, every))
    parts += [words(x, y + 26, number, 10, "middle", SOFT) for x, number in numbers]
    y += 32
    for row in section.rows:
        middle = y + high / 2 + 3.6
        parts.append(el("g", el("title", row.name), words(left - 8, middle, clip(row.name, NAME), 11, "end")))
        parts += [_cell(cell, left + _column(cell.block, wide), y, wide, high) for cell in row.cells]
        parts.append(words(right, middle, row.note, 10, colour=SOFT))
        y += high
    return el("g", *parts)


def _cell(cell: Cell, x: float, y: float, wide: float, high: float) -> Markup:
    """One site; the three least of a row are numbered, or dotted where the cell is small."""
    gap = 1.0
    fill = "url(#lamina-hatch)" if cell.place is None else mix(LIGHT, cell.place)
    box = {"x": x, "y": y, "width": wide - gap, "height": high - gap}
    # the lightest colours are near the paper's, so every cell has a thin edge
    edge = {"stroke": "#1d2026", "stroke_opacity": 0.18, "stroke_width": 0.5}
    parts = [el("title", cell.note), el("rect", **box, fill=fill, **edge)]
    if 1 <= cell.rank <= 3 and cell.place is not None and cell.place < 0.4:
        x, y = x + (wide - gap) / 2, y + (high - gap) / 2
        if wide >= 11 and high >= 12:
            parts.append(words(x, y + 3.2, str(cell.rank), 9, "middle", weight=600))
        else:
            parts.append(el("circle", cx=x, cy=y, r=1.4, fill=INK))
    return el("g", *parts)


def _key(x: float, y: float) -> list[Markup]:
    """The palette and the hatching, in words."""
    step, n = 4.0, 24
    start = x + 190
    shades = (mix(LIGHT, i / (n - 1)) for i in range(n))
    bar = [el("rect", x=start + i * step, y=y, width=step + 0.2, height=9, fill=f) for i, f in enumerate(shades)]
    after = start + n * step + 6
    hatched = el("rect", x=after + 76, y=y, width=16, height=9, fill="url(#lamina-hatch)", stroke=RULE)
    return [
        words(x, y + 8, "rank within the row:", 10, colour=SOFT),
        words(start - 6, y + 8, "least, goes first", 10, "end", SOFT),
        *bar,
        words(after, y + 8, "most", 10, colour=SOFT),
        hatched,
        words(after + 98, y + 8, "no score", 10, colour=SOFT),
    ]


def _notes(notes: Sequence[tuple[str, str]], y: float, width: float) -> Markup:
    """What has no row, one line for each reason."""
    if not notes:
        return Markup("")
    letters = int((width - 2 * MARGIN) / 5.2)
    lines = [words(MARGIN, y, "Without a row", 12, weight=600)]
    for n, (names, why) in enumerate(notes, 1):
        line = words(MARGIN, y + 4 + 15 * n, clip(f"{names}: {why}", letters), 10, colour=SOFT)
        lines.append(el("g", el("title", f"{names}: {why}"), line))
    return join(lines)


def words(
    x: float, y: float, content: str, size: float = 11, anchor: str = "start", colour: str = INK, weight: int = 400
) -> Markup:
    """A line of text."""
    return el(
        "text", content, x=x, y=y, font_size=size, fill=colour,
        text_anchor=None if anchor == "start" else anchor, font_weight=None if weight == 400 else weight,
    )  # fmt: skip


def picture(width: float, height: float, label: str, *parts: Markup) -> Markup:
    """A whole SVG file on paper."""
    paper = el("rect", width=width, height=height, fill=PAPER)
    return el(
        "svg", paper, *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=round(width), height=round(height), role="img", aria_label=label, font_family=FONT,
        style="max-width:100%;height:auto",
    )  # fmt: skip
