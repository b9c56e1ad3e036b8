"""Predicted damage against exact leave-one-out on SmolLM2-135M: rank correlation, error and cost.

    python benchmarks/damage.py [--tokens FILE.safetensors] [--texts 4] [--blocks] [options of the measure]

Each text is 8 sequences of 256 tokens: of the shipped prose, or of `input_ids` [sequences, tokens] in FILE.
The truth takes half a forward per sublayer; the prediction about four.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from lamina.anatomy import Anatomy
from lamina.core.documents import Data
from lamina.core.sites import Kind
from lamina.lab import Judge, Lab
from lamina.lab.load import load
from lamina.lab.texts import prepare
from lamina.papers.sensitivity.damage import Damage

ROWS, LENGTH = 8, 256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=Path, help="safetensors file with input_ids [sequences, tokens]")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--blocks", action="store_true", help="whole blocks too")
    parser.add_argument("--probes", default="both")
    parser.add_argument("--kappa", type=float)
    return parser.parse_args()


def texts(given: argparse.Namespace, tokenizer: object) -> Iterator[torch.Tensor]:
    """`given.texts` texts [8, 256]."""
    if given.tokens:
        from safetensors.torch import load_file

        ids = load_file(given.tokens)["input_ids"].long()[:, :LENGTH]
    else:
        data = Data(sequences=ROWS * given.texts, length=LENGTH, heldout_sequences=1)
        ids = prepare(data, tokenizer).calibration
    yield from ids[: ROWS * given.texts].split(ROWS)


def compare(lab: Lab, given: argparse.Namespace) -> dict[str, float]:
    """Figures of one text."""
    started = time.process_time()
    dense = lab.loss()
    forward = time.process_time() - started
    lab.counts.blocks = lab.counts.heads = 0
    started = time.process_time()
    tally = Damage(probes=given.probes, kappa=given.kappa).tallied(lab)
    seconds = time.process_time() - started
    figures = {
        "loss": dense,
        "kappa": tally.settings[-1],
        "passes": lab.passes,
        "heads": lab.counts.heads / lab.tokens,
        "times": seconds / forward,
    }
    scores = tally.scores()
    judge = Judge(lab, "loss", batch_size=4)
    judge.rebase(())
    started = time.process_time()
    sites = [s for s in lab.anatomy.sites if given.blocks or s.kind is not Kind.BLOCK]
    true = {s.id: judge.value([s.id]) for s in sites}
    figures["truth times"] = (time.process_time() - started) / forward
    groups = {
        "all": [s.id for s in sites if s.kind is not Kind.BLOCK],
        "attention": [s.id for s in sites if s.kind is Kind.ATTENTION],
        "mlp": [s.id for s in sites if s.kind in (Kind.MLP, Kind.MOE)],
        "block": [s.id for s in sites if s.kind is Kind.BLOCK],
    }
    for name, group in groups.items():
        if len(group) > 2:
            p, t = (np.array([table[s] for s in group]) for table in (scores, true))
            figures[f"rho {name}"] = float(spearmanr(p, t).statistic)
            figures[f"error {name}"] = float(np.median(np.abs(p - t) / np.abs(t)))
    return figures


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    loaded = load(given.model, dtype=given.dtype)
    anatomy = Anatomy.of(loaded.model)
    found: list[dict[str, float]] = []
    for ids in texts(given, loaded.tokenizer):
        found.append(compare(Lab(loaded.model, ids, anatomy=anatomy), given))
        print(f"text {len(found)}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[-1].items()), flush=True)
    print("mean:   " + ", ".join(f"{k} {np.mean([f[k] for f in found]):.3f}" for k in found[0]))


if __name__ == "__main__":
    main()
