"""The other charts: cost bars, dot-and-whisker intervals, and the loss of a healing run. All inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lamina.report.numbers import TIMES, fixed, significant
from lamina.report.svg import el, join, line, short, text, ticks

WIDTH = 400.0
LEFT, RIGHT = 8.0, 8.0
RATIOS = (0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 50.0)


@dataclass(frozen=True)
class Dot:
    """One estimate: a dot with a whisker where it has an interval; hollow where it is a prediction."""

    label: str
    value: float
    shown: str
    low: float | None = None
    high: float | None = None
    predicted: bool = False
    note: str = ""


def bars(before: float, after: float) -> Markup:
    """What is left of a cost (filled) of what there was (outline)."""
    most = max(before, after, 1e-300)
    whole = el("rect", x=0.5, y=2.5, width=max(0.0, 199 * before / most), height=11, class_="bar-was")
    left = el("rect", x=0.5, y=2.5, width=max(0.0, 199 * after / most), height=11, class_="bar-is")
    return el("svg", whole, left, viewBox="0 0 200 16", preserveAspectRatio="none", aria_hidden="true", class_="bars")


def share_bar(share: float) -> Markup:
    """A small bar in a table: a share of the largest row."""
    bar = el("rect", x=0, y=3, width=100 * min(1.0, max(0.0, share)), height=8, class_="bar-is")
    return el("svg", bar, viewBox="0 0 100 14", preserveAspectRatio="none", aria_hidden="true", class_="bars")


def intervals(dots: Sequence[Dot], *, reference: float, log: bool, name: str, reference_name: str) -> Markup:
    """Dots with 95 % whiskers on one axis; `reference` is where nothing changed."""
    ends = [x for d in dots for x in (d.value, d.low, d.high) if x is not None and math.isfinite(x)]
    axis = _Axis.around([*ends, reference], log=log)
    row = 44.0
    base = 14.0 + row * len(dots)
    parts: list[Markup] = []
    last = -99.0
    for tick in axis.ticks:
        x = axis(tick)
        parts += [line(x, 33 + row * i, x, 47 + row * i, "grid") for i in range(len(dots))]
        if x - last >= 32:
            label = (TIMES if log else "") + short(tick) if log else significant(tick, 2) if tick else "0"
            anchor = "start" if x < 20 else "end" if x > WIDTH - 20 else "middle"
            parts.append(text(x, base + 15, label, "tick", anchor))
            last = x
    zero = axis(reference)
    parts += [line(zero, 31 + row * i, zero, 49 + row * i, "reference") for i in range(len(dots))]
    parts += [_dot(d, axis, 14 + row * i) for i, d in enumerate(dots)]
    anchor = "start" if zero < 30 else "end" if zero > WIDTH - 30 else "middle"
    parts.append(text(zero, base + 29, reference_name, "tick", anchor))
    label = name + ": " + "; ".join(f"{d.label} {d.shown}" for d in dots)
    box = f"0 0 {WIDTH:g} {base + 34:g}"
    return el("svg", *parts, viewBox=box, role="img", aria_label=label, class_="chart")


def _dot(dot: Dot, axis: _Axis, y: float) -> Markup:
    """One row: label and number above, whisker and dot below."""
    middle = y + 26
    parts = [
        el("title", f"{dot.label}: {dot.shown}" + (f"\n{dot.note}" if dot.note else "")),
        text(0, y + 12, dot.label, "label"),
        text(WIDTH, y + 12, dot.shown, "label number", "end"),
    ]
    if dot.low is not None and dot.high is not None:
        left, right = axis(dot.low), axis(dot.high)
        parts += [line(left, middle, right, middle, "whisker")]
        parts += [line(x, middle - 4, x, middle + 4, "whisker") for x in (left, right)]
    class_ = "dot predicted" if dot.predicted else "dot"
    parts.append(el("circle", cx=axis(dot.value), cy=middle, r=4.5, class_=class_))
    return el("g", *parts)


@dataclass(frozen=True)
class _Axis:
    """A horizontal axis; logarithmic for ratios."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def around(cls, values: Sequence[float], *, log: bool) -> _Axis:
        low, high = min(values), max(values)
        if log:
            low, high = low / (high / low) ** 0.06 / 1.02, high * (high / low) ** 0.06 * 1.02
            return cls(low, high, True, tuple(r for r in RATIOS if low <= r <= high))
        margin = 0.06 * (high - low) or 1.0
        low, high = low - (margin if low < 0 else margin / 3), high + margin
        return cls(low, high, False, tuple(ticks(low, high)))

    def __call__(self, value: float) -> float:
        low, high, here = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return LEFT + (WIDTH - LEFT - RIGHT) * (here - low) / (high - low)


def curve(points: Sequence[tuple[float, float]]) -> Markup:
    """The loss over the steps of healing."""
    height, left, bottom = 170.0, 40.0, 142.0
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    margin = 0.08 * (high - low) or 0.5
    low, high = low - margin, high + margin
    reach = (xs[-1] - xs[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (WIDTH - left - RIGHT) * (x - xs[0]) / reach, bottom - (bottom - 8) * (y - low) / (high - low)

    parts: list[Markup] = []
    steps = ticks(low, high, 5)
    digits = max(0, min(4, 1 - math.floor(math.log10(steps[1] - steps[0])) - 1)) if len(steps) > 1 else 2
    for tick in steps:
        y = place(xs[0], tick)[1]
        parts += [line(left, y, WIDTH - RIGHT, y, "grid"), text(left - 6, y + 4, fixed(tick, digits), "tick", "end")]
    for tick in ticks(xs[0], xs[-1], 6):
        parts.append(text(place(tick, low)[0], bottom + 16, short(tick), "tick", "middle"))
    track = " ".join(f"{short(x)},{short(y)}" for x, y in (place(*p) for p in points))
    parts.append(el("polyline", points=track, class_="track"))
    parts += [el("circle", cx=x, cy=y, r=3.0, class_="dot") for x, y in (place(*points[0]), place(*points[-1]))]
    label = f"Loss from {significant(ys[0])} to {significant(ys[-1])} nats per token over {short(xs[-1])} steps"
    unit = text(WIDTH - RIGHT, height - 1, "step", "tick", "end")
    box = f"0 0 {WIDTH:g} {height:g}"
    return el("svg", join(parts), unit, viewBox=box, role="img", aria_label=label, class_="chart")
