"""All measures that need one forward at most, against one plain forward over the same tokens.

    python benchmarks/survey.py [--rounds 7] [--each]

Together: plain and survey in turn, A B B A, in one process, with the scores computed at the end. With --each also every
measure by itself: time beyond a pass that feeds nobody, in parts of a plain forward, passes, and peak memory.
Memory: each in fresh processes of its own, the peak of resident memory of the run itself, as Linux counts it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from common import arguments, machine, opened, table, text

from lamina.core.papers import Need, Status
from lamina.core.registry import MEASURES
from lamina.core.sites import SUBLAYERS, Kind
from lamina.lab import Counts, Lab
from lamina.lab.passes import finished, tallied

ROWS, LENGTH = 8, 512


def similarity() -> list[str]:
    """The measures of blocks and sublayers that share the usual survey's pass."""
    cards = [MEASURES.card(n) for n in forward()]
    return [c.name for c in cards if c.status is Status.STABLE and set(c.on) <= SUBLAYERS | {Kind.BLOCK}]


def forward() -> list[str]:
    """All measures that need one forward and nothing else."""
    return [n for n in MEASURES if MEASURES.card(n).needs is Need.FORWARD]


def plain(lab: Lab) -> None:
    """One forward with logits."""
    with torch.no_grad():
        for batch in lab.batches:
            lab.forward(batch)


def survey(lab: Lab, names: Sequence[str] = ()) -> None:
    """These measures at once, and their scores."""
    measures = {n: MEASURES.make(n) for n in names}
    for name, tally in tallied(lab, measures).items():
        finished(lab, measures[name], tally)


WORK = {"plain": plain, "survey": lambda lab: survey(lab, similarity()), "all": lambda lab: survey(lab, forward())}


def bench(given: argparse.Namespace) -> Lab:
    """The model and the text, what is found once for a model found already."""
    loaded = opened(given)
    lab = Lab(loaded.model, text(given, loaded, "calibration", ROWS, LENGTH))
    lab.anatomy.total()
    lab.anatomy.of_kind(*Kind)
    return lab


def peak(given: argparse.Namespace, work: str, queue: multiprocessing.Queue) -> None:
    """In a process of its own: the peak of resident memory in MB during one run."""
    lab = bench(given)
    Path("/proc/self/clear_refs").write_text("5")
    (WORK[work] if work in WORK else lambda lab: survey(lab, [work]))(lab)
    status = Path("/proc/self/status").read_text().splitlines()
    queue.put(next(int(row.split()[1]) / 1024 for row in status if row.startswith("VmHWM")))


def peaks(given: argparse.Namespace, names: Sequence[str]) -> dict[str, float]:
    """Peak memory of each piece of work."""
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for work in names:
        queue = spawn.Queue()
        child = spawn.Process(target=peak, args=(given, work, queue))
        child.start()
        found[work] = queue.get()
        child.join()
    return found


def seconds(work: Callable[[], None]) -> float:
    """Wall time of one run."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def together(lab: Lab, rounds: int, memory: Mapping[str, float]) -> str:
    """The usual survey and all measures, against the plain forward."""
    rows = []
    for name in ("survey", "all"):
        times: dict[str, list[float]] = {"plain": [], name: []}
        ratios = []
        for _ in range(rounds):
            for one in ("plain", name, name, "plain"):
                times[one].append(seconds(lambda one=one: WORK[one](lab)))
            ratios.append(sum(times[name][-2:]) / sum(times["plain"][-2:]))
        figures = [statistics.median(times[n]) for n in ("plain", name)]
        words = f"{len(similarity() if name == 'survey' else forward())} measures"
        told = {"survey": f"the usual survey, {words}", "all": f"all of one forward, {words}"}[name]
        rows.append((told, *(f"{f:.2f}" for f in figures), f"{statistics.median(ratios):.2f}", f"{memory[name]:.0f}"))
    return table(("", "plain forward, s", "survey, s", "ratio", "peak memory, MB"), rows)


def each(given: argparse.Namespace, lab: Lab, rounds: int) -> str:
    """Every measure by itself."""
    usual = statistics.median(seconds(lambda: plain(lab)) for _ in range(rounds))
    bare = statistics.median(seconds(lambda: lab.stream([])) for _ in range(rounds))
    names = [n for n in MEASURES if MEASURES.card(n).needs <= Need.FORWARD]
    memory = peaks(given, names)
    rows = []
    for name in names:
        lab.counts = Counts()
        measure = MEASURES.make(name)
        took = statistics.median(seconds(lambda m=measure: m.measure(lab)) for _ in range(rounds))
        passes = lab.passes / rounds
        beyond = (took - (bare if passes else 0)) / usual
        rows.append((name, f"{took:.2f}", f"{beyond:+.1%}", f"{passes:.1f}", f"{memory[name]:.0f}"))
    return table(("measure", "time, s", "beyond the pass, of a forward", "passes", "peak memory, MB"), rows)


def main() -> str:
    """The tables."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--each", action="store_true")
    given = parser.parse_args()
    memory = peaks(given, list(WORK))
    lab = bench(given)
    for work in WORK.values():
        work(lab)
    head = f"{ROWS} x {LENGTH} tokens; {machine(given.threads)}; a plain forward peaks at {memory['plain']:.0f} MB\n\n"
    found = head + together(lab, given.rounds, memory)
    return found + (f"\n\n{each(given, lab, min(given.rounds, 3))}" if given.each else "")


if __name__ == "__main__":
    print(main())
