"""Write the page."""

from __future__ import annotations

import lamina.words as w
from lamina.commands.screen import say
from lamina.core.errors import InputError


def report(folder: w.Folder) -> None:
    """Write report.html: one page, offline, of all that the run folder holds."""
    from lamina.report import write

    if not folder.is_dir():
        raise InputError("there is no such run folder", where=folder)
    say(str(write(folder)))
