"""Write the catalogue of methods from the registry: `python tools/catalogue.py docs/catalogue.md [--check]`.

With `--check` nothing is written; exit code 1 says that the page is not what the registry holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from lamina.core.files import write_text
from lamina.core.papers import Card, Paper
from lamina.core.registry import ROLES, Row, rows

HEAD = """# Catalogue

Written by `make docs` from the decorators of the methods; edit those, not this page. `stable` methods have an oracle
test and a golden number on a real model. `lamina show NAME` prints one method, `lamina cite NAME` its BibTeX entry.
"""


def source(paper: Paper | None) -> str:
    """The paper as a link, or lamina itself."""
    if paper is None:
        return "lamina"
    label = f"{paper.authors[0].split(',')[0]}{' et al.' if len(paper.authors) > 1 else ''} {paper.year}"
    return f"[{label}]({paper.link})" if paper.link else label


def table(head: tuple[str, ...], body: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def method(card: Card) -> tuple[str, ...]:
    """One method's line."""
    options = ", ".join(f"`{name}`" + (f" = {default}" if default else "") for name, _, default in card.options)
    notes = "; ".join(card.deviations)
    return (f"`{card.name}`", card.summary, source(card.paper), str(card.status), options, notes)


def recipe(row: Row) -> tuple[str, ...]:
    """One recipe row's line."""
    parts = f"{row.measure} → {row.planner} → {row.rewrite}"
    return (f"`{row.name}`", row.summary, source(row.paper), str(row.status), parts, "; ".join(row.deviations))


def page(cards: Iterable[Card], recipes: Iterable[Row]) -> str:
    """The whole page."""
    by_role: dict[str, list[Card]] = {}
    for card in cards:
        by_role.setdefault(card.role, []).append(card)
    body = table(("recipe", "what", "source", "status", "parts", "deviations"), map(recipe, recipes))
    parts = [HEAD, "## Recipes\n", body]
    for role, found in by_role.items():
        head = (role, "what", "source", "status", "options", "deviations")
        parts += [f"## {role.capitalize()}s\n", table(head, map(method, found))]
    return "\n".join(parts)


def main(args: list[str]) -> int:
    """Write the page, or check it."""
    target = Path(args[0])
    text = page((registry.card(name) for registry in ROLES.values() for name in registry), rows().values())
    if "--check" in args:
        same = target.is_file() and target.read_text(encoding="utf-8") == text
        print(f"{target}: " + ("as the registry has it" if same else "not what the registry holds; run `make docs`"))
        return 0 if same else 1
    write_text(target, text)
    print(f"{target}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
