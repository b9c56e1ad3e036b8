"""The page of the coverage run: Markdown that differs only where an answer does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.testing.coverage import Row

HEAD = """# Coverage

Written by `lamina anatomy --coverage`; edit nothing here. Every type that a library knows is built tiny from its
config, with random weights, and asked:

| check | what must hold |
| --- | --- |
| found | the blocks and their sublayers are found |
| certified | every block is its input plus its branches, to 1e-5 of its norm in float32 |
| block | without one block of each stack, outputs equal those of the dense model whose block hands its input on |
| sublayer | without one sublayer of each kind, outputs equal those of the dense model whose branch is set to zero |
| reloaded | what was thinned (a block; a sublayer) is the same after saving and loading in a fresh process |
| generates | thinned, cached decoding equals the full forward, and a left-padded batch its rows |

The block is the second of its stack, or where lamina refuses to drop that one the first that it does not.
Outputs are equal if no number differs by more than 1e-5 of the largest; and the reference must differ from the dense
model. A model that has no numbered modules which return a tensor shaped like one they take has no block, and is left
out of the shares. Of generation, nothing is asked that the dense model fails itself.
"""
ASKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("found", ("found",)),
    ("found, certified", ("found", "certified")),
    ("block", ("block",)),
    ("sublayer", ("sublayer",)),
    ("block, reloaded", ("block", "block_reloaded")),
    ("sublayer, reloaded", ("sublayer", "sublayer_reloaded")),
    ("generates", ("generates",)),
)
GROUPS: dict[str, Callable[[Row], bool]] = {
    "transformers, causal language models": lambda r: r.library == "transformers" and r.causal,
    "transformers, all": lambda r: r.library == "transformers",
    "timm": lambda r: r.library == "timm",
    "diffusers": lambda r: r.library == "diffusers",
}
FOLLOWS = ("no: no anatomy", "no: nothing was dropped", "no: not reached")
"""What follows from an earlier no."""


def share(rows: Iterable[Row], *cells: str) -> tuple[int, int]:
    """(types for which all the cells say yes, types they apply to)."""
    asked = [r for r in rows if not r.unbuilt and not any(r.cells.get(c) == "n/a" for c in cells)]
    return sum(r.ok(*cells) for r in asked), len(asked)


def page(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The whole page; the order of the rows is of no matter."""
    rows = sorted(rows, key=lambda r: (list(versions).index(r.library), r.name))
    groups = _groups(rows)
    head, *lines = _shares(groups)
    parts = [HEAD, "Of " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ":\n", table(head, lines)]
    for name, found in groups.items():
        rest = [r for r in found if not r.causal] if name == "transformers, all" else found
        title = "transformers, others" if name == "transformers, all" else name
        parts += _section(title, rest)
    return "\n".join(parts)


def summary(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """The table of shares, its head first: one column for each group that there are rows of."""
    return _shares(_groups(list(rows)))


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups = {name: [r for r in rows if inside(r)] for name, inside in GROUPS.items()}
    return {name: found for name, found in groups.items() if found}


def _shares(groups: Mapping[str, Sequence[Row]]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("types", *(str(len(g)) for g in groups.values()))]
    lines.append(("built", *(str(sum(not r.unbuilt for r in g)) for g in groups.values())))
    lines.append(("with repeated blocks", *(str(share(g, "found")[1]) for g in groups.values())))
    for words, cells in ASKED:
        lines.append((words, *(_percent(*share(g, *cells)) for g in groups.values())))
    return [("", *groups), *lines]


def _percent(yes: int, asked: int) -> str:
    return f"{yes} of {asked}, {100 * yes / asked:.1f} %" if asked else "n/a"


def _section(title: str, rows: Sequence[Row]) -> list[str]:
    built = [r for r in rows if not r.unbuilt and r.cells.get("found") != "n/a"]
    bare = [r.name for r in rows if r.cells.get("found") == "n/a"]
    unbuilt = [r for r in rows if r.unbuilt]
    parts = [f"## {title[0].upper()}{title[1:]}\n"] if rows else []
    if built:
        head = ("type", "class", "found", "certified", "block", "sublayer", "reloaded", "generates", "why not")
        parts.append(table(head, map(_line, built)))
    if bare:
        parts.append(f"No repeated block: {', '.join(bare)}.\n")
    if unbuilt:
        parts += ["Not built:\n", table(("type", "why"), ((r.name, r.unbuilt) for r in unbuilt))]
    return parts


def _line(row: Row) -> tuple[str, ...]:
    short = {k: v.partition(":")[0] for k, v in row.cells.items()}
    reloaded = ", ".join(dict.fromkeys((short.get("block_reloaded", ""), short.get("sublayer_reloaded", ""))))
    cells = (short.get("certified", ""), short.get("block", ""), short.get("sublayer", ""), reloaded)
    reasons: dict[str, list[str]] = {}
    for cell, value in row.cells.items():
        if value.startswith("no: ") and value not in FOLLOWS:
            reasons.setdefault(value.removeprefix("no: "), []).append(cell.replace("_", " "))
    why = "; ".join(f"{', '.join(cells)}: {reason}" for reason, cells in reasons.items())
    notes = "; ".join(n for n in (why, row.aside, row.note) if n)
    return (row.name, row.kind, row.anatomy or "no", *cells, short.get("generates", ""), notes)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
