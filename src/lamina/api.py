"""The verbs for Python, with the words of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lamina.core.documents import Budget, EvidenceFile, Heal, Plan, Receipts, Recipe
from lamina.core.errors import InputError
from lamina.core.speeds import SpeedFile
from lamina.pipeline import Run, verbs
from lamina.pipeline.scoring import How
from lamina.report import write
from lamina.report.survey import Survey

if TYPE_CHECKING:
    from torch import nn

    from lamina.pipeline.comparing import Comparison

Shows = TypeVar("Shows", "Run", "Comparison")


class ShownPlan(Plan):
    """A plan that shows itself in a notebook; otherwise the same, and equal to the plan that it is made of."""

    def _repr_html_(self) -> str:
        from lamina.report.fragments import plan_html

        return plan_html(self)

    def __eq__(self, other: object) -> bool:
        return _equal(Plan, self, other)

    __hash__ = Plan.__hash__


class ShownEvidence(EvidenceFile):
    """Evidence that shows itself in a notebook; otherwise the same, and equal to the evidence that it is made of."""

    def _repr_html_(self) -> str:
        from lamina.report.fragments import evidence_html

        return evidence_html(self)

    def __eq__(self, other: object) -> bool:
        return _equal(EvidenceFile, self, other)

    __hash__ = EvidenceFile.__hash__


def _equal(kind: type[Plan] | type[EvidenceFile], one: object, other: object) -> bool:
    """Whether both are documents of that kind with equal fields, shown ones or not."""
    if not isinstance(other, kind):
        return NotImplemented
    return all(getattr(one, f.name) == getattr(other, f.name) for f in fields(kind))


def _parts(document: Plan | EvidenceFile) -> dict[str, Any]:
    return {f.name: getattr(document, f.name) for f in fields(document)}


@dataclass(frozen=True)
class Result:
    """What a run has come to: `model` is the thinned network, `folder` holds everything else."""

    folder: Path
    model: nn.Module
    plan: Plan
    receipts: Receipts
    evidence: EvidenceFile

    def _repr_html_(self) -> str:
        """The plan and what it cost."""
        from lamina.report.fragments import evidence_html, plan_html

        return plan_html(self.plan) + evidence_html(self.evidence)


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


@contextmanager
def _shown(made: Shows, show: bool) -> Iterator[Shows]:
    """The run, or what else tells its progress; with `show`, that is printed meanwhile."""
    if not show:
        yield made
        return
    from lamina.terminal import progress

    with progress(made):
        yield made


def thin(model: str | nn.Module, *, out: str | Path, show: bool = False, **asked: Any) -> Result:
    """Survey, plan, apply, heal, prove and report; see `run` for what may be asked. `show` prints the progress.

    A module in memory is left as it is; the thinned one is a copy.
    """
    with _as_given(model), _shown(run(model, out=out, **asked), show) as made:
        done = verbs.thin(made)
    write(done.folder)
    plan_, proof = ShownPlan(**_parts(done.plan())), ShownEvidence(**_parts(done.evidence()))
    return Result(done.folder, done.thinned, plan_, done.receipts(), proof)


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
    show: bool = False,
    **asked: Any,
) -> Survey:
    """Score every block and sublayer, of any kind of model; see `lamina survey --help` for what may be asked.

    What is returned reads like a mapping of measure → scores.
    """
    made = run(model, out=out, **asked)
    made.any_kind, made.streamed = True, stream
    how = How(shards=shards, ray=ray, scratch=Path(scratch) if scratch else None, compare=compare)
    with _as_given(model), _shown(made, show):
        verbs.survey(made, measures, how)
    return Survey.open(made.folder)


def plan(folder: str | Path, *, show: bool = False, **options: Any) -> Plan:
    """Choose what goes in a run that was surveyed."""
    with _as_given(options.get("model")), _shown(Run.open(folder, **options), show) as made:
        return ShownPlan(**_parts(verbs.plan(made)))


def apply(folder: str | Path, *, show: bool = False, **options: Any) -> Receipts:
    """Do what the plan says, and publish the checkpoint once it is shown to reload."""
    with _as_given(options.get("model")), _shown(Run.open(folder, **options), show) as made:
        return verbs.apply(made)


def heal(folder: str | Path, *, show: bool = False, **options: Any) -> Receipts:
    """Heal as the recipe says."""
    with _as_given(options.get("model")), _shown(Run.open(folder, **options), show) as made:
        return verbs.heal(made)


def prove(
    folder: str | Path, *, tasks: str | None = None, items: int = 500, show: bool = False, **options: Any
) -> EvidenceFile:
    """Measure what the plan cost; and by `tasks`, names between commas or "offline", of each at most `items` items."""
    with _as_given(options.get("model")), _shown(Run.open(folder, **options), show) as made:
        return ShownEvidence(**_parts(verbs.prove(made, tasks, items)))


def compare(
    dense: str | nn.Module,
    thinned: str | nn.Module,
    *,
    tasks: str = "offline",
    items: int = 500,
    seed: int = 0,
    out: str | Path | None = None,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    show: bool = False,
) -> EvidenceFile:
    """Two models of any kind on the same items of tasks, whoever made them: folders, hub ids or modules in memory.

    `tasks` are names between commas or "offline", all that fit the kind of model, of each at most `items`. In the
    folder `out` marks are kept as they are made, so that a call that was cut off goes on, and evidence.json is written.
    """
    from lamina.lab.load import load
    from lamina.pipeline.comparing import Comparison

    with _as_given(dense), _as_given(thinned):
        both = [
            load(
                model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, tokenizer=tokenizer,
                any_kind=True,
            )
            for model in (dense, thinned)
        ]  # fmt: skip
        asked = Comparison(*both, items=items, seed=seed, folder=Path(out) if out else None)
        with _shown(asked, show):
            return ShownEvidence(**_parts(asked.measure(tasks)))


def speed(
    folder: str | Path,
    *,
    batches: Sequence[int] = (1, 4),
    lengths: Sequence[int] | None = None,
    decode: int = 32,
    engines: Sequence[str] | None = None,
    rounds: int = 5,
    threads: int | None = None,
    show: bool = False,
    **options: Any,
) -> SpeedFile:
    """Time the dense and the thinned model of a run in turn, with memory and energy; see docs/speed.md."""
    from lamina.pipeline.timing import HowFast
    from lamina.pipeline.timing import speed as measure

    how = HowFast(
        batches=tuple(batches), lengths=None if lengths is None else tuple(lengths), decode=decode, rounds=rounds,
        engines=None if engines is None else tuple(engines), threads=threads,
    )  # fmt: skip
    with _as_given(options.get("model")), _shown(Run.open(folder, **options), show) as made:
        return measure(made, how)


def report(folder: str | Path) -> Path:
    """Write report.html and give its path."""
    return write(Path(folder))
