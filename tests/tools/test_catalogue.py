"""The catalogue page says what the cards and rows say."""

from __future__ import annotations

import catalogue
from lamina.core.papers import Card, Paper, Status
from lamina.core.registry import Row

PAPER = Paper(key="a2024b", title="On a|b", authors=("Ada, A.", "Bob, B."), year=2024, arxiv="2401.00001")


def test_a_page_lists_every_method_and_recipe_once() -> None:
    cards = [
        Card(name="turn", role="measure", summary="Keep a|b.", paper=PAPER, options=(("power", "float", "0.5"),)),
        Card(name="lowest", role="planner", summary="Take the lowest.", status=Status.STABLE, deviations=("ties",)),
    ]
    recipe = Row(name="short", summary="Both.", measure="turn", planner="lowest", paper=PAPER)
    text = catalogue.page(cards, [recipe])
    link = "[Ada et al. 2024](https://arxiv.org/abs/2401.00001)"
    assert f"| `turn` | Keep a\\|b. | {link} | experimental | `power` = 0.5 |  |" in text
    assert "| `lowest` | Take the lowest. | lamina | stable |  | ties |" in text
    assert f"| `short` | Both. | {link} | experimental | turn → lowest → drop |  |" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Recipes",
        "## Measures",
        "## Planners",
    ]
