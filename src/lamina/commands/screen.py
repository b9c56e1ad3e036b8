"""What verbs show on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lamina.pipeline import Run


def shown(run: Run) -> Any:
    """Progress on the terminal while the block runs."""
    from lamina.terminal import progress

    return progress(run)


def say(line: str) -> None:
    """One line on standard output."""
    typer.echo(line)
