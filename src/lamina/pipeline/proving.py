"""Tasks in `prove`: which are asked for, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Evidence, EvidenceFile, Receipts, plain
from lamina.core.errors import InputError
from lamina.core.files import fingerprint
from lamina.evaluators.tasks._evidence import CAPABILITY, TASK, evidence, notes
from lamina.evaluators.tasks._item import Marks, Subject, Task, chosen, kind_of
from lamina.pipeline.marks import FORMAT, Shelf, names, outcomes

if TYPE_CHECKING:
    from lamina.pipeline.run import Run

ITEMS = 500
"""Of a task, where the user says nothing."""


@dataclass(frozen=True)
class Asked:
    """The tasks that a run is asked for: as typed, the names that this comes to, and the tasks, if they are to be done.

    Nothing, where none are asked for.
    """

    typed: str = ""
    names: tuple[str, ...] = ()
    items: int = ITEMS
    tasks: tuple[Task, ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def inputs(self) -> list[object]:
        """What the evidence depends on beside what it depends on without tasks."""
        return [sorted(self.names), self.items, FORMAT] if self else []

    def facts(self, inputs: Sequence[object]) -> dict[str, Any]:
        """What is noted of a proof that is done."""
        return {"tasks": list(self.names), "items": self.items, "base": fingerprint(*inputs)} if self else {}


def asked(run: Run, typed: str | None, items: int, inputs: Sequence[object]) -> Asked:
    """The tasks that are named; where none are, those that are done already on the same `inputs`.

    Raises InputError for an unknown name or fewer than two items, UnsupportedError for a task of another kind of model.
    """
    if typed is None:
        noted = run.noted("prove") or {}
        kept = Asked(names=tuple(noted.get("tasks", ())), items=noted.get("items", ITEMS))
        done = kept and run.done("prove", fingerprint(*inputs, *kept.inputs), ["evidence.json"])
        return kept if done else Asked()
    if items < 2:
        raise InputError(f"a task takes at least 2 items, not {items}", where="items")
    found = chosen(typed, kind_of(run.loaded.model))
    return Asked(typed, tuple(t.name for t in found), items, found)


def measured(run: Run, inputs: Sequence[object], measure: Callable[[], Sequence[Evidence]]) -> tuple[Evidence, ...]:
    """What was measured without tasks: taken from `evidence.json` where it is of the same inputs, else measured.

    It is kept until all is done, so that tasks that were cut off don't bring it up again.
    """
    mark = fingerprint(*inputs)
    kept = run.state / f"measured-{mark[7:23]}.json"
    if kept.is_file():
        return EvidenceFile.load(kept).evidence
    noted = run.noted("prove") or {}
    known = mark in (noted.get("base"), noted.get("inputs")) and run.path("evidence.json").is_file()
    if known and not run.changed("prove"):
        return tuple(e for e in run.evidence().evidence if not e.name.startswith((TASK, CAPABILITY)))
    found = tuple(measure())
    EvidenceFile(evidence=found).save(kept)
    return found


def forget(run: Run) -> None:
    """Remove what is kept for a run that was cut off: it is done."""
    for kept in run.state.glob("measured-*.json"):
        kept.unlink()


def answered(run: Run, asked: Asked, receipts: Receipts) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    """The evidence of the tasks, and what it says in sentences.

    A task of a group that does not fit the model is left out, and that is said; one that was named raises.
    """
    common = (asked.items, run.recipe.seed, run.recipe.dtype, run.recipe.device, FORMAT)
    prints = {"dense": run.loaded.fingerprint, "thinned": plain(receipts)}
    shelf = Shelf(run.state / "tasks", {of: fingerprint(mark, *common)[7:23] for of, mark in prints.items()})

    def mark(task: Task, of: str) -> Marks:
        return shelf.marks(task, of, lambda: task.score(_subject(run, asked.items, of)))

    found, lines = outcomes(asked.tasks, names(asked.typed), mark, run.recipe.seed, run.say)
    rows = evidence(found)
    return rows, (*notes(rows), *lines)


def _subject(run: Run, items: int, of: str) -> Subject:
    loaded, model = run.loaded, run.loaded.model if of == "dense" else run.thinned

    def show(what: str, done: int, total: int) -> None:
        run.progress(f"{of}: {what}", done, total)

    return Subject(
        model=model, tokenizer=loaded.tokenizer, items=items, seed=run.recipe.seed, path=loaded.path, progress=show
    )
