"""What the benchmarks share: the model, the texts, markdown tables."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from lamina.core.documents import Data
from lamina.lab.load import Loaded, load
from lamina.lab.texts import prepare


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calibration", type=Path, help="safetensors with input_ids [n, t]; default: shipped prose")
    parser.add_argument("--heldout", type=Path, help="the same, to judge by")
    return parser


def opened(given: argparse.Namespace) -> Loaded:
    """The model that was asked for."""
    torch.set_num_threads(given.threads)
    return load(given.model, dtype=given.dtype)


def text(given: argparse.Namespace, loaded: Loaded, split: str, rows: int, length: int) -> torch.Tensor:
    """Token ids [rows, length] of a split."""
    path: Path | None = getattr(given, split)
    if path is not None:
        from safetensors.torch import load_file

        return load_file(path)["input_ids"].long()[:rows, :length]
    data = Data(sequences=rows, heldout_sequences=rows, length=length)
    return getattr(prepare(data, loaded.tokenizer), split)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def machine(threads: int) -> str:
    """What it ran on, in a line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next(
            (r.split(":")[1].strip() for r in info.read_text().splitlines() if r.startswith("model name")), name
        )
    return f"{name}, {threads} threads, torch {torch.__version__}"
