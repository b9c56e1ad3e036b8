"""The frontier and the reasons, as people read them."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

from lamina.core.documents import Step
from lamina.core.menu import Frontier, Option, Point, Reason
from lamina.report.frontier import amount, frontier_listing, frontier_picture, reasons_listing

POINTS = tuple(
    Point(freed=freed, damage=damage, uses=uses, knee=knee)
    for freed, damage, uses, knee in (
        (1e6, 0.001, {"round": 3}, False),
        (4e6, 0.02, {"round": 9, "drop": 1}, True),
        (8e6, 5.5, {"drop": 12, "narrow + round": 30}, False),
    )
)
FOUND = Frontier(resource="bytes", whole=1e7, points=POINTS)


def test_the_table_says_what_stays_what_it_costs_and_how() -> None:
    listing = frontier_listing(FOUND)
    assert [r[0].split("\N{NO-BREAK SPACE}")[0] for r in listing.rows] == ["90.0", "60.0", "20.0"]
    assert [r[4] for r in listing.rows] == ["", "knee", ""]
    assert listing.rows[2][3] == "30 narrow + round, 12 drop"
    assert listing.rows[0][1].endswith("MB")
    assert amount(0.0123, "latency@decode:1x512") == "12.3 ms"


def test_the_picture_shows_every_plan_the_knee_and_the_one_at_hand() -> None:
    svg = ET.fromstring(str(frontier_picture(FOUND, (5e6, 0.1))))
    space = "{http://www.w3.org/2000/svg}"
    dots = list(svg.iter(f"{space}circle"))
    assert len(dots) == 3
    across = [float(c.get("cx", "nan")) for c in dots]
    down = [float(c.get("cy", "nan")) for c in dots]
    assert across == sorted(across), "less is kept to the right"
    assert down == sorted(down, reverse=True), "more damage is higher"
    words = [t.text for t in svg.iter(f"{space}text")]
    assert "knee" in words
    assert "this plan" in words
    width, height = float(svg.get("width", "0")), float(svg.get("height", "0"))
    assert all(0 < x < width for x in across)
    assert all(0 < y < height for y in down)
    assert "this plan" not in str(frontier_picture(FOUND))


def test_reasons_are_told_the_dearest_to_do_without_first() -> None:
    def reason(name: str, more: float, second: str) -> Reason:
        step = Step(rewrite="drop", sites=(name,))
        option = Option(name="drop", groups=(name,), steps=(step,), damage=0.1, saves={"bytes": 2e6})
        return Reason(option=option, damage=0.1, more=more, second=second)

    listing = reasons_listing(
        [reason("a", 0.01, "Q4_0"), reason("b", math.inf, "no plan"), reason("c", 0.2, "nothing")], ["bytes"]
    )
    assert [r[0] for r in listing.rows] == ["b", "c", "a"]
    assert [r[4] for r in listing.rows] == ["no plan", "+0.200", "+0.0100"]
    assert [r[5] for r in listing.rows] == ["", "nothing", "Q4_0"]
