"""Measures against the truth: one scatter for each, with error bars and rank correlations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lamina.report.numbers import MINUS, NONE, significant, span
from lamina.report.plots import FAINT, MARGIN, RULE, SOFT, clip, picture, words
from lamina.report.svg import Scale, el, ticks

STYLES = {"block": ("#1b1e4b", "square"), "attention": ("#2f78b4", "circle"), "mlp": ("#c4570c", "triangle")}
OTHERS = (("#2f8f6b", "diamond"), ("#8a4fa3", "square"), ("#6b6f78", "circle"), ("#a38a00", "triangle"))


@dataclass(frozen=True)
class Point:
    """One site in a scatter: score (x) and truth (y) with their standard errors, NaN where there is none."""

    name: str
    x: float
    y: float
    x_error: float = math.nan
    y_error: float = math.nan


@dataclass(frozen=True)
class Cloud:
    """The points of one kind of site and how the two rankings agree over all its sites."""

    kind: str
    points: tuple[Point, ...]
    spearman: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Panel:
    """One measure against the truth."""

    title: str
    x_name: str
    clouds: tuple[Cloud, ...]


@dataclass(frozen=True)
class _Frame:
    """The inside of one scatter: its corner, its size, and the scales of both axes."""

    x: float
    y: float
    width: float
    height: float
    across: Scale
    up: Scale

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a pair of values; what lies outside stands on the edge."""
        inner = 0.94
        share = (1 - inner) / 2
        right = self.x + self.width * (share + inner * self.across(x))
        return right, self.y + self.height * (1 - share - inner * self.up(y))


