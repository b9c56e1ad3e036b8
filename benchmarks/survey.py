"""All similarity measures in one pass against one plain forward over the same tokens: time and peak memory.

    python benchmarks/survey.py [--rounds 7]

Time: plain and survey in turn, A B B A, in one process. Memory: each in fresh processes of its own, the peak of
resident memory of the run itself, as Linux counts it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from common import arguments, machine, opened, table, text

from lamina.core import registry
from lamina.core.papers import Need
from lamina.lab import Lab

ROWS, LENGTH = 8, 512


def similarity() -> list[str]:
    """All measures that need one forward and nothing else."""
    return [n for n in registry.MEASURES if registry.MEASURES.card(n).needs is Need.FORWARD]


def plain(lab: Lab) -> None:
    """One forward with logits."""
    with torch.no_grad():
        for batch in lab.batches:
            lab.forward(batch)


def survey(lab: Lab) -> None:
    """All similarity measures at once."""
    lab.stream([registry.MEASURES.make(n).tally(lab.anatomy) for n in similarity()])


def peak(given: argparse.Namespace, work: str, queue: multiprocessing.Queue) -> None:
    """In a process of its own: the peak of resident memory in MB during one run."""
    loaded = opened(given)
    lab = Lab(loaded.model, text(given, loaded, "calibration", ROWS, LENGTH))
    lab.anatomy.total()
    Path("/proc/self/clear_refs").write_text("5")
    (plain if work == "plain" else survey)(lab)
    status = Path("/proc/self/status").read_text().splitlines()
    queue.put(next(int(row.split()[1]) / 1024 for row in status if row.startswith("VmHWM")))


def main() -> str:
    """The table."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    memory = {}
    spawn = multiprocessing.get_context("spawn")
    for work in ("plain", "survey"):
        queue = spawn.Queue()
        child = spawn.Process(target=peak, args=(given, work, queue))
        child.start()
        memory[work] = queue.get()
        child.join()
    loaded = opened(given)
    lab = Lab(loaded.model, text(given, loaded, "calibration", ROWS, LENGTH))
    plain(lab)
    survey(lab)
    ratios, times = [], {"plain": [], "survey": []}
    for _ in range(given.rounds):
        for name, work in (("plain", plain), ("survey", survey), ("survey", survey), ("plain", plain)):
            began = time.perf_counter()
            work(lab)
            times[name].append(time.perf_counter() - began)
        ratios.append(sum(times["survey"][-2:]) / sum(times["plain"][-2:]))
    rows = [
        ("time, s", *(f"{statistics.median(times[n]):.2f}" for n in times), f"{statistics.median(ratios):.2f}"),
        ("peak memory, MB", *(f"{memory[n]:.0f}" for n in times), f"{memory['survey'] / memory['plain']:.2f}"),
    ]
    head = f"{', '.join(similarity())} on {ROWS} x {LENGTH} tokens; {machine(given.threads)}\n\n"
    return head + table(("", "plain forward", "survey", "ratio"), rows)


if __name__ == "__main__":
    print(main())
