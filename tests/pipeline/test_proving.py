"""`prove --tasks`: what is measured once, what is kept when a run is cut off, what is refused; planted truth."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_tasks import Desk
from tiny_run import left_behind, make_quick, refused, thin_command

import lamina as package
from lamina import pipeline
from lamina.core.documents import EvidenceFile
from lamina.core.errors import UnsupportedError
from lamina.evaluators.tasks import _item
from lamina.evaluators.tasks._item import Marks, Subject, task
from lamina.evaluators.tasks._questions import losses
from lamina.testing.models import own_text, tiny

pytestmark = pytest.mark.usefixtures("quick")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    made = Desk(monkeypatch)
    made.add("kept", 0.0)
    made.add("lost", 0.4, "knowledge")
    return made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that quality is measured."""
    from lamina.evaluators.quality import Quality

    seen: list[str] = []
    plain = Quality.evaluate

    def evaluate(self: Any, lab: Any, /, *, reference: Any) -> Any:
        seen.append("quality")
        return plain(self, lab, reference=reference)

    monkeypatch.setattr(Quality, "evaluate", evaluate)
    return seen


@pytest.fixture(scope="module")
def thinned(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done, without tasks."""
    from lamina.cli import main

    folder = tmp_path_factory.mktemp("thinned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        with pytest.raises(SystemExit) as end:
            main(thin_command(bench, folder, "--blocks", "1"))
    assert end.value.code == 0
    return folder


@pytest.fixture
def run(thinned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(thinned, tmp_path / "run"))


def test_the_table_says_what_was_lost_and_what_was_not(lamina: Run, run: Path, desk: Desk) -> None:
    code, out, err = lamina("prove", run, "--tasks", "offline", "--items", "120")
    assert (code, err) == (0, "")
    (kept,) = [line for line in out.splitlines() if line.startswith("kept ")]
    (lost,) = [line for line in out.splitlines() if line.startswith("lost ")]
    assert kept.strip().endswith("not distinguishable")
    assert lost.split("  ")[-1].strip().startswith("worse")
    assert "< 0.001" in lost
    (hit,) = [line for line in out.splitlines() if line.startswith("knowledge  ")]
    assert hit.strip().endswith("hit harder than the others")
    assert "this run could see a loss of" in out
    found = EvidenceFile.load(run / "evidence.json")
    assert found.get("loss", "difference") is not None
    assert found.get("parameters", "ratio") is not None
    difference = found.get("task:lost", "difference")
    assert difference is not None
    assert (difference.n, difference.capability, difference.better) == (120, "knowledge", "higher")
    assert left_behind(run) == []
    assert desk.calls == ["lost dense", "lost thinned", "kept dense", "kept thinned"]


def test_what_is_done_is_not_done_again(lamina: Run, run: Path, desk: Desk, counted: list[str]) -> None:
    first = lamina("prove", run, "--tasks", "kept", "--items", "40")
    assert first[0] == 0
    assert counted == []  # `thin` has measured it
    before = (run / "evidence.json").read_bytes()
    for more in (("--tasks", "kept", "--items", "40"), ("--tasks", "kept,kept", "--items", "40"), ()):
        code, out, _ = lamina("prove", run, *more)
        assert code == 0
        assert "prove: done already" in out
        assert "not distinguishable" in out
    assert (run / "evidence.json").read_bytes() == before
    assert lamina("prove", run, "--tasks", "kept,lost", "--items", "40")[0] == 0
    assert desk.calls == ["kept dense", "kept thinned", "lost dense", "lost thinned"]
    assert counted == []
    assert lamina("prove", run, "--tasks", "kept", "--items", "41")[0] == 0
    assert desk.calls[4:] == ["kept dense", "kept thinned"]


def test_a_run_that_was_cut_off_goes_on(lamina: Run, run: Path, desk: Desk, counted: list[str]) -> None:
    (run / "evidence.json").unlink()
    desk.fails = {"kept thinned"}
    assert lamina("prove", run, "--tasks", "offline", "--items", "30")[0] == 130
    assert desk.calls == ["lost dense", "lost thinned", "kept dense", "kept thinned"]
    assert not (run / "evidence.json").exists()
    desk.fails = set()
    assert lamina("prove", run, "--tasks", "offline", "--items", "30")[0] == 0
    assert desk.calls[4:] == ["kept thinned"]
    assert counted == ["quality"]
    assert left_behind(run) == []
    whole = EvidenceFile.load(run / "evidence.json")
    assert whole.get("loss", "difference") is not None
    (run / "evidence.json").unlink()
    assert lamina("prove", run, "--tasks", "offline", "--items", "30")[0] == 0
    assert EvidenceFile.load(run / "evidence.json") == whole


def test_marks_that_were_spoilt_are_made_again(lamina: Run, run: Path, desk: Desk) -> None:
    assert lamina("prove", run, "--tasks", "kept", "--items", "30")[0] == 0
    for file in (run / ".state" / "tasks").iterdir():
        file.write_text("{" if file.name.startswith("dense") else '{"task": "other"}', encoding="utf-8")
    (run / "evidence.json").unlink()
    assert lamina("prove", run, "--tasks", "kept", "--items", "30")[0] == 0
    assert desk.calls == ["kept dense", "kept thinned"] * 2


def test_another_plan_keeps_the_dense_marks_alone(lamina: Run, run: Path, desk: Desk, bench: Path) -> None:
    assert lamina("prove", run, "--tasks", "lost", "--items", "30")[0] == 0
    for verb in (("plan", run, "--blocks", "2"), ("apply", run), ("prove", run)):
        assert lamina(*verb)[0] == 0
    assert desk.calls == ["lost dense", "lost thinned"]
    assert EvidenceFile.load(run / "evidence.json").get("task:lost", "difference") is None
    assert lamina("prove", run, "--tasks", "lost", "--items", "30")[0] == 0
    assert desk.calls == ["lost dense", "lost thinned", "lost thinned"]


def test_what_does_not_fit_is_left_out_or_refused(lamina: Run, run: Path, desk: Desk) -> None:
    def score(_: Subject) -> Marks:
        raise UnsupportedError("the model reads 8 tokens")

    task("long", capability="long context", of="decoder")(score)
    code, out, _ = lamina("prove", run, "--tasks", "offline", "--items", "30")
    assert code == 0
    assert "left out: long: the model reads 8 tokens" in out
    assert any("left out: long" in note for note in EvidenceFile.load(run / "evidence.json").notes)
    refused(lamina("prove", run, "--tasks", "long,lost", "--items", "30"), "the model reads 8 tokens")
    task("seen", capability="pictures", of="vision")(score)
    refused(lamina("prove", run, "--tasks", "seen"), "seen", "vision", "decoder")
    for name in ("kept", "lost"):
        del _item._TASKS[name]
    refused(lamina("prove", run, "--tasks", "offline", "--items", "30"), "no task fits this model", "8 tokens")


def test_what_makes_no_sense_is_refused_before_any_work(lamina: Run, run: Path, desk: Desk) -> None:
    before = (run / "evidence.json").read_bytes()
    refused(lamina("prove", run, "--tasks", "kpet"), "no task named 'kpet'", "did you mean kept")
    refused(lamina("prove", run, "--tasks", "kept", "--items", "1"), "at least 2 items")
    refused(lamina("prove", run, "--items", "30"), "items of which tasks?")
    refused(lamina("prove", run, "--tasks", ""), "no task")
    assert desk.calls == []
    assert (run / "evidence.json").read_bytes() == before


def test_tasks_are_listed(lamina: Run, desk: Desk) -> None:
    desk.add("other", 0.1, items=1234, data="bigbench")
    code, out, err = lamina("tasks")
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("other ")]
    for word in ("syntax", "decoder", "1,234", "bigbench", "Apache-2.0"):
        assert word in line
    desk.add("seen", 0.1, package="mine", licence="MIT")
    assert "seen" in lamina("tasks", "--of", "decoder")[1]
    refused(lamina("tasks", "--of", "decodr"), "did you mean decoder")


def test_the_list_needs_no_torch() -> None:
    code = (
        "import sys; from lamina.commands.tasks import tasks; tasks(None); print(sorted({'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needles" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------- planted truth, with real forwards


class Ids:
    """Text that is token ids already."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word, 36) for word in text.split()]}


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task: the loss of what the dense model itself has written, which no change of it can lower as expected."""
    Desk(monkeypatch)
    rows = own_text(tiny("llama", vocab_size=300), 40, 16).tolist()

    def score(subject: Subject) -> Marks:
        """Its own words."""
        texts = [(base36(row[0]), "".join(f" {base36(i)}" for i in row[1:])) for row in rows]
        return losses(dataclasses.replace(subject, tokenizer=Ids()), texts, "reading")

    task("reading", capability="prose", of="decoder", metric="nats/token", higher=False)(score)


def base36(number: int) -> str:
    return np.base_repr(number, 36)


def test_equal_models_and_a_random_block_are_told_apart(thin: Any, tmp_path: Path, reading: None) -> None:
    assert thin("--keep", "100%")[0] == 0
    equal = package.prove(tmp_path / "run", tasks="reading", items=40).get("task:reading", "difference")
    assert equal is not None
    assert (equal.value, equal.p) == (0.0, 1.0)
    run = pipeline.Run.open(tmp_path / "run")
    spoilt: Any = run.thinned
    with torch.no_grad():
        for p in spoilt.model.layers[2].parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    (tmp_path / "run" / "evidence.json").unlink()
    for file in (tmp_path / "run" / ".state" / "tasks").glob("thinned-*"):
        file.unlink()
    found = pipeline.prove(run, "reading", 40).get("task:reading", "difference")
    assert found is not None
    assert found.p is not None
    assert found.p < 0.001
    assert found.low is not None
    assert found.low > 0
    assert found.sees is not None
    assert found.value > found.sees
