"""Watch a run."""

from __future__ import annotations

from typing import Annotated

import typer

import lamina.words as w
from lamina.commands.screen import say


def watch(
    folder: w.Folder,
    port: Annotated[int, typer.Option(metavar="N", help="Where to listen; 0 takes a free port.")] = 0,
) -> None:
    """Show a run's progress and its report in the browser, on this machine alone, until Ctrl-C."""
    from lamina.report.watch import Watch

    server = Watch(folder, port)
    say(f"watching {folder} at {server.url}: Ctrl-C ends it")
    try:
        server.serve()
    except KeyboardInterrupt:
        say("no longer watched")
    finally:
        server.stop()
