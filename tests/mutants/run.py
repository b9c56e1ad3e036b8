"""Run selected tests on copies of the package: `python run.py JOBS.json`. Each job is a fork: torch comes in once.

A job is {"source": the folder that holds the package, "tests": [node ids], "result": file}; the result lists the tests
by outcome. Nothing of the package is imported before the fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

LIMIT = 240
"""Seconds after which a job is killed: a mutant may loop."""


class Outcomes:
    """A pytest plugin that notes how each test ended."""

    def __init__(self) -> None:
        self.by_test: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Any phase that fails makes the test fail."""
        if report.when == "call" or report.outcome != "passed":
            self.by_test[report.nodeid] = report.outcome


def run_one(job: dict[str, Any]) -> None:
    """In the fork: the copy comes first on the path, then pytest."""
    import pytest

    signal.alarm(LIMIT)
    sys.path.insert(0, job["source"])
    sink = os.open(job["result"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    outcomes = Outcomes()
    options = ["-q", "-p", "no:cacheprovider", "--tb=line", "--assert=plain", "-m", ""]
    options += ["-o", f"pythonpath={job['source']} tests/helpers"]
    code = pytest.main([*options, *job["tests"]], plugins=[outcomes])
    found = sys.modules["lamina"].__file__ or ""
    assert found.startswith(job["source"]), f"{found} is not the copy"
    Path(job["result"]).write_text(json.dumps({"code": int(code), "outcomes": outcomes.by_test}))


def main(path: str) -> None:
    """One fork after the other."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (slow to import, so once)

    torch.set_num_threads(1)
    assert transformers
    for job in json.loads(Path(path).read_text()):
        child = os.fork()
        if child == 0:
            try:
                run_one(job)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1])
