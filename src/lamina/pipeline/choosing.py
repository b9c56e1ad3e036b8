"""Choosing: what a recipe's planner is given, what it chooses, and what that should cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core import registry
from lamina.core.documents import Step, plain
from lamina.core.errors import InputError
from lamina.core.files import fingerprint
from lamina.pipeline.run import Run
from lamina.pipeline.table import SURVEY

if TYPE_CHECKING:
    from lamina.core.menu import Frontier, Menu, Reason
    from lamina.lab import Bench, Lab

MENU = "menu.json"


def options_of(run: Run, name: str) -> dict[str, Any]:
    """The options of a measure, as recipe and row say them."""
    row = registry.row(run.recipe.name)
    return {**row.measure_options, **run.recipe.measure_options} if name == row.measure else {}


def planner_of(run: Run) -> Any:
    """The recipe's planner."""
    row = registry.row(run.recipe.name)
    options = {**row.planner_options, **run.recipe.planner_options}
    if row.kinds:
        options["kinds"] = row.kinds
    return registry.PLANNERS.make(row.planner, options)


def bench_of(run: Run, journal: Path | None = None) -> Bench:
    """What the planner works on; what it prices and measures stays in the run folder."""
    from lamina.lab import Bench

    row = registry.row(run.recipe.name)
    measure = registry.MEASURES.make(row.measure, options_of(run, row.measure)) if row.measure else None
    return Bench(run.lab(), measure, journal=journal, folder=run.folder, mark=_mark(run))


def _mark(run: Run) -> str:
    """The fingerprint of all that prices hang on; the budget is not among it."""
    row, recipe = registry.row(run.recipe.name), run.recipe
    asked = plain({**row.planner_options, **recipe.planner_options})
    return fingerprint(run.loaded.fingerprint, run.tokens.fingerprint, row.planner, asked, recipe.dtype, recipe.seed)


def price(run: Run) -> None:
    """Write the menu, where the recipe's planner has one: every option, priced."""
    planner = planner_of(run)
    if not hasattr(planner, "menu"):
        return
    with run.verb("menu", [_mark(run)], [MENU]) as work:
        if work:
            run.say(f"pricing what {registry.row(run.recipe.name).planner} can do")
            menu: Menu = planner.menu(bench_of(run))
            run.say(f"{len(menu.options)} options priced in {menu.passes:.1f} forwards over {menu.tokens} tokens")
            run.log(f"menu: {menu.passes:.2f} forward-equivalents over {menu.tokens} tokens")


def frontier(run: Run) -> Frontier:
    """The cheapest plans for ever smaller budgets of the run's first resource.

    Raises InputError for a planner that has no frontier.
    """
    return _able(run, "frontier").frontier(run.recipe.budget, bench_of(run))


def explain(run: Run) -> list[Reason]:
    """Why each option of the last plan was taken, and what came second. Raises InputError as `frontier`."""
    return list(_able(run, "explain").explain(run.recipe.budget, bench_of(run)))


def _able(run: Run, what: str) -> Any:
    planner = planner_of(run)
    if not hasattr(planner, what):
        able = [n for n, r in registry.rows().items() if hasattr(registry.PLANNERS.method(r.planner), what)]
        name = registry.row(run.recipe.name).planner
        raise InputError(f"the planner {name} has no {what}", where=run.recipe.name, hint=f"--recipe {', '.join(able)}")
    return planner


def choose(run: Run, journal: Path) -> tuple[tuple[Step, ...], dict[str, float]]:
    """The steps of the recipe's planner, and what they should cost."""
    from lamina.pipeline.table import read_survey

    row, recipe = registry.row(run.recipe.name), run.recipe
    planner, bench = planner_of(run), bench_of(run, journal)
    lab = bench.lab
    surveyed = read_survey(run.path(SURVEY)) if row.measure else {}
    if row.measure and row.measure not in surveyed:
        raise InputError(f"the measure {row.measure} scores nothing of this model", hint="take another recipe")
    scores = surveyed.get(row.measure)
    for site in recipe.budget.protect:
        lab.anatomy.site(site)
    run.say(f"planning by {recipe.name}")
    steps = planner.plan(scores, recipe.budget, lab.anatomy, bench)
    gone = [s for step in steps for s in step.sites if step.rewrite == "drop"]
    refit = row.refit if recipe.refit is None else recipe.refit
    fitted = refit_step(lab, gone) if refit and not any(s.rewrite == "refit" for s in steps) else None
    steps = (fitted, *steps) if fitted else steps
    run.log(f"plan: {lab.passes:.1f} forward-equivalents over {lab.tokens} tokens")
    return steps, {**_expect(lab, steps, gone), **_expected_times(bench, steps)}


def refit_step(lab: Lab, gone: Sequence[str]) -> Step | None:
    """The refit around the sites that go; None where nothing that stays can take it."""
    from lamina.rewrites.refit import RIDGE, refit_sites

    sites = refit_sites(lab.anatomy, gone)
    around = lab.anatomy.collapse(lab.anatomy.expand(gone))
    return Step(rewrite="refit", sites=sites, options={"around": list(around), "ridge": RIDGE}) if sites else None


def _expect(lab: Lab, steps: Sequence[Step], gone: Sequence[str]) -> dict[str, float]:
    """What the plan should cost: resources as its steps say or forecast, the loss as measured on calibration text.

    Of a plan of other rewrites than drops the loss is the sum of its steps' prices, where all have one.
    """
    if any(s.rewrite not in ("drop", "refit") for s in steps):
        whole = lab.anatomy.total()
        left: dict[str, float] = dataclasses.asdict(whole)
        for step in steps:
            told = any(name in step.why for name in left)
            freed = {} if told else dataclasses.asdict(whole - registry.rewrite_of(step).forecast(step, lab.anatomy))
            left = {n: v - (step.why.get(n, 0.0) if told else freed[n]) for n, v in left.items()}
        priced = all("damage" in s.why for s in steps)
        loss = {"loss": round(sum(s.why["damage"] for s in steps), 6)} if priced else {}
        return {**loss, **{n: round(v) for n, v in left.items()}}
    after = lab.anatomy.total() - lab.anatomy.freed(gone)
    expects: dict[str, float] = {
        "loss": round(expected_loss(lab, steps, gone), 6),
        "parameters": after.parameters,
        "bytes": after.bytes,
        "macs": after.macs,
        "kv_bytes": after.kv_bytes,
    }
    return expects


def _expected_times(bench: Bench, steps: Sequence[Step]) -> dict[str, float]:
    """Seconds of each work that the plan was to take less of."""
    from lamina.core.menu import Times

    found = {}
    for name in {k for s in steps for k in s.why if k.startswith("latency@")}:
        times = bench.recall(Times.name(name), Times)
        if times is not None:
            found[name] = round(times.total - sum(s.why.get(name, 0.0) for s in steps), 6)
    return found


def expected_loss(lab: Lab, steps: Sequence[Step], gone: Sequence[str]) -> float:
    """Rise of the loss, in nats, on calibration text; a refit is tried on most of it and judged on the last quarter."""
    fits = [s for s in steps if s.rewrite == "refit"]
    if not fits or len(lab.batches) < 2:
        return lab.loss(gone) - lab.loss()
    from lamina.rewrites.refit import kept_weights

    cut = max(1, len(lab.batches) * 3 // 4)
    fitting, judging = lab.on(lab.batches[:cut]), lab.on(lab.batches[cut:])
    dense = judging.loss()
    with kept_weights(lab, [s for step in fits for s in step.sites]):
        for step in fits:
            registry.rewrite_of(step).apply(step, fitting)
        return judging.loss(gone) - dense
