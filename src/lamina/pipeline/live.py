"""How far a verb is, in a small file for whoever watches: `.state/progress.json`, there while a verb is at work."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

EVERY = 1.0
"""Seconds between two reports that are written, at least."""


@dataclass
class Live:
    """Progress that is shown as before, and written down: verb, what of it, done and total, when, and by which process.

    The file is replaced as a whole; a disk that takes no more of it is not its business.
    """

    path: Path
    verb: str
    show: Callable[[str, int, int], None]
    began: float = field(default_factory=time.time)
    _last: float = -1e9
    _open: bool = True

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show it, and write it where the last writing is long enough ago."""
        self.show(what, done, total)
        now = time.monotonic()
        if self._open and now - self._last >= EVERY:
            self._last = now
            self.write(what, done, total)

    def write(self, what: str, done: int, total: int) -> None:
        """Replace the file."""
        told = {"verb": self.verb, "what": what, "done": done, "total": total, "began": round(self.began, 3)}
        told |= {"at": round(time.time(), 3), "pid": os.getpid()}
        draft = self.path.with_name(f".{self.path.name}.tmp")
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps(told) + "\n", encoding="utf-8")
            draft.replace(self.path)

    def close(self) -> None:
        """Take the file away; what is reported from here on is shown alone."""
        self._open = False
        for path in (self.path, self.path.with_name(f".{self.path.name}.tmp")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def live(folder: Path, verb: str, show: Callable[[str, int, int], None]) -> Iterator[Live]:
    """Inside, progress of this verb is written into the folder too."""
    made = Live(folder / "progress.json", verb, show)
    made.write("", 0, 0)
    try:
        yield made
    finally:
        made.close()
