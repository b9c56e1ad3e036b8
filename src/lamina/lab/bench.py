"""What a planner may ask for beyond scores: a judge, and scores of the network as it is thinned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lamina.core.documents import Document
from lamina.core.errors import LaminaError
from lamina.core.files import to_json, write_text
from lamina.lab.judge import Judge

if TYPE_CHECKING:
    from lamina.core.scores import Scores
    from lamina.lab.lab import Lab
    from lamina.lab.protocols import Measure

D = TypeVar("D", bound=Document)


class Bench:
    """A lab, the measure in use, and a journal of what was judged, so that a killed search goes on where it was."""

    def __init__(
        self, lab: Lab, measure: Measure | None = None, journal: Path | None = None,
        folder: Path | None = None, mark: str = "",
    ) -> None:  # fmt: skip
        """`folder`: where documents stay that took long to make, and hold for all that `mark` is the fingerprint of."""
        self.lab, self.measure, self.journal, self.folder, self.mark = lab, measure, journal, folder, mark
        self._judges: dict[str, Judge] = {}

    def recall(self, name: str, kind: type[D]) -> D | None:
        """The document of that name, if it was made from what the bench is made from."""
        path = self.folder / name if self.folder else None
        if path is None or not path.is_file():
            return None
        found = kind.load(path)
        return found if getattr(found, "of", None) == self.mark else None

    def keep(self, name: str, made: D) -> D:
        """The document, marked and kept where the bench has a folder."""
        document: Any = made
        marked: Any = replace(document, of=self.mark)
        if self.folder is not None:
            marked.save(self.folder / name)
        return marked

    def rescore(self, gone: Iterable[str]) -> Scores:
        """The measure's scores with `gone` ablated."""
        if self.measure is None:
            raise LaminaError("there is no measure to score with again")
        with self.lab.ablate(gone):
            return self.measure.measure(self.lab)

    def judge(
        self, metric: str = "kl", *, sequences: int | None = None, length: int | None = None, batch_size: int = 1
    ) -> Judge:
        """A judge of that metric on some sequences, evenly chosen (None: all); what the journal knows is not computed
        again.
        """
        key = json.dumps([metric, sequences, length, batch_size])
        if key not in self._judges:
            lab = self.lab if sequences is None else self.lab.part(sequences, length)
            judge = Judge(lab, metric, batch_size=batch_size)
            judge.remember(self._read(key))
            self._judges[key] = judge
        return self._judges[key]

    def note(self) -> None:
        """Write the journal, atomically."""
        if self.journal is not None:
            data = {k: [[sorted(s), v] for s, v in j.heard.items()] for k, j in self._judges.items()}
            write_text(self.journal, to_json(data))

    def _read(self, key: str) -> Mapping[frozenset[str], list[float]]:
        if self.journal is None or not self.journal.exists():
            return {}
        try:
            rows = json.loads(self.journal.read_text(encoding="utf-8")).get(key, [])
            return {frozenset(sites): list(map(float, sums)) for sites, sums in rows}
        except (ValueError, TypeError):
            return {}
