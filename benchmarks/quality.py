"""All published recipes and the default one at the same number of parameters, without healing, in one run.

    python benchmarks/quality.py [--blocks 3 8] [--recipes a,b] [--calibration FILE] [--heldout FILE]

Every recipe drops at least as many parameters as that number of blocks holds. Perplexity on the first 8 held-out
sequences of 512 tokens; `lr` is the logarithm of its ratio to the dense model's.
"""

from __future__ import annotations

import json
import math
import sys
import time

from common import arguments, machine, opened, table, text

from lamina.core import registry
from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.scores import Scores
from lamina.core.sites import Kind
from lamina.lab import Bench, Lab
from lamina.pipeline.choosing import refit_step
from lamina.rewrites.refit import kept_weights

PUBLISHED = (
    "llm-drop-block,llm-drop-attention,llm-drop-mlp,llm-drop-joint,shortgpt,angular,leave-one-out,leave-one-out-block,"
    "sleb,finercut"
)


def main() -> str:
    """The table."""
    parser = arguments(__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--recipes", default="default," + PUBLISHED)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument(
        "--options", type=json.loads, default={}, help="planner options by recipe, as JSON: {recipe: {option: value}}"
    )
    given = parser.parse_args()
    loaded = opened(given)
    lab = Lab(loaded.model, text(given, loaded, "calibration", given.rows, 512))
    heldout = lab.on(text(given, loaded, "heldout", 8, 512))
    dense = heldout.loss()
    block = lab.anatomy.cost(lab.anatomy.of_kind(Kind.BLOCK)[0]).parameters
    rows, best = [], {}
    names = given.recipes.split(",")
    scores: dict[object, Scores] = {}

    def scored(row: registry.Row) -> Scores | None:
        key = (row.measure, tuple(row.measure_options.items()))
        if row.measure and key not in scores:
            part = lab.part(8, 256) if row.measure == "leave-one-out" else lab
            scores[key] = registry.MEASURES.make(row.measure, row.measure_options).measure(part)
        return scores.get(key)

    for name in names:
        for blocks in given.blocks:
            row = registry.row(name)
            began, passes = time.perf_counter(), lab.passes
            measure = registry.MEASURES.make(row.measure, row.measure_options) if row.measure else None
            options = {
                **row.planner_options,
                **({"kinds": row.kinds} if row.kinds else {}),
                **given.options.get(name, {}),
            }
            planner = registry.PLANNERS.make(row.planner, options)
            limit = lab.anatomy.total().parameters - blocks * block
            try:
                steps = planner.plan(scored(row), Budget(limit=limit), lab.anatomy, Bench(lab, measure))
            except InputError as error:
                rows.append((blocks, name, "–", "–", "–", "–", error.what))
                continue
            gone = [s for step in steps for s in step.sites]
            losses = [heldout.loss(gone)]
            if row.refit and (step := refit_step(lab, gone)):
                with kept_weights(lab, step.sites):
                    registry.REWRITES.make("refit").apply(step, lab)
                    losses.append(heldout.loss(gone))
            seconds = time.perf_counter() - began
            rise = losses[-1] - dense
            if name in PUBLISHED.split(","):
                best[blocks] = min(best.get(blocks, math.inf), rise)
            unfitted = f" ({math.exp(losses[0]):.1f} before the refit)" if len(losses) > 1 else ""
            where = " ".join(lab.anatomy.collapse(lab.anatomy.expand(gone))).replace("block.", "")
            made = (blocks, name, f"{math.exp(losses[-1]):.2f}{unfitted}", rise)
            rows.append((*made, f"{lab.passes - passes:.1f}", f"{seconds:.0f}", where))
            print(rows[-1], file=sys.stderr, flush=True)
    columns = ("blocks' worth", "recipe", "ppl8", "lr", "passes", "s", "gone")
    rows.sort(key=lambda r: (r[0], r[3] if isinstance(r[3], float) else math.inf))
    for place, row in enumerate(rows):
        if isinstance(row[3], float):
            known = row[1] in PUBLISHED.split(",") or row[0] not in best
            share = "" if known else f" ({row[3] / best[row[0]]:.2f} of the best published)"
            rows[place] = (*row[:3], f"{row[3]:.3f}{share}", *row[4:])
    changed = "".join(f"; {name} with {options}" for name, options in given.options.items())
    head = (
        f"dense ppl8 {math.exp(dense):.2f}, calibrated on {given.rows} x 512 tokens{changed}; {machine(given.threads)}"
    )
    return head + "\n\n" + table(columns, rows)


if __name__ == "__main__":
    print(main())
