"""Load a checkpoint by transformers alone and measure it on held-out tokens, beside the dense model."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def loss(model: Any, ids: torch.Tensor) -> float:
    """Mean loss of the predicted tokens, nats."""
    sums, count = 0.0, 0
    for row in ids.split(1):
        logits = model(row, use_cache=False).logits[0, :-1].float()
        sums += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
        count += row.shape[1] - 1
    return sums / count


def prefill(model: Any, ids: torch.Tensor) -> float:
    """Seconds of one forward."""
    began = time.perf_counter()
    model(ids, use_cache=False)
    return time.perf_counter() - began


def decode(model: Any, ids: torch.Tensor, steps: int = 12) -> float:
    """Seconds of some greedy tokens after 32."""
    out = model(ids[:, :32], use_cache=True)
    began = time.perf_counter()
    for _ in range(steps):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return time.perf_counter() - began


def ratios(dense: Any, thin: Any, ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Speed of the thinned model over the dense one's: median, least, most; run in turn."""
    found = {}
    for name, work in (("prefill", prefill), ("decode", decode)):
        seen = []
        for turn in range(-1, rounds):
            spent = [work(m, ids) for m in (dense, thin, thin, dense)]
            if turn >= 0:
                seen.append((spent[0] + spent[3]) / (spent[1] + spent[2]))
        found[name] = [round(x, 3) for x in (statistics.median(seen), min(seen), max(seen))]
    return found


@torch.no_grad()
def main() -> None:
    """One JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--thin", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import AutoModelForCausalLM

    remote = "auto_map" in json.loads((args.thin / "config.json").read_text())
    thin, info = AutoModelForCausalLM.from_pretrained(
        args.thin, torch_dtype=torch.bfloat16, trust_remote_code=remote, output_loading_info=True
    )
    dense = AutoModelForCausalLM.from_pretrained(args.dense, torch_dtype=torch.bfloat16).eval()
    thin.eval()
    ids = load_file(args.heldout)["input_ids"].long()[:8]
    found = {
        "perplexity": round(math.exp(loss(thin, ids)), 3),
        "dense": round(math.exp(loss(dense, ids)), 3),
        "missing": len(info["missing_keys"]) + len(info["mismatched_keys"]),
        "remote": remote,
        "megabytes": round(sum(f.stat().st_size for f in args.thin.glob("*.safetensors")) / 1e6, 1),
        **ratios(dense, thin, ids[:1, :256], args.rounds),
    }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
