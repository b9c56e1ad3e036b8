"""The frontier of plans and the reasons of one plan, as lists and as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from lamina.core.menu import Frontier, Reason
from lamina.report.listing import Listing
from lamina.report.numbers import DASH, count, data, named, percent, significant
from lamina.report.plots import INK, MARGIN, RULE, SOFT, picture, words
from lamina.report.svg import el, ticks

LINE, KNEE, HERE = "#2f6d98", "#c4570c", "#1d2026"
WIDTH, HEIGHT = 640.0, 380.0
Place = Callable[[float, float], tuple[float, float]]
"""(share kept, nats) → pixels."""


def amount(value: float, resource: str) -> str:
    """An amount of a resource as people read it."""
    if resource.startswith("latency"):
        return f"{significant(1000 * value)} ms"
    return data(value) if "bytes" in resource else count(value)


def frontier_listing(found: Frontier) -> Listing:
    """One row for each plan: what stays, what that should cost, and of how many moves of each rewrite it consists."""
    resource, whole = found.resource, found.whole
    rows = tuple(
        (
            percent(1 - p.freed / whole) if whole else DASH,
            amount(whole - p.freed, resource),
            significant(p.damage),
            ", ".join(f"{n} {k}" for k, n in sorted(p.uses.items(), key=lambda x: -x[1])),
            "knee" if p.knee else "",
        )
        for p in found.points
    )
    title = f"the cheapest plans for ever smaller budgets of {named(resource)}"
    return Listing(title, ("kept", named(resource), "predicted, nats/token", "moves", ""), rows)


def reasons_listing(reasons: Sequence[Reason], resources: Sequence[str]) -> Listing:
    """One row for each step of a plan, the dearest to do without first."""
    rows = [
        (
            " ".join(r.option.groups),
            r.option.name,
            significant(r.damage),
            ", ".join(amount(r.option.saves.get(x, 0.0), x) for x in resources),
            "no plan" if math.isinf(r.more) else f"+{significant(max(r.more, 0.0))}",
            "" if math.isinf(r.more) else r.second,
        )
        for r in sorted(reasons, key=lambda r: -r.more)
    ]
    frees = "frees " + ", ".join(named(x) for x in resources)
    heads = ("where", "what", "price, nats", frees, "without it", "instead, there")
    note = "without it: by how many nats the cheapest plan that does not do this is dearer, all else chosen anew"
    return Listing("why each step", heads, tuple(rows), (note,))


def frontier_picture(found: Frontier, here: tuple[float, float] | None = None) -> Markup:
    """What stays of a resource (share) against the predicted rise of the loss (nats, logarithmic); the knee is marked,
    and the plan `here` (what it frees, what it should cost).
    """
    points, resource, whole = found.points, found.resource, found.whole
    left, right, top, bottom = 74.0, WIDTH - 24, 56.0, HEIGHT - 52
    shown = [(1 - p.freed / whole, max(p.damage, 1e-5)) for p in points]
    plan = (1 - here[0] / whole, max(here[1], 1e-5)) if here else None
    every = [*shown, *([plan] if plan else [])]
    low, high = (f(math.log10(y) for _, y in every) for f in (min, max))
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    least = max(0.0, min(x for x, _ in every) - 0.04)

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (right - left) * (1 - x) / (1 - least)
        return across, bottom - (bottom - top) * (math.log10(y) - low) / (high - low)

    title = f"Cheapest plans by {named(resource)}"
    parts = [words(MARGIN, 27, title, size=14, weight=600), *_axes(left, right, top, bottom, least, (low, high), at)]
    path = " ".join(f"{'L' if n else 'M'}{x:.1f},{y:.1f}" for n, (x, y) in enumerate(at(*p) for p in shown))
    parts.append(el("path", d=path, fill="none", stroke=LINE, stroke_width=1.6))
    for point, place in zip(points, shown, strict=True):
        x, y = at(*place)
        note = f"{percent(place[0])} kept, {significant(point.damage)} nats"
        dot = el("circle", el("title", note), cx=x, cy=y, r=5.0 if point.knee else 3.2)
        parts.append(el("g", dot, fill=KNEE if point.knee else LINE))
        if point.knee:
            parts.append(words(x + 8, y + 14, "knee", 11, colour=KNEE))
    if plan:
        x, y = at(*plan)
        mark = el("path", d=f"M{x - 6:.1f},{y:.1f} L{x:.1f},{y - 6:.1f} L{x + 6:.1f},{y:.1f} L{x:.1f},{y + 6:.1f} Z")
        parts += [el("g", mark, fill="none", stroke=HERE, stroke_width=1.8), words(x + 9, y - 6, "this plan", 11)]
    return picture(WIDTH, HEIGHT, title, *parts)


def _axes(
    left: float, right: float, top: float, bottom: float, least: float, powers: tuple[int, int], at: Place
) -> list[Markup]:
    """Ruled lines and their numbers: shares kept, from all to least; powers of ten of nats."""
    parts = list[Markup]()
    for power in range(powers[0], powers[1] + 1):
        y = at(1.0, 10.0**power)[1]
        parts.append(el("line", x1=left, y1=y, x2=right, y2=y, stroke=RULE, stroke_width=1.0))
        parts.append(words(left - 8, y + 4, significant(10.0**power, 1), 10, "end", SOFT))
    for share in ticks(least, 1.0, 8):
        x = at(share, 10.0 ** powers[0])[0]
        parts.append(el("line", x1=x, y1=bottom, x2=x, y2=bottom + 4, stroke=SOFT, stroke_width=1.0))
        parts.append(words(x, bottom + 17, f"{100 * share:.0f} %", 10, "middle", SOFT))
    parts.append(words((left + right) / 2, bottom + 36, "kept", 11, "middle", INK))
    parts.append(words(left - 8, top - 12, "predicted rise of the loss, nats/token", 11, "start", INK))
    return parts
