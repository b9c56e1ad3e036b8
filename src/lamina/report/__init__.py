"""The report: a run folder as one self-contained HTML page. Never imports torch."""

from __future__ import annotations

from pathlib import Path


def write(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    What the folder does not hold yet is left out, with one line that says which verb brings it.
    Raises `InputError` where the folder is not a run folder or one of its files can't be read.
    """
    from lamina.report.page import write as page

    return page(folder)
