"""The process that examines specimens: `python -m lamina.testing._coverage_worker MODULE:BUILD FOLDER`.

Reads one JSON object a line, `{"name": …}` to examine or `{"reload": true}` for the contracts of all that are waiting,
and writes one a line: `{"name": …, "cell": …, "value": …}`, and `{}` when it is done with a job.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from lamina.core.errors import UnsupportedError
from lamina.lab.load import quiet
from lamina.testing._coverage_checks import Case, examine, judged, no, reload


class Worker:
    """Examines specimens one by one; keeps what waits for the contract."""

    def __init__(self, build: Callable[[str], Any], folder: Path, answers: IO[str]) -> None:
        self.build, self.folder, self.answers = build, folder, answers
        self.waiting: dict[str, list[Case]] = {}
        self.settled: set[tuple[str, str]] = set()

    def write(self, **data: Any) -> None:
        """One line."""
        self.answers.write(json.dumps(data) + "\n")
        self.answers.flush()

    def tell(self, name: str, cell: str, value: str) -> None:
        """A cell of a specimen; what was told once stays."""
        if (name, cell) not in self.settled:
            self.settled.add((name, cell))
            self.write(name=name, cell=cell, value=value)

    def examine(self, name: str) -> None:
        """All that needs no other process."""
        try:
            with quiet():
                specimen = self.build(name)
        except UnsupportedError as error:
            self.tell(name, "unbuilt", no(error.what)[4:])
            return
        folder = self.folder / f"{len(self.settled)}"
        folder.mkdir()
        cases = examine(specimen, lambda cell, value: self.tell(name, cell, value), folder)
        if cases:
            self.waiting[name] = cases

    def reload(self) -> None:
        """The contracts of all that waits, in one fresh process."""
        cases = [c for found in self.waiting.values() for c in found]
        outcomes = reload(cases) if cases else []
        for name, found in self.waiting.items():
            mine = [o for c, o in zip(cases, outcomes, strict=True) if c in found]
            for cell, value in judged(found, mine):
                self.tell(name, cell, value)
        self.waiting.clear()
        for path in self.folder.iterdir():
            shutil.rmtree(path)


def main(source: str, folder: str) -> None:
    """Answer until the input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module, _, function = source.partition(":")
    worker = Worker(getattr(importlib.import_module(module), function), Path(folder), answers)
    for line in sys.stdin:
        job = json.loads(line)
        if "name" in job:
            worker.examine(job["name"])
        else:
            worker.reload()
        worker.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
