"""Small parts of SVG: elements, the colour scale and axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

LEVELS = 24
"""Steps of the palette; each is a CSS class `q0` (low) … `q23` (high)."""

LIGHT = ("#f4edcd", "#d3dfb4", "#93c4a8", "#4f9ca5", "#2f6d98", "#283f78", "#1b1e4b")
DARK = ("#292c50", "#2b4a7d", "#2d7293", "#47999c", "#82bd9f", "#c5d9a6", "#f7eec4")
"""Low to high. Luminance is monotonic and the hue runs yellow–blue, so both palettes survive every common kind of
colour blindness and grey printing; in either scheme a low score recedes into the page."""


def el(name: str, *children: object, **attributes: object) -> Markup:
    """One element; children and attributes are escaped, `class_` and `stroke_width` become CSS names."""
    parts = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(short(value) if isinstance(value, float) else value)}"'
        for key, value in attributes.items()
        if value is not None
    ]
    inner = "".join(escape(child) for child in children if child is not None)
    return Markup(f"<{name}{''.join(parts)}>{inner}</{name}>" if inner else f"<{name}{''.join(parts)}/>")


def join(parts: Sequence[Markup]) -> Markup:
    """Elements side by side."""
    return Markup("").join(parts)


def short(value: float) -> str:
    """A coordinate: at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> Markup:
    """A line of text at (x, y)."""
    return el("text", content, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def palette(stops: Sequence[str]) -> list[str]:
    """The palette's colours, low to high."""
    return [mix(stops, i / (LEVELS - 1)) for i in range(LEVELS)]


def palette_css(stops: Sequence[str], inside: str = "") -> str:
    """CSS rules `.q0{…}` for the whole palette, for drawings and for boxes, below the selector `inside`."""
    rows = enumerate(palette(stops))
    return "".join(f"{inside}.q{i}{{fill:{colour};background-color:{colour}}}" for i, colour in rows)


def mix(stops: Sequence[str], at: float) -> str:
    """The colour at a place in 0 … 1 of a palette."""
    place = at * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    pair = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops[left : left + 2]]
    share = place - left
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*pair, strict=True))


@dataclass(frozen=True)
class Scale:
    """Scores → palette.

    Logarithmic where all are positive and span more than a factor of twelve; with a sign change and a
    wide span, an inverse hyperbolic sine; else linear.
    """

    low: float
    high: float
    how: str
    bend: float = 1.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """The scale that spreads these values."""
        low, high = min(values), max(values)
        if low > 0 and high / low > 12:
            return cls(low, high, "log")
        sizes = sorted(abs(v) for v in values)
        middle = sizes[len(sizes) // 2]
        if middle > 0 and sizes[-1] / middle > 12:
            return cls(low, high, "signed log", middle)
        return cls(low, high, "linear")

    def __call__(self, value: float) -> float:
        """The place of a value in 0 … 1."""
        low, high, here = (self._bend(v) for v in (self.low, self.high, value))
        return 0.5 if high <= low else min(1.0, max(0.0, (here - low) / (high - low)))

    def at(self, place: float) -> float:
        """The value at a place in 0 … 1."""
        low, high = self._bend(self.low), self._bend(self.high)
        here = low + (high - low) * place
        if self.how == "log":
            return math.exp(here)
        return math.sinh(here) * self.bend if self.how == "signed log" else here

    def level(self, value: float) -> str:
        """The CSS class of a value."""
        return f"q{round(self(value) * (LEVELS - 1))}"

    def _bend(self, value: float) -> float:
        if self.how == "log":
            return math.log(max(value, 1e-300))
        return math.asinh(value / self.bend) if self.how == "signed log" else value


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers inside [low, high], at most `most` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / max(1, most - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
