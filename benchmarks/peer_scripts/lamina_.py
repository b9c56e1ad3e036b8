"""lamina, by its own parts, at the peers' budgets and on their tokens."""

from __future__ import annotations

import json

from common import given, tokens, told

from lamina.core import registry
from lamina.core.documents import Budget, Step
from lamina.core.sites import Kind
from lamina.exporters.hf import save_checkpoint
from lamina.lab import Bench, Lab
from lamina.lab.load import load
from lamina.lab.moments import input_moments
from lamina.lab.order import merged
from lamina.pipeline.choosing import refit_step
from lamina.planners._moves import least

ARGS = given()


def blocks(count: int) -> Budget:
    """All but so many blocks."""
    return Budget(metric="blocks", drop=count)


def planned(recipe: str, lab: Lab, budget: Budget, **options: object) -> list[Step]:
    """The steps of a recipe, with the refit of what stays."""
    row = registry.row(recipe)
    measure = registry.MEASURES.make(row.measure, row.measure_options) if row.measure else None
    chosen = {**row.planner_options, **({"kinds": row.kinds} if row.kinds else {}), **options}
    planner = registry.PLANNERS.make(row.planner, chosen)
    scores = measure.measure(lab) if measure else None
    steps = list(planner.plan(scores, budget, lab.anatomy, Bench(lab, measure)))
    fitted = refit_step(lab, [s for step in steps for s in step.sites]) if recipe != "angular" else None
    return [fitted, *steps] if fitted else steps


def steps(lab: Lab) -> list[Step]:
    """What the task asks for."""
    anatomy = lab.anatomy
    kind, _, value = ARGS.task.partition("-")
    maps = tuple(m.id for s in anatomy.sublayers for m in anatomy.linears(s))
    if kind == "drop":
        return [Step(rewrite="drop", sites=tuple(json.loads(value)))]
    if kind == "blocks":
        return planned("default", lab, blocks(int(value)))
    if kind == "attention":
        return planned("damage", lab, Budget(metric="sublayers", drop=int(value)), kinds=(Kind.ATTENTION,))
    if kind == "neurons":
        units = [u for s in anatomy.sublayers for u in anatomy.units(s, Kind.NEURON)]
        tails = [m.id for m in anatomy.linears() if m.path in {anatomy.tail(u) for u in units}]
        seen = input_moments(lab, tails)
        gone = {u.id: sorted(least(anatomy, u, seen)[: u.width // 4]) for u in units}
        return [Step(rewrite="narrow", sites=tuple(gone), options={"gone": gone, "refit": 0.01})]
    amount = {"pattern": value} if ":" in value else {"sparsity": 0.5}
    options = {"sparsegpt": {**amount, "in_turn": True}, "gptq": {"type": value}}
    return [Step(rewrite=kind, sites=maps, options=options.get(kind, {"type": value}))]


def work() -> dict[str, list[int]] | None:
    """Plan, apply, save; or the run of blocks of least angular distance, for tools that must be told."""
    loaded = load(str(ARGS.model), dtype="bfloat16")
    lab = Lab(loaded.model, tokens(ARGS))
    if ARGS.task.startswith("span-"):
        count = int(ARGS.task.removeprefix("span-"))
        gone = {s.split(".")[1] for step in planned("angular", lab, blocks(count)) for s in step.sites}
        return {"span": [min(map(int, gone)), max(map(int, gone)) + 1]}
    receipts = [registry.rewrite_of(s).apply(s, lab) for s in merged(steps(lab), lab)]
    save_checkpoint(loaded.model, receipts, loaded.tokenizer, ARGS.out, name=ARGS.model.name)
    return None


told(work)
