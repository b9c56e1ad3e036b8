"""Marks of tasks, kept one by one as files, so that what was cut off goes on; and the outcomes that they come to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lamina.core.errors import UnsupportedError
from lamina.core.files import to_json, write_text
from lamina.evaluators.tasks._item import Marks, Outcome, Task, paired

FORMAT = 1
"""Of the files that marks are kept in; it goes up when a task's items or prompts change."""


class Shelf:
    """Marks by task and model, in a folder: `prints` are "dense" and "thinned" → what else they depend on, as a word.

    Files of other models, items or seeds are of no use any more, and go. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None, prints: Mapping[str, str]) -> None:
        self.folder, self.prefix = folder, {of: f"{of}-{mark}-" for of, mark in prints.items()}
        for file in folder.glob("*.json") if folder else ():
            if not file.name.startswith(tuple(self.prefix.values())):
                file.unlink()

    def marks(self, task: Task, of: str, make: Callable[[], Marks]) -> Marks:
        """The marks of one model, read where they are kept, else made and kept."""
        if self.folder is None:
            return make()
        name = re.sub(r"[^\w.-]", "-", task.name)
        path = self.folder / f"{self.prefix[of]}{name}.json"
        found = _read(path, task.name)
        if found is None:
            found = make()
            write_text(path, to_json({"task": task.name, **_data(found)}))
        return found


def outcomes(
    tasks: Iterable[Task],
    named: Iterable[str],
    mark: Callable[[Task, str], Marks],
    seed: int,
    say: Callable[[str], None],
) -> tuple[list[Outcome], list[str]]:
    """What both models got on each task, by `mark` of a task and "dense" or "thinned"; and a line for what is left out.

    A task that does not fit the model is left out, and that is said; one that was `named` raises, and so do none at
    all. Raises UnsupportedError.
    """
    found, lines, known, every = list[Outcome](), list[str](), {*named}, tuple(tasks)
    for number, task in enumerate(every, 1):
        say(f"task {number} of {len(every)}: {task.name}")
        try:
            found.append(paired(task, mark(task, "dense"), mark(task, "thinned"), seed))
        except UnsupportedError as error:
            if task.name in known:
                raise
            lines.append(f"left out: {task.name}: {error}")
            say(lines[-1])
    if not found:
        raise UnsupportedError("no task fits this model: " + "; ".join(lines), where="tasks")
    return found, lines


def names(typed: str) -> set[str]:
    """The names between commas."""
    return {n.strip() for n in typed.split(",")}


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
