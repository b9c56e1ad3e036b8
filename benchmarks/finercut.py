"""FinerCut's search with prefix reuse and early stopping against the double loop over full forwards.

    python benchmarks/finercut.py [--sublayers 15] [--rows 4] [--length 128]

Same text, same metric; the picks must be the same. Block evaluations are counted in tokens x blocks.
"""

from __future__ import annotations

import time

import torch
from common import arguments, machine, opened, table, text

from lamina.core.documents import Budget
from lamina.lab import Bench, Lab
from lamina.maths.divergence import js_reversed
from lamina.papers.depth.finercut import FinerCut


def double_loop(lab: Lab, count: int) -> list[str]:
    """Algorithm 1, literally: every candidate, every sequence, full forwards."""
    with torch.no_grad():
        dense = [lab.forward(b) for b in lab.batches]
        gone: list[str] = []
        while len(gone) < count:
            values = {}
            for site in (s.id for s in lab.anatomy.sublayers if s.id not in gone):
                with lab.ablate([*gone, site]):
                    parts = [js_reversed(d, lab.forward(b)) for d, b in zip(dense, lab.batches, strict=True)]
                values[site] = float(torch.cat([p.flatten() for p in parts]).double().mean())
            gone.append(min(values, key=values.__getitem__))
    return gone


def main() -> str:
    """The table."""
    parser = arguments(__doc__)
    parser.add_argument("--sublayers", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args()
    loaded = opened(given)
    ids = text(given, loaded, "calibration", given.rows, given.length)
    found = {}
    for name in ("reuse", "double loop"):
        lab = Lab(loaded.model, ids, batch_size=2)
        began = time.perf_counter()
        if name == "reuse":
            planner = FinerCut(sequences=given.rows, length=given.length, batch_size=2)
            steps = planner.plan(None, Budget(metric="sublayers", drop=given.sublayers), lab.anatomy, Bench(lab))
            picks = [s for step in steps for s in step.sites]
        else:
            picks = double_loop(lab, given.sublayers)
        found[name] = (picks, lab.counts.blocks, lab.counts.heads, time.perf_counter() - began)
    mine, theirs = found["reuse"], found["double loop"]
    rows = [
        ("block evaluations, tokens x blocks", f"{theirs[1]:,}", f"{mine[1]:,}", f"{mine[1] / theirs[1]:.2f}"),
        ("heads, tokens", f"{theirs[2]:,}", f"{mine[2]:,}", f"{mine[2] / theirs[2]:.2f}"),
        ("wall time, s", f"{theirs[3]:.0f}", f"{mine[3]:.0f}", f"{mine[3] / theirs[3]:.2f}"),
    ]
    same = "the same picks" if mine[0] == theirs[0] else f"OTHER PICKS: {theirs[0]}"
    head = (
        f"{given.sublayers} sublayers, {given.rows} x {given.length} tokens: {same}: {' '.join(mine[0])}; "
        f"{machine(given.threads)}\n\n"
    )
    return head + table(("", "double loop", "lamina", "ratio"), rows)


if __name__ == "__main__":
    print(main())
