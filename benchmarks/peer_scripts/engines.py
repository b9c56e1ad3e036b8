"""Whether llama.cpp runs what a checkpoint holds: as a GGUF file by lamina's writer, tokens held against it."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from lamina.core.errors import LaminaError
from lamina.exporters._gguf_run import available, run_check
from lamina.exporters.gguf import Gguf
from lamina.lab.load import load


def llama_cpp(folder: Path, tokenizer: Path, ids: torch.Tensor) -> str:
    """Empty where it runs; else why not."""
    if not available():
        return "xllamacpp is not installed"
    try:
        loaded = load(str(folder), dtype="bfloat16", trust_remote_code=True)
        with tempfile.TemporaryDirectory() as work:
            (path,) = Gguf(dtype="bf16").export(loaded.model, tokenizer, Path(work) / "model.gguf")
            return run_check(path, loaded.model, ids, rounded=False, timeout=300)
    except (LaminaError, TimeoutError) as error:
        return str(error).splitlines()[0]


def main() -> None:
    """One JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--thin", type=Path, required=True)
    parser.add_argument("--dense", type=Path, required=True, help="where the tokenizer is")
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    why = llama_cpp(args.thin, args.dense, load_file(args.heldout)["input_ids"].long()[:2, :32])
    print("\n" + json.dumps({"llama.cpp": why}))


if __name__ == "__main__":
    main()
