"""Realised speed-up against what the removed sublayers' share of measured time promises.

python benchmarks/speed.py [--rounds 9] [--decode 32]
"""

from __future__ import annotations

import copy

import torch
from common import arguments, machine, opened, table

from lamina.core.documents import Step
from lamina.evaluators.speed import Speed
from lamina.lab import Lab
from lamina.rewrites.drop import Drop

SETS = {
    "8 blocks": [f"block.{n}" for n in (5, 6, 13, 14, 15, 16, 17, 18)],
    "12 attentions": [f"block.{n}.attention" for n in (4, 6, 7, 9, 10, 17, 22, 23, 25, 26, 28, 29)],
    "8 MLPs": [f"block.{n}.mlp" for n in (5, 6, 13, 14, 17, 21, 25, 26)],
    "3 blocks, 4 attentions, 3 MLPs": [
        *(f"block.{n}" for n in (13, 14, 15)),
        *(f"block.{n}.attention" for n in (7, 9, 22, 26)),
        *(f"block.{n}.mlp" for n in (5, 21, 25)),
    ],
}


def main() -> str:
    """The table."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--decode", type=int, default=32)
    given = parser.parse_args()
    dense = opened(given).model
    ids = (torch.arange(64) * 7919 % 40000).reshape(1, 64)
    rows = []
    for name, gone in SETS.items():
        lab = Lab(copy.deepcopy(dense), ids)
        Drop().apply(Step(rewrite="drop", sites=tuple(gone)), lab)
        evaluator = Speed(rounds=given.rounds, decode=given.decode, gone=tuple(gone))
        found = {(e.name, e.of): e for e in evaluator.evaluate(lab, reference=dense)}
        for work in ("prefill", "decode"):
            real, promised = found[work, "ratio"], found[f"promised_{work}", "ratio"]
            share = real.value / promised.value
            interval = f"{real.value:.3f} [{real.low:.3f}, {real.high:.3f}]"
            rows.append((name, work, interval, f"{promised.value:.3f}", f"{share:.3f}"))
    columns = ("gone", "work", "realised speed-up [95 %]", "promised", "realised / promised")
    work = f"prefill of 256 tokens, {given.decode} decoded after 32, batch 1, {given.rounds} rounds"
    head = f"{work}; {machine(given.threads)}\n\n"
    return head + table(columns, rows)


if __name__ == "__main__":
    print(main())
