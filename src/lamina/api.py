"""The verbs for Python, with the words of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Budget, EvidenceFile, Heal, Plan, Receipts, Recipe
from lamina.core.errors import InputError
from lamina.pipeline import Run, verbs
from lamina.pipeline.scoring import How
from lamina.report import write
from lamina.report.survey import Survey

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Result:
    """What a run has come to: `model` is the thinned network, `folder` holds everything else."""

    folder: Path
    model: nn.Module
    plan: Plan
    receipts: Receipts
    evidence: EvidenceFile


def run(
    model: str | nn.Module,
    *,
    out: str | Path,
    keep: float | None = None,
    parameters: int | None = None,
    bytes: int | None = None,
    kv: str | None = None,
    latency: str | None = None,
    blocks: int | None = None,
    sublayers: int | None = None,
    protect: Sequence[str] = (),
    recipe: str = "default",
    heal: int | None = None,
    tokenizer: Any = None,
    **more: Any,
) -> Run:
    """Start a run, or take it up; `more` are further fields of a recipe (data, dtype, seed, refit, …).

    `kv` and `latency` are as on the command line: "0.5x@32k", "0.7x@decode". Resources may be mixed.
    """
    from lamina import options

    asked: dict[str, dict[str, Any]] = {
        "keep": {"keep": keep},
        "parameters": {"limit": parameters},
        "bytes": {"metric": "bytes", "limit": bytes},
        "kv": options.kv(kv) if kv is not None else {},
        "latency": options.latency(latency) if latency is not None else {},
        "blocks": {"metric": "blocks", "drop": blocks},
        "sublayers": {"metric": "sublayers", "drop": sublayers},
    }
    given = {n: b for n, b in asked.items() if any(v is not None for k, v in b.items() if k != "metric")}
    if len(given) > 1 and ({"blocks", "sublayers"} & {*given} or {"keep", "parameters"} <= {*given}):
        raise InputError(f"one budget at a time, not {' and '.join(given)}")
    first, *also = given.values() or [{"keep": 1.0}]
    budget = Budget.from_data({**first, "also": also, "protect": tuple(protect)})
    named = model if isinstance(model, str) else type(model).__name__
    fields: dict[str, Any] = {"name": recipe, "model": named, "budget": budget.to_data(), **more}
    if heal is not None:
        fields["heal"] = Heal.from_data({"steps": heal}).to_data()
    in_memory = None if isinstance(model, str) else model
    return Run.start(Path(out), Recipe.from_data(fields), model=in_memory, tokenizer=tokenizer)


@contextmanager
def _as_given(model: str | nn.Module | None) -> Iterator[None]:
    """Afterwards every part of a module in memory is in training or evaluation as before."""
    parts = [] if model is None or isinstance(model, str) else list(model.modules())
    modes = [(part, part.training) for part in parts]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def thin(model: str | nn.Module, *, out: str | Path, **asked: Any) -> Result:
    """Survey, plan, apply, heal, prove and report; see `run` for what may be asked.

    A module in memory is left as it is; the thinned one is a copy.
    """
    with _as_given(model):
        done = verbs.thin(run(model, out=out, **asked))
    write(done.folder)
    return Result(done.folder, done.thinned, done.plan(), done.receipts(), done.evidence())


def survey(
    model: str | nn.Module,
    *,
    out: str | Path,
    measures: Sequence[str] | None = None,
    shards: int = 1,
    ray: str | None = None,
    stream: bool = False,
    scratch: str | Path | None = None,
    compare: bool = False,
    **asked: Any,
) -> Survey:
    """Score every block and sublayer, of any kind of model; see `lamina survey --help` for what may be asked.

    What is returned reads like a mapping of measure → scores.
    """
    made = run(model, out=out, **asked)
    made.any_kind, made.streamed = True, stream
    how = How(shards=shards, ray=ray, scratch=Path(scratch) if scratch else None, compare=compare)
    with _as_given(model):
        verbs.survey(made, measures, how)
    return Survey.open(made.folder)


def plan(folder: str | Path, **options: Any) -> Plan:
    """Choose what goes in a run that was surveyed."""
    with _as_given(options.get("model")):
        return verbs.plan(Run.open(folder, **options))


def apply(folder: str | Path, **options: Any) -> Receipts:
    """Do what the plan says, and publish the checkpoint once it is shown to reload."""
    with _as_given(options.get("model")):
        return verbs.apply(Run.open(folder, **options))


def heal(folder: str | Path, **options: Any) -> Receipts:
    """Heal as the recipe says."""
    with _as_given(options.get("model")):
        return verbs.heal(Run.open(folder, **options))


def prove(folder: str | Path, **options: Any) -> EvidenceFile:
    """Measure what the plan cost."""
    with _as_given(options.get("model")):
        return verbs.prove(Run.open(folder, **options))


def report(folder: str | Path) -> Path:
    """Write report.html and give its path."""
    return write(Path(folder))
