"""What every peer's script shares; needs torch, transformers and safetensors alone, of any version."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def given() -> argparse.Namespace:
    """The options that the driver hands over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="a checkout, of peers that are no package")
    parser.add_argument(
        "--span", type=int, nargs=2, default=(11, 19), help="the run of blocks that mergekit leaves out"
    )
    parser.add_argument("--threads", type=int, default=1)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    torch.manual_seed(0)
    return found


def tokens(args: argparse.Namespace) -> torch.Tensor:
    """Calibration token ids [sequences, tokens]."""
    return load_file(args.calibration)["input_ids"].long()[: args.sequences]


def opened(args: argparse.Namespace) -> Any:
    """The dense model, bfloat16."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.model, torch_dtype=torch.bfloat16).eval()


def told(work: Callable[[], dict[str, Any] | None]) -> None:
    """Do the work, and print its time and the peak of memory as the last line."""
    began = time.perf_counter()
    found = work() or {}
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status")  # ru_maxrss of a process begins at its parent's
    held = [x.split()[1] for x in status.read_text().splitlines() if x.startswith("VmHWM")] if status.is_file() else []
    peak = int(held[0]) / 1024 if held else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps({**found, "seconds": round(seconds, 1), "peak_mb": round(peak)}))
