"""Forks a process for every command line that comes in, so that each starts in milliseconds and can be killed.

Reads one JSON object a line: arguments, out, err, and where to strike (at, call, after, signal, to). Writes the exit
code of each. The reload contract is stood in for, unless `contract` is true.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import gguf  # noqa: F401
import huggingface_hub  # noqa: F401
import peft  # noqa: F401
import scipy  # noqa: F401
import tiny_run
import torch
import torch.utils.flop_counter
import transformers.models.llama.modeling_llama  # noqa: F401

import lamina.cli
import lamina.core.registry
import lamina.evaluators.reload
import lamina.exporters.hf
import lamina.healers.lora
import lamina.lab
import lamina.pipeline.verbs
import lamina.rewrites.refit
import lamina.terminal

torch.set_num_threads(1)
lamina.core.registry.discover()
lamina.pipeline.verbs.EVALUATORS = ("quality", "size")  # speed and memory take seconds, and are measured elsewhere


def strike(job: dict[str, Any]) -> None:
    """Wrap the function that the job names, so that the process gets its signal there."""
    owner, name, function = tiny_run.attribute(job["at"])
    left = job.get("call", 1)

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        counts = "to" not in job or Path(str(args[-1])).name == job["to"]
        left -= counts
        due = counts and left == 0
        if due and not job.get("after"):
            os.kill(os.getpid(), job.get("signal", signal.SIGKILL))
        found = function(*args, **kwargs)
        if due and job.get("after"):
            os.kill(os.getpid(), job.get("signal", signal.SIGKILL))
        return found

    setattr(owner, name, struck)


def child(job: dict[str, Any]) -> int:
    """Run one command as the console entry does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if not job.get("contract"):
        lamina.evaluators.reload.contract = tiny_run.no_contract
    if job["at"]:
        strike(job)
    try:
        lamina.cli.main(job["arguments"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = child(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), flush=True)
