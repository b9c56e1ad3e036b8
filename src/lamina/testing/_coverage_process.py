"""The parent's end of a worker process: it answers one job after the other, and may end or hang at any time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

COMMAND = (sys.executable, "-m", "lamina.testing._coverage_worker")
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class WorkerError(Exception):
    """The worker ended, or did not answer in time."""


class Process:
    """One worker process, started when it is first asked and again after its end. `source` is module:function."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source, self.folder = source, folder
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._started = 0
        self._closed = False

    def ask(self, job: Mapping[str, Any], limit: float) -> Iterator[dict[str, Any]]:
        """What the worker answers to one job, within `limit` seconds in all. Raises WorkerError."""
        if self._closed:
            raise WorkerError("the run was ended")
        process = self._process or self._start()
        until = monotonic() + limit
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            while answer := self._next(until):
                yield answer
        except queue.Empty:
            process.kill()
            self.stop()
            raise WorkerError(f"no answer after {limit:g} s") from None
        except (BrokenPipeError, EOFError):
            code = self.stop()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise WorkerError(f"the worker process {how}") from None

    def _next(self, until: float) -> dict[str, Any]:
        line = self._answers.get(timeout=max(until - monotonic(), 0.01))
        if not line:
            raise EOFError
        return json.loads(line)

    def _start(self) -> subprocess.Popen[str]:
        self._started += 1
        folder = self.folder / str(self._started)
        folder.mkdir()
        path = os.pathsep.join(p for p in sys.path if p)
        process = subprocess.Popen(
            [*COMMAND, self.source, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, **SETTINGS, "PYTHONPATH": path},
        )
        self._process, self._answers = process, queue.SimpleQueue()
        threading.Thread(target=_read, args=(process, self._answers), daemon=True).start()
        return process

    def close(self) -> None:
        """End the process for good: whoever still asks is told so."""
        self._closed = True
        self.stop()

    def stop(self) -> int:
        """End the process, by force if it does not end by itself; gives its exit code."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        return code


def _read(process: subprocess.Popen[str], answers: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    with process.stdout as pipe:
        for line in pipe:
            answers.put(line)
    answers.put("")
