"""Which architectures lamina covers: every specimen of the zoo is examined, and what was found is written as a page.

A worker process examines them, so that one that crashes or hangs costs no more than its own row.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import queue
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lamina.core.errors import InputError, did_you_mean
from lamina.core.files import read_data, to_json, write_text
from lamina.testing._coverage_page import page, summary
from lamina.testing._coverage_process import Process, WorkerError

__all__ = ["CELLS", "LIBRARIES", "Row", "names", "read", "run", "summary", "versions", "write"]

LIBRARIES = ("transformers", "timm", "diffusers")
CELLS = ("found", "certified", "block", "sublayer", "block_reloaded", "sublayer_reloaded", "generates")
ZOO = "lamina.testing.zoo:build"
BATCH = 40
"""Specimens whose checkpoints one fresh process loads."""
LIMIT = 300.0
"""Seconds that one specimen may take; the contracts of a batch may take as long for each of it."""
FORMAT = 1
Progress = Callable[[str, int, int], None]
"""Takes (name of the specimen, how many are done, of how many)."""


@dataclass(frozen=True)
class Row:
    """What was found of one specimen.

    A cell is `yes`, `n/a`, or `no: ` with the reason; `unbuilt` is the reason why there is no specimen, `aside` what
    was not asked of it.
    """

    name: str
    causal: bool = False
    kind: str = ""
    anatomy: str = ""
    note: str = ""
    aside: str = ""
    unbuilt: str = ""
    cells: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def library(self) -> str:
        """Whose model it is."""
        return self.name.partition("/")[0] if "/" in self.name else LIBRARIES[0]

    @property
    def whole(self) -> bool:
        """Whether nothing is open."""
        return bool(self.unbuilt) or set(CELLS) <= set(self.cells)

    def ok(self, *cells: str) -> bool:
        """Whether all these cells say yes."""
        return all(self.cells.get(c) == "yes" for c in cells)

    def told(self, what: str, value: str) -> Row:
        """The row with one answer of the worker added."""
        if what in CELLS:
            return replace(self, cells={**self.cells, what: value})
        return replace(self, **{what: value})

    def ended(self, why: str) -> Row:
        """The row of a specimen whose worker is gone: the first open cell has the reason."""
        left = [c for c in CELLS if c not in self.cells]
        cells = {c: "no: not reached" if n else f"no: {why}" for n, c in enumerate(left)}
        return replace(self, cells={**self.cells, **cells})


def names(libraries: Iterable[str] = LIBRARIES, only: Sequence[str] = (), shard: str = "1/1") -> list[str]:
    """The specimens asked for, sorted: of these libraries, of these names if there are any, of one shard `I/N`."""
    from lamina.testing import zoo

    for library in libraries:
        if library not in LIBRARIES:
            raise InputError(f"no library named {library!r}", hint=did_you_mean(library, LIBRARIES))
    known = sorted(n for library in libraries for n in zoo.names(library))
    for name in only:
        if name not in known:
            raise InputError(f"no specimen named {name!r}", hint=did_you_mean(name, known))
    part = re.fullmatch(r"(\d+)/(\d+)", shard)
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        raise InputError(f"a shard is I/N, with I from 1 to N, not {shard!r}", where="--shard")
    return sorted(set(only) or known)[int(part[1]) - 1 :: int(part[2])]


def run(
    specimens: Sequence[str],
    *,
    progress: Progress | None = None,
    source: str = ZOO,
    limit: float = LIMIT,
    jobs: int = 1,
) -> list[Row]:
    """Examine the specimens, in order, in `jobs` processes of one thread each.

    `source` is module:function, a function that builds one by its name.
    """
    blank = {name: _row(name) for name in specimens}
    seen: set[str] = set()
    lock = threading.Lock()

    def done(name: str) -> None:
        with lock:
            seen.add(name)
            if progress is not None:
                progress(name, len(seen), len(specimens))

    with tempfile.TemporaryDirectory(prefix="lamina-coverage-") as folder:
        processes = [Process(source, Path(folder) / str(n)) for n in range(max(jobs, 1))]
        idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
        for process in processes:
            process.folder.mkdir()
            idle.put(process)

        def examined(batch: Sequence[str]) -> list[Row]:
            process = idle.get()
            try:
                return _Batch(process, {name: blank[name] for name in batch}, limit, done).rows()
            finally:
                idle.put(process)

        size = max(min(BATCH, -(-len(specimens) // len(processes))), 1)
        batches = [specimens[start : start + size] for start in range(0, len(specimens), size)]
        pool = ThreadPoolExecutor(len(processes))
        try:
            return [row for rows in pool.map(examined, batches) for row in rows]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.close()
            pool.shutdown()


def _row(name: str) -> Row:
    from lamina.testing import zoo

    return Row(name, causal=name in zoo.names(causal=True))


class _Batch:
    """Some specimens whose checkpoints are loaded together in the end."""

    def __init__(self, process: Process, blank: Mapping[str, Row], limit: float, done: Callable[[str], None]) -> None:
        self.process, self.blank, self.limit, self.done = process, blank, limit, done
        self.found = dict(blank)

    def rows(self) -> list[Row]:
        """All cells of all of them."""
        while waiting := [n for n in self.blank if not self.found[n].whole]:
            if self._examined(waiting):
                self._reload([n for n in waiting if not self.found[n].whole])
        return list(self.found.values())

    def _examined(self, waiting: Sequence[str]) -> bool:
        """Whether the worker lived through it. If not, what waits for the contracts is lost with it."""
        for name in waiting:
            self.found[name] = self.blank[name]
            alive = self._ask({"name": name}, self.limit)
            self.done(name)
            if not alive:
                self.found[name] = self.found[name].ended(self.why)
                return False
        return True

    def _reload(self, waiting: Sequence[str]) -> None:
        if not waiting or self._ask({"reload": True}, self.limit * len(waiting)):
            for name in waiting:
                if not self.found[name].whole:
                    self.found[name] = self.found[name].ended("the worker left it open")
        elif len(waiting) == 1:
            self.found[waiting[0]] = self.found[waiting[0]].ended(self.why)
        else:
            for name in waiting:
                alone = {name: self.blank[name]}
                (self.found[name],) = _Batch(self.process, alone, self.limit, self.done).rows()

    def _ask(self, job: Mapping[str, Any], limit: float) -> bool:
        try:
            for answer in self.process.ask(job, limit):
                name = answer["name"]
                self.found[name] = self.found[name].told(answer["cell"], answer["value"])
        except WorkerError as error:
            self.why = str(error)
            return False
        return True


def versions(rows: Iterable[Row]) -> dict[str, str]:
    """The version of each library that there are rows of."""
    held = {row.library for row in rows}
    found = {name: importlib.util.find_spec(name) is not None for name in LIBRARIES if name in held}
    return {name: importlib.metadata.version(name) if there else "none" for name, there in found.items()}


def write(rows: Sequence[Row], to: Path, versions: Mapping[str, str]) -> None:
    """The page, or a part of one if the file's name ends in .json."""
    if to.suffix == ".json":
        rows = sorted(rows, key=lambda r: r.name)
        write_text(to, to_json({"lamina": FORMAT, "versions": dict(versions), "rows": [asdict(r) for r in rows]}))
    else:
        write_text(to, page(rows, versions))


def read(parts: Sequence[Path]) -> tuple[list[Row], dict[str, str]]:
    """The rows and versions of some parts; of a specimen that is in several, the last counts."""
    rows: dict[str, Row] = {}
    found: dict[str, str] = {}
    for part in parts:
        try:
            data = read_data(part)
            held = [Row(**row) for row in data["rows"]]
            new = dict(data["versions"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("is not a part that `lamina anatomy --coverage` wrote", where=part) from error
        for library in found.keys() & new.keys():
            if found[library] != new[library]:
                raise InputError(f"is of {library} {new[library]}, others are of {found[library]}", where=part)
        found |= new
        rows |= {row.name: row for row in held}
    return [rows[n] for n in sorted(rows)], {k: found[k] for k in LIBRARIES if k in found}
