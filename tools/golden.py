"""Write tests/golden/smollm2.json: every stable measure's numbers, and recipes' picks, on the real SmolLM2-135M.

Run after a change that is meant to change numbers, and look at the difference: `python tools/golden.py`.
Forward-only measures see two blocks of 128 tokens of the default prose; those that ablate site by site, and recipes
that judge anew, see the first 16 tokens of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.core.registry import Row
    from lamina.lab import Lab

FILE = Path(__file__).parent.parent / "tests" / "golden" / "smollm2.json"
MODEL = "smollm2-135m"
LENGTH, SHORT = 128, 16
BLOCKS = 3
LONG = frozenset({"feature-complexity"})
"""Measures of blocks and sublayers that take long, though they share a pass or read weights alone."""
"""Recipes drop as many parameters as this many blocks hold."""


@cache
def lab(tokens: int = LENGTH) -> Lab:
    """The real model in float32 on the first `tokens` tokens of two blocks of the default prose, drawn by seed 0."""
    import torch

    from lamina.core.documents import Data
    from lamina.lab import Lab
    from lamina.lab.load import load
    from lamina.lab.texts import prepare

    torch.set_num_threads(1)
    if tokens != LENGTH:
        whole = lab()
        return whole.on(torch.cat([b["input_ids"] for b in whole.batches])[:, :tokens])
    loaded = load(MODEL, dtype="float32")
    data = Data(sequences=2, length=LENGTH, heldout_sequences=1)
    return Lab(loaded.model, prepare(data, loaded.tokenizer).calibration)


def text_mark(tokens: int = LENGTH) -> str:
    """A fingerprint of the token ids."""
    from lamina.core.files import fingerprint

    return fingerprint(*(b["input_ids"].numpy().tobytes() for b in lab(tokens).batches))


def stable_measures() -> list[str]:
    """Names of the measures that promise a golden number."""
    from lamina.core.papers import Status
    from lamina.core.registry import MEASURES

    return [n for n in MEASURES if MEASURES.card(n).status is Status.STABLE]


def heavy(measure: str) -> bool:
    """Whether a measure looks inside sublayers, or leaves sites out: seconds to a minute on the real model."""
    from lamina.core.papers import Need
    from lamina.core.registry import MEASURES
    from lamina.core.sites import SUBLAYERS, Kind

    card = MEASURES.card(measure)
    alone = card.needs is Need.GRADIENT and not hasattr(MEASURES.make(measure), "tally")
    return alone or card.needs is Need.ABLATION or not set(card.on) <= SUBLAYERS | {Kind.BLOCK} or measure in LONG


def tokens_for(measure: str) -> int:
    """How much text a measure sees here."""
    from lamina.core.papers import Need
    from lamina.core.registry import MEASURES

    if not measure:
        return LENGTH
    alone = MEASURES.card(measure).needs is Need.GRADIENT and not hasattr(MEASURES.make(measure), "tally")
    return SHORT if alone or MEASURES.card(measure).needs is Need.ABLATION else LENGTH


@cache
def scores(measure: str) -> Any:
    """One measure's table on the real model."""
    from lamina.core.registry import MEASURES

    return MEASURES.make(measure).measure(lab(tokens_for(measure)))


def numbers(measure: str) -> dict[str, Any]:
    """The table in plain data, six digits; of sites of many units, the mean over them."""
    found = scores(measure)

    def rounded(table: Mapping[str, Iterable[float]]) -> dict[str, list[float]]:
        return {k: [float(f"{x:.6g}") for x in v] for k, v in table.items()}

    means = rounded({k: [sum(v) / len(v)] for k, v in found.values.items()})
    rows = {"unit": found.unit, "values": {k: v[0] for k, v in means.items()}}
    return rows | ({"spans": rounded(found.spans)} if found.spans else {})


def recipes() -> list[str]:
    """Stable recipe rows."""
    from lamina.core.papers import Status
    from lamina.core.registry import rows

    return [n for n, r in rows().items() if r.status is Status.STABLE]


def judges(row: Row) -> bool:
    """Whether the row's planner tries candidates on the model: ten seconds to two minutes here."""
    from lamina.core.papers import Need
    from lamina.core.registry import PLANNERS

    return PLANNERS.card(row.planner).needs is Need.ABLATION


def searches(row: Row) -> bool:
    """Whether the row's planner judges, or scores anew."""
    return judges(row) or "rescore" in row.planner_options


def picks(name: str) -> list[str]:
    """The sites that a recipe row drops, in its order, with as many parameters as three blocks hold."""
    from lamina.core.documents import Budget
    from lamina.core.registry import MEASURES, PLANNERS, row
    from lamina.lab import Bench

    entry = row(name)
    bench_lab = lab(SHORT if searches(entry) else tokens_for(entry.measure))
    whole = bench_lab.anatomy.total().parameters
    budget = Budget(limit=whole - BLOCKS * bench_lab.anatomy.cost("block.0").parameters)
    measure = MEASURES.make(entry.measure, entry.measure_options) if entry.measure else None
    table = None if measure is None else measure.measure(bench_lab) if searches(entry) else scores(entry.measure)
    kinds = {"kinds": entry.kinds} if entry.kinds else {}
    planner = PLANNERS.make(entry.planner, {**entry.planner_options, **kinds})
    steps = planner.plan(table, budget, bench_lab.anatomy, Bench(bench_lab, measure))
    return [s for step in steps if step.rewrite == "drop" for s in step.sites]


def main() -> None:
    """Compute all and write the file."""
    data = {
        "text": {str(n): text_mark(n) for n in (LENGTH, SHORT)},
        "measures": {n: numbers(n) for n in stable_measures()},
        "picks": {n: picks(n) for n in recipes()},
    }
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(FILE)


if __name__ == "__main__":
    main()