def scatter(panels: Sequence[Panel], truth: str, title: str, *, large: bool) -> Markup:
    """Measures against the truth, one panel each; small panels share the truth's axis."""
    per_line = min(len(panels), 3 if large else 5)
    width, height = (330.0, 290.0) if large else (188.0, 150.0)
    left, top, below = (74.0, 50.0, 52.0) if large else (14.0, 34.0, 34.0)
    margin = MARGIN - 10 if large else MARGIN + 44
    drawn = {cloud.kind for panel in panels for cloud in panel.clouds}
    kinds = [*(k for k in STYLES if k in drawn), *sorted(drawn - set(STYLES))]
    looks = styles(kinds)
    every = [p.y for panel in panels for cloud in panel.clouds for p in cloud.points]
    parts = [words(MARGIN, 27, title, size=14, weight=600), *_kinds_key(kinds, looks, MARGIN, 48)]
    for n, panel in enumerate(panels):
        x = margin + left + (n % per_line) * (left + width)
        y = 66 + top + (n // per_line) * (top + height + below)
        xs, ys = ([getattr(p, axis) for cloud in panel.clouds for p in cloud.points] for axis in "xy")
        frame = _Frame(x, y, width, height, Scale.of(xs), Scale.of(ys if large else every))
        parts.append(_panel(panel, frame, truth, looks, large=large, first=n % per_line == 0))
    lines = math.ceil(len(panels) / per_line)
    whole = margin + per_line * (left + width) + MARGIN
    foot = "bars: ± 1 standard error" if _has_errors(panels) else ""
    down = 66 + lines * (top + height + below) + 22
    parts.append(words(MARGIN, down - 10, foot, 10, colour=SOFT))
    return picture(max(whole, 420.0, MARGIN * 2 + 7.2 * len(title)), down, title, *parts)


def styles(kinds: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a shape for each kind of site."""
    others = [kind for kind in kinds if kind not in STYLES]
    return STYLES | {kind: OTHERS[n % len(OTHERS)] for n, kind in enumerate(others)}


def _has_errors(panels: Sequence[Panel]) -> bool:
    points = (point for panel in panels for cloud in panel.clouds for point in cloud.points)
    return any(math.isfinite(p.x_error) or math.isfinite(p.y_error) for p in points)


def _kinds_key(kinds: Sequence[str], looks: Mapping[str, tuple[str, str]], x: float, y: float) -> list[Markup]:
    parts: list[Markup] = []
    for kind in kinds:
        parts += [_mark(looks[kind], x + 5, y - 4, 4.5, 1.0), words(x + 14, y, kind, 11, colour=SOFT)]
        x += 14 + 6.2 * len(kind) + 18
    return parts


def _panel(
    panel: Panel, frame: _Frame, truth: str, looks: Mapping[str, tuple[str, str]], *, large: bool, first: bool
) -> Markup:
    """The frame, its ticks, the error bars below the points."""
    size = 12 if large else 11
    head = words(frame.x, frame.y - (26 if large else 19), clip(panel.title, 52 if large else 30), size, weight=600)
    box = el("rect", x=frame.x, y=frame.y, width=frame.width, height=frame.height, fill="#ffffff", stroke=RULE)
    parts = [head, _agreement(panel, frame, looks, large=large), box, *_ticks(frame, large=large, first=first or large)]
    dense = sum(len(cloud.points) for cloud in panel.clouds) > 300
    for cloud in panel.clouds:
        colour, _ = looks[cloud.kind]
        bars = [bar for p in cloud.points for bar in _bars(p, frame)]
        opacity = 0.15 if dense else 0.4
        parts.append(el("g", *bars, stroke=colour, stroke_width=1.0 if large else 0.7, stroke_opacity=opacity))
    radius = 3.6 if large and not dense else 2.4
    for cloud in panel.clouds:
        for p in cloud.points:
            mark = _mark(looks[cloud.kind], *frame.at(p.x, p.y), radius, 0.35 if dense else 0.85)
            parts.append(el("g", el("title", _tip(p, panel.x_name, truth)), mark))
    if large:
        middle = frame.y + frame.height / 2
        turned = f"rotate(-90 {frame.x - 54:g} {middle:g})"
        below = frame.y + frame.height + 34
        parts.append(words(frame.x + frame.width / 2, below, panel.x_name, 11, "middle", SOFT))
        parts.append(el("g", words(frame.x - 54, middle, truth, 11, "middle", SOFT), transform=turned))
    elif first:
        middle = frame.y + frame.height / 2
        turned = f"rotate(-90 {frame.x - 42:g} {middle:g})"
        parts.append(el("g", words(frame.x - 42, middle, clip(truth, 26), 10, "middle", SOFT), transform=turned))
    return el("g", *parts)


def _agreement(panel: Panel, frame: _Frame, looks: Mapping[str, tuple[str, str]], *, large: bool) -> Markup:
    """Spearman's correlation of each kind, in its colour."""
    runs: list[Markup] = []
    for n, cloud in enumerate(panel.clouds):
        lead = el("tspan", "Spearman", fill=SOFT) if n == 0 else Markup("")
        shown = correlation(cloud.spearman)
        if large:
            sure = f" [{span(correlation(cloud.low), correlation(cloud.high))}]" if math.isfinite(cloud.low) else ""
            shown += f"{sure}, {cloud.n} sites"
        runs += [lead, el("tspan", shown, fill=looks[cloud.kind][0], font_weight=600, dx=5 if n == 0 else 8)]
    y = frame.y - (9 if large else 6)
    said = "\n".join(
        f"{c.kind}: Spearman {correlation(c.spearman)}, 95 % {correlation(c.low)} to {correlation(c.high)}, {c.n} sites"
        for c in panel.clouds
    )
    words = el("text", *runs, x=frame.x, y=y, font_size=11 if large else 10)
    return el("g", el("title", said), words)


def correlation(value: float) -> str:
    """Two decimals with a real minus sign; a dash where there is no correlation."""
    return NONE if not math.isfinite(value) else f"{value:.2f}".replace("-0.00", "0.00").replace("-", MINUS)


def _tip(point: Point, x_name: str, truth: str) -> str:
    sides = ((x_name, point.x, point.x_error), (truth, point.y, point.y_error))
    told = (
        f"{name}: {significant(value)}" + (f" ± {significant(error, 2)}" if math.isfinite(error) else "")
        for name, value, error in sides
    )
    return "\n".join((point.name, *told))


def _bars(point: Point, frame: _Frame) -> list[Markup]:
    found: list[Markup] = []
    for dx, dy in ((point.x_error, 0.0), (0.0, point.y_error)):
        if math.isfinite(dx) and math.isfinite(dy) and dx + dy > 0:
            (x1, y1), (x2, y2) = frame.at(point.x - dx, point.y - dy), frame.at(point.x + dx, point.y + dy)
            found.append(el("line", x1=x1, y1=y1, x2=x2, y2=y2))
    return found


def _mark(look: tuple[str, str], x: float, y: float, r: float, opacity: float) -> Markup:
    """A point; kinds differ by shape as well as by colour."""
    colour, shape = look
    paint = {"fill": colour, "fill_opacity": opacity, "stroke": "#ffffff", "stroke_width": 0.5}
    if shape == "circle":
        return el("circle", cx=x, cy=y, r=r, **paint)
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "triangle": ((0.0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
        "diamond": ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
    }[shape]
    points = " ".join(f"{x + r * dx:.2f},{y + r * dy:.2f}" for dx, dy in corners)
    return el("polygon", points=points, **paint)


def _ticks(frame: _Frame, *, large: bool, first: bool) -> list[Markup]:
    """Grid lines with their numbers: below each panel, and beside the first of a line."""
    size = 10 if large else 9
    parts: list[Markup] = []
    for value in scale_ticks(frame.across, 0.17 if large else 0.26):
        x, _ = frame.at(value, frame.up.low)
        bottom = frame.y + frame.height
        parts.append(el("line", x1=x, y1=frame.y, x2=x, y2=bottom, stroke=FAINT))
        parts.append(words(x, bottom + 14, tick_label(value), size, "middle", SOFT))
    for value in scale_ticks(frame.up, 0.12 if large else 0.2):
        _, y = frame.at(frame.across.low, value)
        parts.append(el("line", x1=frame.x, y1=y, x2=frame.x + frame.width, y2=y, stroke=FAINT))
        if first:
            parts.append(words(frame.x - 5, y + 3.4, tick_label(value), size, "end", SOFT))
    return parts


def scale_ticks(scale: Scale, gap: float) -> list[float]:
    """Round numbers on a scale, at least `gap` of its length apart; powers of ten come first where it is bent."""
    if scale.high <= scale.low:
        return [scale.low]
    if scale.how == "linear":
        wanted = ticks(scale.low, scale.high, max(2, int(1 / gap) + 1))
    else:
        sizes = [abs(v) for v in (scale.low, scale.high) if v]
        powers = range(math.floor(math.log10(min([*sizes, scale.bend]))), math.ceil(math.log10(max(sizes))) + 1)
        tens = [10.0**p for p in reversed(powers)]
        finer = [m * t for m in (3, 2, 5) for t in tens]
        signs = (1, -1) if scale.low < 0 else (1,)
        wanted = [0.0, *(s * v for v in tens for s in signs), *(s * v for v in finer for s in signs)]
    found: list[float] = []
    for value in wanted:
        if scale.low <= value <= scale.high and all(abs(scale(value) - scale(other)) >= gap for other in found):
            found.append(value)
    return found


def tick_label(value: float) -> str:
    """A round number, short."""
    text = f"{value:.4g}"
    return significant(value, 1) if "e" in text else text.replace("-", MINUS)
