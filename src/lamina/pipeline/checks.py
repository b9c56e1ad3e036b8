"""What can be known to be wrong before any work is done, and the options that methods are made with."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lamina.core import registry
from lamina.core.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from lamina.core.documents import Recipe
    from lamina.pipeline.run import Run

MEASURED = {"speed": {"prefill": 256, "prompt": 32, "decode": 8}, "memory": {"length": 256}}
"""Tokens that the evaluators ask for, where the model's context holds them."""


def check(run: Run) -> None:
    """Names and options of the recipe's methods, and whether the model can become a GGUF file if that is asked for.

    Raises InputError or UnsupportedError, one line, before minutes are spent.
    """
    recipe = run.recipe
    row = registry.row(recipe.name)
    planner = registry.PLANNERS.make(row.planner, {**row.planner_options, **recipe.planner_options})
    if (recipe.budget.also or recipe.budget.metric == "latency") and not getattr(planner, "mixes", False):
        able = [n for n, r in registry.rows().items() if getattr(registry.PLANNERS.method(r.planner), "mixes", False)]
        what = "several resources at once" if recipe.budget.also else "latency"
        raise InputError(f"the planner {row.planner} takes no budget of {what}", hint=f"--recipe {', '.join(able)}")
    if row.measure:
        registry.MEASURES.make(row.measure, {**row.measure_options, **recipe.measure_options})
    if recipe.heal is not None:
        registry.HEALERS.make(recipe.heal.healer, recipe.heal.options)
        amount = recipe.heal.steps if recipe.heal.steps is not None else recipe.heal.minutes
        if amount is not None and not amount > 0:
            raise InputError(f"healing takes a positive number of steps or minutes, not {amount}", where="heal")
    if recipe.gguf:
        for problem in registry.EXPORTERS.make("gguf").check((), run.loaded.model, run.loaded):
            raise problem.error()


def seeded(methods: registry.Registry, name: str, run: Run, options: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """A method's options with the run's seed, where it takes one and none is given."""
    takes = any(option == "seed" for option, _, _ in methods.card(name).options)
    return {**({"seed": run.recipe.seed} if takes else {}), **options}


def context(model: nn.Module) -> int | None:
    """The most tokens of a sequence that the model is made for, where its config says so."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_length(recipe: Recipe, model: nn.Module) -> None:
    """Raises InputError for sequences that the model can't read or that predict nothing, and for a negative seed."""
    length, limit = recipe.data.length, context(model)
    if length == 1:
        raise InputError("sequences of one token predict nothing", where="length", hint="ask for 2 or more")
    if limit is not None and length > limit:
        what = f"sequences of {length:,} tokens are longer than the model's {limit:,}"
        raise InputError(what, where="length", hint=f"--length {limit}")
    if recipe.seed < 0:
        raise InputError(f"a seed is 0 or more, not {recipe.seed}", where="seed")


def fitting(model: nn.Module, evaluator: str) -> dict[str, Any]:
    """Shorter workloads for a model whose context does not hold the usual ones."""
    limit, usual = context(model), MEASURED.get(evaluator, {})
    if limit is None or limit >= max(usual.values(), default=0):
        return {}
    if evaluator == "memory":
        return {"length": limit}
    decode = max(min(usual["decode"], limit // 3), 1)
    return {"prefill": limit, "prompt": max(min(usual["prompt"], limit - decode), 1), "decode": decode}
