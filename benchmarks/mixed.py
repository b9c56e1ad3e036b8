"""Mixed plans against the best single kind at equal bytes, and predicted against measured damage of random plans.

    python benchmarks/mixed.py [--keep 75 50 35] [--random 40] [--sequences 32] [--held 8]

Prices are taken on calibration text; what is measured is the rise of the loss on held-out text, with the plan's maps
written into the model and what it drops silenced. A plan is the exact choice from the menu, of all options or of those
of one kind, after the planner's rounds of trials. Bytes are those of the engine's file, embeddings and all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from common import arguments, machine, opened, table, text
from scipy.stats import spearmanr

from lamina.core.menu import Option
from lamina.core.registry import PLANNERS
from lamina.lab import Bench, Lab
from lamina.planners._menu import unlike
from lamina.planners._rounds import settled
from lamina.planners._solve import Problem
from lamina.planners._trials import Trials

KINDS = {"drop": ("drop",), "narrow": ("narrow",), "rank": ("svd-llm",), "bits": ("round",)}


def plans(
    options: Sequence[Option], lab: Lab, trials: Trials, held: Lab, keeps: Sequence[float], rounds: int
) -> list[tuple[str, ...]]:
    """One row for each budget and kind."""
    total, dense, rows = lab.anatomy.total().bytes, held.loss(), []
    for keep in keeps:
        for name, kinds in {"mixed": None, **KINDS}.items():
            some = [o for o in options if kinds is None or o.kinds == kinds]
            problem = Problem(some, {"bytes": total * (1 - keep)}, unlike(lab.anatomy, some))
            began = time.perf_counter()
            chosen = problem.cheapest()
            solving = time.perf_counter() - began
            if chosen is None:
                rows.append((f"{keep:.0%}", name, "–", "–", "", "", "not reached"))
                continue
            found = settled(problem, trials, chosen, rounds)
            took = time.perf_counter() - began
            taken = [some[i] for i in found.chosen]
            with trials.on(taken):
                true = held.loss() - dense
            used = Counter(" + ".join(o.kinds) for o in taken)
            what = ", ".join(f"{n} {k}" for k, n in used.most_common())
            told = problem.at(found.factors).price(found.chosen) * found.level
            rows.append((f"{keep:.0%}", name, f"{told:.3f}", f"{true:.3f}", f"{solving:.2f}", f"{took:.0f}", what))
            print(*rows[-1], sep=" | ", flush=True)
    return rows


def drawn(options: Sequence[Option], lab: Lab, trials: Trials, held: Lab, count: int) -> str:
    """Predicted and measured damage of plans of random options at random sublayers."""
    draw, dense = np.random.default_rng(0), held.loss()
    groups: dict[str, list[Option]] = {}
    for option in options:
        groups.setdefault(option.groups[0], []).append(option)
    predicted, true = [], []
    for _ in range(count):
        share = draw.uniform(0.05, 0.6)
        some = [g for g in groups.values() if draw.random() < share]
        most = draw.uniform(0.005, 0.08)
        taken = [draw.choice(fit) for g in some if (fit := [o for o in g if o.damage < most])]  # type: ignore[arg-type]
        if not taken:
            continue
        predicted.append(sum(o.damage for o in taken))
        with trials.on(taken):
            true.append(held.loss() - dense)
    x, y = np.array(predicted), np.array(true)
    level = float(np.exp(np.median(np.log(y[y > 0] / x[y > 0]))))
    error = np.abs(level * x - y) / np.abs(y)
    found = float(spearmanr(x, y)[0])
    return (
        f"{len(x)} random plans, measured rise {y.min():.3f} to {y.max():.2f} nats: Spearman {found:.3f}, median "
        f"relative error {np.median(np.abs(x - y) / np.abs(y)):.0%}, {np.median(error):.0%} at the level {level:.2f}"
    )


def main() -> str:
    """The table and the line."""
    parser = arguments(__doc__)
    parser.add_argument("--keep", nargs="*", type=float, default=[75, 50, 35])
    parser.add_argument("--random", type=int, default=40)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--held", type=int, default=8, help="sequences of held-out text to measure on")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    loaded = opened(given)
    lab = Lab(loaded.model, text(given, loaded, "calibration", given.sequences, 512))
    held = Lab(loaded.model, text(given, loaded, "heldout", given.held, 512), anatomy=lab.anatomy, batch_size=2)
    began = time.perf_counter()
    planner = PLANNERS.make("knapsack")
    menu, trials = planner.menu(Bench(lab)), planner.trials(lab)
    took, options = time.perf_counter() - began, menu.options
    head = f"{len(options)} options priced in {took:.0f} s, {lab.passes:.1f} forwards over {lab.tokens} tokens"
    rows = plans(options, lab, trials, held, [k / 100 for k in given.keep], given.rounds)
    names = ("bytes kept", "plan", "predicted, nats", "measured, nats", "solving, s", "with trials, s", "options")
    line = drawn(options, lab, trials, held, given.random)
    return f"{head}; {machine(given.threads)}\n\n{table(names, rows)}\n\n{line}"


if __name__ == "__main__":
    print(main())
