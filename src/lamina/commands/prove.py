"""Prove what it cost."""

from __future__ import annotations

from typing import Annotated

import typer

import lamina.words as w
from lamina.commands.screen import shown
from lamina.core.errors import InputError
from lamina.options import opened


def prove(
    folder: w.Folder,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tasks of `lamina tasks`; `offline`: all that fit the model.")
    ] = None,
    items: Annotated[int | None, typer.Option(metavar="N", help="Items of each task at most (500).")] = None,
) -> None:
    """Measure loss, speed, memory and size, dense and thinned side by side, on held-out text; and by tasks."""
    from lamina import pipeline

    if items is not None and tasks is None:
        raise InputError("items of which tasks?", where="--items", hint="say --tasks offline --items 500")
    run = opened(folder)
    with shown(run):
        pipeline.prove(run, tasks, *([] if items is None else [items]))
    from lamina.terminal import print_evidence

    print_evidence(run)
