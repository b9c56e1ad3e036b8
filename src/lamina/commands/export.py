"""Export for an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import lamina.words as w
from lamina.commands.screen import say, shown
from lamina.core.errors import InputError
from lamina.options import opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lamina.exporters.ladder import Rung
    from lamina.pipeline import Run


def export(
    folder: w.Folder,
    to: Annotated[Path | None, typer.Option(metavar="PATH", help="Where to: a folder, or a .gguf file.")] = None,
    kind: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="An exporter of `lamina methods`.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say which engines load it.")] = False,
    nearest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the nearest plan that they would load.")
    ] = None,
) -> None:
    """Write the thinned model for another engine, or say which engines take it."""
    from lamina import pipeline
    from lamina.core import registry

    run = opened(folder)
    if kind is not None:
        registry.EXPORTERS.card(kind)
    if check or nearest is not None:
        _check(run, kind, nearest)
        return
    kind = kind or ("gguf" if to is not None and to.suffix == ".gguf" else "hf")
    with shown(run):
        paths = pipeline.export(run, to, kind)
    for path in paths:
        say(str(path))


def _check(run: Run, kind: str | None, to: Path | None) -> None:
    """The ladder, what rewrites say beside it, and the nearest plan as a file."""
    from lamina.pipeline.rungs import climb, write_nearest
    from lamina.pipeline.verbs import remarks

    if to is not None and to.suffix not in (".yaml", ".yml", ".json"):
        raise InputError("a plan is a .yaml or .json file", where=to)
    _table(climb(run))
    for line in remarks(run.receipts()):
        say(line)
    if to is not None:
        found = write_nearest(run, to, kind)
        say(f"{found.line} → {to}")


def _table(rungs: Sequence[Rung]) -> None:
    """One row for each target."""
    from rich.markup import escape
    from rich.table import Table

    from lamina.exporters.ladder import lines
    from lamina.terminal import console

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("target", "loads", "", "why"):
        table.add_column(name, no_wrap=name != "why", overflow="fold")
    for cells in lines(rungs):
        table.add_row(*map(escape, cells))
    console.print(table)
