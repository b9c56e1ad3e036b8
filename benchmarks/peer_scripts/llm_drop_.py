"""LLM-Drop: which attentions or blocks its own code would drop, by cosine similarity; the driver drops them."""

from __future__ import annotations

import importlib
import sys
import types

import torch
from accelerate import Accelerator
from common import given, opened, tokens, told

ARGS = given()


def work() -> dict[str, list[str]]:
    """The scores of its own functions, and the highest so many of them."""
    package = types.ModuleType("prune")
    package.__path__ = [str(ARGS.source / "src/llmtuner/compression/prune")]
    sys.modules["prune"] = package
    kind, _, count = ARGS.task.partition("-")
    model, rows = (
        opened(ARGS),
        [{"input_ids": r[None], "attention_mask": torch.ones_like(r)[None]} for r in tokens(ARGS)],
    )
    if kind == "attention":
        layers = importlib.import_module("prune.layer_drop")
        seen = layers.get_layer_similarities(model, rows, Accelerator(cpu=True), len(rows), True, "attn")
    else:
        with torch.no_grad():  # its function leaves the gradients' graphs standing
            found = importlib.import_module("prune.block_drop").get_block_similarities(
                model, rows, Accelerator(cpu=True), len(rows)
            )
        seen = found[:, 0] if found.ndim > 1 else found
    gone = torch.sort(seen, descending=True).indices[: int(count)].tolist()
    tail = ".attention" if kind == "attention" else ""
    return {"drops": [f"block.{n}{tail}" for n in sorted(gone)]}


told(work)
