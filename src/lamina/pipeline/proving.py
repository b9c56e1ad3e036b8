"""Tasks in `prove`: which are asked for, and their marks, kept one by one so that a run that was cut off goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Evidence, EvidenceFile, Receipts, plain
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.files import fingerprint, to_json, write_text
from lamina.evaluators.tasks._evidence import CAPABILITY, TASK, evidence, notes
from lamina.evaluators.tasks._item import Marks, Subject, Task, chosen, kind_of, paired

if TYPE_CHECKING:
    from torch import nn

    from lamina.pipeline.run import Run

ITEMS = 500
"""Of a task, where the user says nothing."""
FORMAT = 1
"""Of the files that marks are kept in; it goes up when a task's items or prompts change."""


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
    shelf = _Shelf(run, asked.items, receipts)
    named = {n.strip() for n in asked.typed.split(",")}
    outcomes, lines = [], list[str]()
    for number, task in enumerate(asked.tasks, 1):
        run.say(f"task {number} of {len(asked.tasks)}: {task.name}")
        try:
            dense = shelf.marks(task, "dense", lambda: run.loaded.model)
            thinned = shelf.marks(task, "thinned", lambda: run.thinned)
        except UnsupportedError as error:
            if task.name in named:
                raise
            lines.append(f"left out: {task.name}: {error}")
            run.say(lines[-1])
            continue
        outcomes.append(paired(task, dense, thinned, run.recipe.seed))
    if not outcomes:
        raise UnsupportedError("no task fits this model: " + "; ".join(lines), where="tasks")
    rows = evidence(outcomes)
    return rows, (*notes(rows), *lines)


class _Shelf:
    """Marks by task and model in `.state/tasks/`; those of other models, items or seeds are of no use any more."""

    def __init__(self, run: Run, items: int, receipts: Receipts) -> None:
        self.run, self.items, self.folder = run, items, run.state / "tasks"
        common = (items, run.recipe.seed, run.recipe.dtype, run.recipe.device, FORMAT)
        marks = {"dense": run.loaded.fingerprint, "thinned": plain(receipts)}
        self.prefix = {of: f"{of}-{fingerprint(mark, *common)[7:23]}-" for of, mark in marks.items()}
        for file in self.folder.glob("*.json"):
            if not file.name.startswith(tuple(self.prefix.values())):
                file.unlink()

    def marks(self, task: Task, of: str, model: Callable[[], nn.Module]) -> Marks:
        """The marks of one model, read where they are kept, else made and kept."""
        name = re.sub(r"[^\w.-]", "-", task.name)
        path = self.folder / f"{self.prefix[of]}{name}.json"
        found = _read(path, task.name)
        if found is None:
            found = task.score(self._subject(of, model()))
            write_text(path, to_json({"task": task.name, **_data(found)}))
        return found

    def _subject(self, of: str, model: nn.Module) -> Subject:
        run, loaded = self.run, self.run.loaded

        def show(what: str, done: int, total: int) -> None:
            run.progress(f"{of}: {what}", done, total)

        seed = run.recipe.seed
        return Subject(
            model=model, tokenizer=loaded.tokenizer, items=self.items, seed=seed, path=loaded.path, progress=show
        )


def _data(marks: Marks) -> Mapping[str, Any]:
    return {
        "values": marks.values.tolist(), "keys": list(marks.keys), "chance": marks.chance, "how": marks.how,
        "groups": list(marks.groups),
    }  # fmt: skip


def _read(path: Path, task: str) -> Marks | None:
    """Marks that are kept; None where there are none, or of another task."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("task") != task:
            return None
        return Marks.of(data.pop("values"), data.pop("keys"), **data)
    except (OSError, ValueError, KeyError, TypeError):
        return None
