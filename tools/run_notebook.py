"""Run a notebook: `python tools/run_notebook.py docs/notebook.ipynb build/notebooks/notebook.ipynb [--model NAME]`.

The copy holds the outputs, which `mkdocs build` then shows; the notebook itself stays without. `--model` stands in for
the model of the cell that is tagged `parameters`. The run folder is made where the copy is.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

TIMEOUT = 600
"""Seconds for one cell."""
MODEL = re.compile(r"^model = .*$", re.MULTILINE)


def executed(path: Path, folder: Path, model: str | None = None) -> Any:
    """The notebook with its outputs, run in `folder` by a fresh kernel of this Python.

    `model` stands in for the one that the notebook names. Raises nbclient's CellExecutionError where a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    if model is not None:
        (cell,) = [c for c in book.cells if "parameters" in c.metadata.get("tags", ())]
        cell.source, count = MODEL.subn(f"model = {model!r}", cell.source)
        if count != 1:
            raise ValueError(f"{path}: the cell of parameters names no model")
    client = NotebookClient(book, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    quiet = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    return client.execute(env={**os.environ, **quiet})


def outputs(book: Any) -> list[Any]:
    """All outputs of a notebook, in order."""
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def main() -> None:
    """Run one notebook and keep the copy."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--model")
    given = parser.parse_args()
    given.to.parent.mkdir(parents=True, exist_ok=True)
    book = executed(given.notebook, given.to.parent, given.model)
    nbformat.write(book, given.to)
    print(f"{given.to}: {len(outputs(book))} outputs")


if __name__ == "__main__":
    main()
