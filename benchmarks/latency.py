"""Latency promised by the table and latency measured: plans of all moves under ever smaller budgets of time.

    python benchmarks/latency.py [--work decode:1x256 prefill:1x256] [--keep 85 70 55] [--sequences 8]

Each plan is the cheapest that the table of this machine says to take that share of the dense model's time; it is
applied to a copy, and both are run in turn, dense, thinned, thinned, dense. The table itself is measured in the dense
model and in copies of which some sublayers are changed.
"""

from __future__ import annotations

import copy
import statistics
import time

import torch
from common import arguments, machine, opened, table, text

from lamina.core.documents import Budget
from lamina.core.registry import PLANNERS, rewrite_of
from lamina.lab import Bench, Lab
from lamina.lab.order import merged
from lamina.planners._latency import _Clockwork


def main() -> str:
    """One row for each work and share."""
    parser = arguments(__doc__)
    parser.add_argument("--work", nargs="*", default=["decode:1x256", "prefill:1x256"])
    parser.add_argument("--keep", nargs="*", type=float, default=[85, 70, 55])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    loaded = opened(given)
    lab = Lab(loaded.model, text(given, loaded, "calibration", given.sequences, 256))
    planner = PLANNERS.make("knapsack", {"rounds": 0, "moves": ("drop", "narrow", "rank"), "shares": (0.75, 0.5)})
    menu = planner.menu(Bench(lab))
    bench, rows = Bench(lab), []
    bench.recall = lambda name, kind, held={"menu.json": menu}: held.get(name)  # type: ignore[method-assign]
    for work in given.work:
        kind, _, shape = work.partition(":")
        clockwork = _Clockwork(lab, kind, *(int(n) for n in shape.split("x")))
        for keep in given.keep:
            budget = Budget(metric="latency", keep=keep / 100, at=work)
            began = time.perf_counter()
            problem = planner.problem(budget, bench)
            took = time.perf_counter() - began
            chosen = problem.cheapest()
            if chosen is None:
                rows.append((work, f"{keep:.0f} %", "not reached", "", "", f"{took:.0f}"))
                continue
            freed = sum(problem.options[i].saves[budget.resource] for i in chosen)
            model = copy.deepcopy(lab.model)
            other = Lab(model, lab.batches)
            for step in merged([s for i in chosen for s in problem.options[i].steps], other):
                rewrite_of(step).apply(step, other)
            ratios = []
            for turn in range(-1, given.rounds):
                spent = [clockwork.seconds(m) for m in (lab.model, model, model, lab.model)]
                if turn >= 0:
                    ratios.append((spent[1] + spent[2]) / (spent[0] + spent[3]))
            whole = problem.whole[budget.resource]
            rows.append(
                (
                    work, f"{keep:.0f} %", f"{1 - freed / whole:.3f}", f"{statistics.median(ratios):.3f}",
                    f"{min(ratios):.3f} to {max(ratios):.3f}", f"{took:.0f}",
                )
            )  # fmt: skip
            print(*rows[-1], flush=True)
    names = ("work", "asked", "promised", "measured (median)", "rounds", "table and prices, s")
    return f"{machine(given.threads)}\n\n{table(names, rows)}"


if __name__ == "__main__":
    torch.manual_seed(0)
    print(main())
