"""Run folders with a plan written by hand, applied without the reload contract's fresh process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_run

from lamina import pipeline
from lamina.core.documents import Budget, Data, Plan, Recipe, Step
from lamina.pipeline import Run

WIDE = {"intermediate_size": 512, "num_hidden_layers": 4}
"""MLPs of a width that DeciLM can say, and can say half of."""


def drops(*sites: str) -> Step:
    """A step that drops these sites."""
    return Step(rewrite="drop", sites=sites)


def cut(site: str, gone: Sequence[int], **options: Any) -> Step:
    """A step that cuts units of one site."""
    return Step(rewrite="narrow", sites=(site,), options={"gone": {site: list(gone)}, **options})


def begin(folder: Path, name: str = "llama", **changes: Any) -> Run:
    """A run of a tiny model that has done nothing yet."""
    model = tiny_run.make_model(folder / "base", name, **(WIDE | changes if name != "gpt2" else changes))
    data = Data(
        calibration=str(tiny_run.make_text(folder / "calibration.txt", 1)),
        heldout=str(tiny_run.make_text(folder / "heldout.txt", 2)),
        length=32, sequences=4, heldout_sequences=4,
    )  # fmt: skip
    recipe = Recipe(name="shortgpt", model=str(model), budget=Budget(keep=0.9), data=data, dtype="float32")
    return Run.start(folder / "run", recipe)


def planned(run: Run, *steps: Step) -> Run:
    """The run with this plan, applied."""
    run.begin()
    Plan(model=run.ref, recipe="shortgpt", budget=run.recipe.budget, steps=steps).save(run.path("plan.yaml"))
    pipeline.apply(run)
    return run


def made(folder: Path, *steps: Step, name: str = "llama", **changes: Any) -> Run:
    """A run of a tiny model with this plan, applied."""
    return planned(begin(folder, name, **changes), *steps)
