"""Tasks whose outcome is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lamina.evaluators.tasks import _item
from lamina.evaluators.tasks._item import Marks, Subject, task


class Desk:
    """Tasks that note every call, and give the thinned model as many right answers as they are told.

    The thinned one of two models is that with no more than `most` tensors.
    """

    most = 35

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails: set[str] = set()
        monkeypatch.setattr(_item, "_discover", lambda: None)
        monkeypatch.setattr(_item, "_TASKS", {})
        monkeypatch.setattr(_item, "_FAMILIES", {})

    def add(self, name: str, lost: float, capability: str = "syntax", of: Any = "decoder", **card: Any) -> None:
        """A task in which the thinned model loses that share of the items."""

        def score(subject: Subject) -> Marks:
            """A planted task."""
            which = "dense" if len(list(subject.model.parameters())) > self.most else "thinned"
            self.calls.append(f"{name} {which}")
            if f"{name} {which}" in self.fails:
                raise KeyboardInterrupt
            draw = np.random.default_rng(subject.seed)
            right = draw.random(subject.items) < 0.8
            kept = draw.random(subject.items) >= (lost if which == "thinned" else 0)
            return Marks.of(right & kept, range(subject.items), chance=0.5, how="planted")

        task(name, capability=capability, of=of, **card)(score)
