"""A survey of a model that is larger than the memory it may take: time, reads of its blocks, and peak memory.

    python benchmarks/streaming.py --folder /tmp/large [--rows 4 --length 128] [--cold] [--keep]

Writes a checkpoint of a Llama of 7 billion parameters with random weights, shard by shard, into the folder (14 GB; the
disk is looked at first), surveys it block by block from there in a fresh process, and deletes it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, table

SPARE = 500
"""MB that a survey may take beside two blocks and the states."""
MEASURES = (
    "cosine block-influence angular adjacent-similarity contribution-cosine variance-growth relative-contribution "
    "tokenwise"
)
PAIR = 2
"""Layers in a shard."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is made; must not exist")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measures", default=MEASURES, help="names, or 'all' that need one forward alone")
    parser.add_argument("--scratch", type=Path, help="keep the states in a file in this folder")
    parser.add_argument("--cold", action="store_true", help="let the system forget the files before each pass")
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint; it is taken up next time")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def config(layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def write(folder: Path, layers: int) -> None:
    """The checkpoint, shard by shard; numbers of scale 0.02, norms of ones."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    made = config(layers)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in AutoModelForCausalLM.from_config(made).state_dict().items()}
    need = 2 * sum(s.numel() for s in shapes.values())
    free = shutil.disk_usage(folder.parent).free
    if free < need + (1 << 30):
        sys.exit(f"{folder}: {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
    folder.mkdir()
    made.save_pretrained(folder)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        group = f"{int(parts[2]) // PAIR:02}" if parts[1] == "layers" else "outer"
        shards.setdefault(f"model-{group}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        tensors = {n: torch.ones(shapes[n]).bfloat16() for n in names if len(shapes[n]) == 1}
        for name in names:
            if name not in tensors:
                tensors[name] = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": need}, "weight_map": {n: f for f, names in shards.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def forget(folder: Path) -> None:
    """Have the system drop what it keeps of these files in memory."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak() -> float:
    """The peak of this process's resident memory since it was last cleared, in MB."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) / 1024 for row in rows if row.startswith("VmHWM"))


def child(given: argparse.Namespace) -> None:
    """In a fresh process: the survey, and what it took as JSON."""
    from lamina.core import registry
    from lamina.core.papers import Need
    from lamina.lab import Lab
    from lamina.lab.disk import anatomy_of, open_streamed, streamed, weights_of

    torch.set_num_threads(given.threads)
    every = [n for n in registry.MEASURES if registry.MEASURES.card(n).needs is Need.FORWARD]
    names = every if given.measures == "all" else given.measures.split()
    phases: list[tuple[str, float, float, int, int]] = []

    def phase(name: str, work: Any) -> Any:
        if given.cold:
            forget(given.folder)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        began, before = time.perf_counter(), weights.bytes if weights else 0
        made = work()
        taken = time.perf_counter() - began
        reads = max(weights.block_reads().values()) if weights else 0
        phases.append((name, taken, peak(), reads, (weights.bytes - before) if weights else 0))
        if weights:
            weights.reads.clear()
        return made

    weights = None
    phase("python and libraries", lambda: __import__("transformers").AutoModelForCausalLM)
    model = phase("open", lambda: open_streamed(given.folder, dtype=getattr(torch, given.dtype)))
    weights = weights_of(model)
    anatomy = phase("anatomy and certificate", lambda: anatomy_of(model))
    ids = torch.randint(0, 32000, (given.rows, given.length), generator=torch.Generator().manual_seed(0))
    lab = Lab(model, ids, anatomy=anatomy, batch_size=given.batch)
    tallies = [registry.MEASURES.make(n).tally(anatomy) for n in names]
    scores = phase("survey", lambda: streamed(lab, tallies, scratch=given.scratch))
    size = given.rows * given.length * 4096 * getattr(torch, given.dtype).itemsize
    block = anatomy.cost(anatomy.stacks[0].blocks[0].site).bytes
    found = {
        "phases": phases,
        "block": block / 2**20,
        "states": 0 if given.scratch else size / 2**20,
        "whole": anatomy.total().bytes / 2**20,
        "most": weights.peak / 2**20,
        "sites": sum(len(s.values) for s in scores),
        "measures": len(names),
    }
    print(json.dumps(found))


def main(given: argparse.Namespace) -> str:
    """The table."""
    if not given.folder.exists():
        write(given.folder, given.layers)
    done = subprocess.run([sys.executable, *sys.argv, "--child"], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    allowed = 2 * found["block"] + found["states"] + SPARE
    rows = [
        (name, f"{taken:.1f}", reads, f"{size / 1e9:.1f}", f"{size / 1e9 / taken:.2f}" if size else "", f"{top:.0f}")
        for name, taken, top, reads, size in found["phases"]
    ]
    columns = ("phase", "seconds", "reads of a block, at most", "GB read", "GB/s", "peak resident MB")
    top = max(row[2] for row in found["phases"])
    said = (
        f"{given.rows} × {given.length} tokens, {found['measures']} measures, {given.dtype}; the model takes "
        f"{found['whole']:.0f} MB, a block {found['block']:.0f} MB, the states in memory {found['states']:.0f} MB. "
        f"Peak {top:.0f} MB; two blocks + states + {SPARE} MB are {allowed:.0f} MB: "
        f"{'held' if top <= allowed else 'MISSED'}. Weights in memory at once: {found['most']:.0f} MB."
    )
    return f"{said}\n{machine(given.threads)}{', files not in memory before' if given.cold else ''}\n\n" + table(
        columns, rows
    )


if __name__ == "__main__":
    options = arguments()
    if options.child:
        child(options)
    else:
        fresh = not options.folder.exists()
        try:
            print(main(options))
        finally:
            if fresh and not options.keep:
                shutil.rmtree(options.folder, ignore_errors=True)
