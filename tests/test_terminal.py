"""What progress looks like: bars on a terminal, lines in a pipe, one line that changes in a notebook."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lamina import terminal


def work(run: Any) -> None:
    """Two kinds of work, one of which is in parts."""
    run.say("surveying [2 sites]")
    for done in range(3):
        run.progress("survey: cosine", done, 2)
    for _ in range(4):
        run.progress("trials", 1, 1)


def shown(monkeypatch: pytest.MonkeyPatch, **console: Any) -> str:
    """What `work` prints on such a console."""
    out = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=out, highlight=False, soft_wrap=True, width=120, **console))
    run: Any = SimpleNamespace()
    with terminal.progress(run):
        work(run)
    return out.getvalue()


def test_in_a_pipe_there_is_no_escape_code_and_no_line_of_quick_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch) == "surveying [2 sites]\n"


def test_in_a_pipe_long_work_has_a_line_in_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(terminal, "console", Console(file=out, width=120))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    lines = terminal._Lines()
    for second in range(13):
        now[0] = float(second)
        lines.show(f"gradients: part {second}", second, 12)
    lines.show("gradients", 0, 3)
    lines.show("gradients", 3, 3)
    assert out.getvalue().splitlines() == [f"gradients: part {n} {n}/12" for n in (5, 10, 12)]


def test_on_a_terminal_there_are_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown(monkeypatch, force_terminal=True, force_jupyter=False, legacy_windows=False)
    assert "\x1b[" in text
    assert "survey: cosine" in text
    assert "━" in text


def test_in_a_notebook_one_line_changes_and_is_empty_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def display(data: dict[str, str], *, raw: bool, display_id: bool = False) -> Any:
        assert raw
        told.append(data["text/plain"])
        return SimpleNamespace(update=lambda d, raw: told.append(f"update {d['text/plain']}".strip()))

    stub: Any = ModuleType("IPython.display")
    stub.display = display
    monkeypatch.setitem(__import__("sys").modules, "IPython.display", stub)
    shown(monkeypatch, force_jupyter=True)
    assert told == ["", "surveying [2 sites]", "update survey: cosine 0/2", "update"]


def test_the_command_line_writes_no_escape_code_into_a_pipe(thin: Any, tmp_path: Path, quick: None) -> None:
    code, out, err = thin("--blocks", "1")
    assert code == 0, err
    assert "surveying" in out
    assert "\x1b" not in out + err
    assert "1/1" not in out
