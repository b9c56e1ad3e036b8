"""Two models side by side on tasks, of any kind and whoever made them: no run is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lamina.core.documents import EvidenceFile
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.files import fingerprint
from lamina.evaluators.tasks._evidence import evidence, notes
from lamina.evaluators.tasks._item import Marks, Progress, Subject, Task, chosen, kind_of, quiet
from lamina.lab.load import Loaded
from lamina.pipeline.marks import FORMAT, Shelf, names, outcomes


@dataclass
class Comparison:
    """A dense and a thinned model that are to do the same items of the same tasks.

    Text is read by the dense model's tokenizer, pictures and sound as the folder that it was read from says. With
    `folder` marks are kept there as they are made, and evidence.json is written.
    """

    dense: Loaded
    thinned: Loaded
    items: int = 500
    seed: int = 0
    folder: Path | None = None
    say: Callable[[str], None] = lambda line: None
    progress: Progress = quiet

    def measure(self, tasks: str) -> EvidenceFile:
        """The evidence of `tasks`, names between commas or "offline".

        Raises InputError for an unknown name, fewer than two items or the folder of a run, UnsupportedError for models
        of two kinds, or a task of another kind.
        """
        kind, other = kind_of(self.dense.model), kind_of(self.thinned.model)
        if kind != other:
            raise UnsupportedError(f"the dense model is of the kind {kind}, the thinned one of the kind {other}")
        if self.items < 2:
            raise InputError(f"a task takes at least 2 items, not {self.items}", where="items")
        if self.folder and (self.folder / "recipe.yaml").exists():
            raise InputError("this folder holds a run, with evidence of its own", where=self.folder, hint="another one")
        asked = chosen(tasks, kind)
        models = {"dense": self.dense, "thinned": self.thinned}
        common = [self.items, self.seed, FORMAT]
        prints = {
            of: fingerprint(loaded.fingerprint, str(next(loaded.model.parameters()).dtype), *common)[7:23]
            for of, loaded in models.items()
        }
        shelf = Shelf(self.folder / ".state" / "tasks" if self.folder else None, prints)

        def mark(task: Task, of: str) -> Marks:
            return shelf.marks(task, of, lambda: task.score(self._subject(of, models[of])))

        found, lines = outcomes(asked, names(tasks), mark, self.seed, self.say)
        rows = evidence(found)
        made = EvidenceFile(evidence=rows, notes=(*notes(rows), *lines))
        if self.folder:
            made.save(self.folder / "evidence.json")
        return made

    def _subject(self, of: str, loaded: Loaded) -> Subject:
        def show(what: str, done: int, total: int) -> None:
            self.progress(f"{of}: {what}", done, total)

        tokenizer = self.thinned.tokenizer if self.dense.tokenizer is None else self.dense.tokenizer
        return Subject(
            model=loaded.model, tokenizer=tokenizer, items=self.items, seed=self.seed, path=self.dense.path,
            progress=show,
        )  # fmt: skip
