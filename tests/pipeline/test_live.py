"""Progress as a file: whole at any time, seldom written, gone with its verb."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from lamina.core.documents import Budget, Recipe
from lamina.pipeline import live as module
from lamina.pipeline.live import live
from lamina.pipeline.run import Run


def read(folder: Path) -> tuple[str, str, int, int]:
    told = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    assert told["pid"] == os.getpid()
    return told["verb"], told["what"], told["done"], told["total"]


def test_it_is_shown_always_and_written_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, int, int]] = []
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with live(tmp_path, "plan", lambda *told: shown.append(told)) as told:
        assert read(tmp_path) == ("plan", "", 0, 0)
        told("judging", 1, 3)
        clock[0] += 0.9
        told("judging", 2, 3)
        assert read(tmp_path) == ("plan", "judging", 1, 3)
        clock[0] += 0.2
        told("judging", 3, 3)
        assert read(tmp_path) == ("plan", "judging", 3, 3)
    assert shown == [("judging", n, 3) for n in (1, 2, 3)]
    assert list(tmp_path.iterdir()) == []
    clock[0] += 9
    told("late", 1, 1)
    assert list(tmp_path.iterdir()) == []
    assert shown[-1] == ("late", 1, 1)


def test_a_disk_that_takes_no_more_is_not_its_business(tmp_path: Path) -> None:
    with live(tmp_path / "nowhere", "plan", lambda *_: None) as told:
        told("judging", 1, 3)


def test_a_verb_of_a_run_writes_it_and_gives_the_progress_back(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "run", Recipe(model="m", budget=Budget(keep=0.5)))
    mine = run.progress
    with contextlib.suppress(ZeroDivisionError), run.verb("plan", ["x"], []) as work:
        assert work
        run.progress("judging", 1, 2)
        assert read(tmp_path / "run" / ".state") == ("plan", "judging", 1, 2)
        raise ZeroDivisionError
    assert run.progress is mine
    assert not (tmp_path / "run" / ".state" / "progress.json").exists()
