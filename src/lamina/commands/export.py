"""Export for an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import lamina.words as w
from lamina.commands.screen import say, shown
from lamina.options import opened


def export(
    folder: w.Folder,
    to: Annotated[Path | None, typer.Option(metavar="PATH", help="Where to: a folder, or a .gguf file.")] = None,
    kind: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="An exporter of `lamina methods`.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say which engines load it.")] = False,
) -> None:
    """Write the thinned model for another engine, or say which engines take it."""
    from lamina import pipeline
    from lamina.pipeline.verbs import notes

    run = opened(folder)
    if check:
        for line in notes(run, run.receipts()):
            say(line)
        return
    kind = kind or ("gguf" if to is not None and to.suffix == ".gguf" else "hf")
    with shown(run):
        paths = pipeline.export(run, to, kind)
    for path in paths:
        say(str(path))
