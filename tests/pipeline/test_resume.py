"""Killed at any point and started again with the same command, a run ends as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_run

ASKED = ("--keep", "70%", "--heal", "12", "--gguf")
TIMED = ("log.txt", "evidence.json", "report.html", ".state")
"""What holds times, and differs between any two runs."""
REPLACE, PUBLISH = "os:replace", "lamina.pipeline.run:Run.publish"
POINTS: dict[str, dict[str, Any]] = {
    "recipe": {"at": REPLACE, "to": "recipe.yaml"},
    "survey": {"at": "lamina.lab.lab:Lab.forward", "call": 2},
    "survey, written and not noted": {"at": REPLACE, "to": "survey.parquet", "after": True},
    "plan, in the search": {"at": "lamina.lab.bench:Bench.note", "call": 2},
    "plan, written and not noted": {"at": REPLACE, "to": "plan.yaml", "after": True},
    "apply": {"at": "lamina.rewrites.drop:Drop.apply"},
    "apply, the draft written": {"at": PUBLISH},
    "apply, model published without receipts": {"at": REPLACE, "to": "model", "after": True},
    "apply, receipts written and not noted": {"at": REPLACE, "to": "receipts.json", "after": True},
    "heal, before the first state": {"at": "lamina.healers._lora_train:objective", "call": 5},
    "heal, after a state": {"at": "lamina.healers._lora_train:objective", "call": 12},
    "heal, the draft written": {"at": PUBLISH, "call": 2},
    "heal, the old model moved away": {"at": REPLACE, "to": "model", "call": 2},
    "heal, model published without receipts": {"at": REPLACE, "to": "model", "call": 2, "after": True},
    "heal, receipts written and not noted": {"at": REPLACE, "to": "receipts.json", "call": 2, "after": True},
    "heal, apply noted and heal not": {"at": "lamina.pipeline.run:Run.hand_on", "after": True},
    "prove": {"at": "lamina.evaluators.quality:Quality.evaluate"},
    "prove, written and not noted": {"at": REPLACE, "to": "evidence.json", "after": True},
    "export": {"at": REPLACE, "to": "model.gguf"},
    "report": {"at": REPLACE, "to": "report.html"},
}
QUICK = (
    "recipe", "survey", "plan, in the search", "apply, model published without receipts", "heal, after a state",
    "heal, model published without receipts", "heal, receipts written and not noted", "prove",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(zygote: Any, bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    code, _, err = zygote.run(tiny_run.thin_command(bench, run, *ASKED))
    assert code == 0, err
    return run


def same_as(undisturbed: Path, run: Path) -> None:
    mine, due = (tiny_run.contents(f, *TIMED) for f in (run, undisturbed))
    assert set(mine) == set(due)
    assert {"plan.yaml", "receipts.json", "survey.parquet", "recipe.yaml", "model.gguf"} < set(mine)
    assert [name for name in due if mine[name] != due[name]] == []
    assert tiny_run.left_behind(run) == []
    assert (run / "report.html").is_file()
    assert (run / "evidence.json").is_file()


@pytest.mark.parametrize("point", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in POINTS])
def test_a_killed_run_goes_on_to_the_same_bytes(
    zygote: Any, bench: Path, undisturbed: Path, tmp_path: Path, point: str
) -> None:
    command = tiny_run.thin_command(bench, tmp_path / "run", *ASKED)
    code, _, err = zygote.run(command, **POINTS[point])
    assert code == -signal.SIGKILL, err
    code, _, err = zygote.run(command)
    assert code == 0, err
    same_as(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_killed_again_and_again(zygote: Any, bench: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One folder: killed before the first file takes its place, then before the second that is due then, and so on."""
    command = tiny_run.thin_command(bench, tmp_path / "run", *ASKED)
    code, kills = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        kills += 1
        code, _, err = zygote.run(command, at=REPLACE, call=kills)
    assert code == 0, err
    assert kills > 5
    same_as(undisturbed, tmp_path / "run")


def test_killed_twice_in_a_row(zygote: Any, bench: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A kill in healing, then one while the healed model is published, then on."""
    command = tiny_run.thin_command(bench, tmp_path / "run", *ASKED)
    assert zygote.run(command, **POINTS["heal, after a state"])[0] == -signal.SIGKILL
    assert zygote.run(command, at=REPLACE, to="model", after=True)[0] == -signal.SIGKILL
    assert zygote.run(command)[0] == 0
    same_as(undisturbed, tmp_path / "run")


def test_a_model_without_its_receipts_is_not_taken_for_the_plans(zygote: Any, bench: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = tiny_run.thin_command(bench, run, "--sublayers", "2", "--heal", "3")
    assert zygote.run(command, **POINTS["heal, model published without receipts"])[0] == -signal.SIGKILL
    assert (run / "model").is_dir()
    for verb in ("heal", "prove", "export"):
        code, _, err = zygote.run([verb, str(run)])
        assert code == 2
        assert "run lamina apply first" in err


def test_an_interrupt_says_that_the_run_goes_on(zygote: Any, bench: Path, undisturbed: Path, tmp_path: Path) -> None:
    command = tiny_run.thin_command(bench, tmp_path / "run", *ASKED)
    code, _, err = zygote.run(command, **{**POINTS["heal, after a state"], "signal": signal.SIGINT})
    assert code == 130
    assert "Traceback" not in err
    assert err.splitlines() == ["interrupted; the same command goes on from here"]
    assert [p for p in (tmp_path / "run").rglob("*") if p.name in ("draft",) or p.suffix == ".tmp"] == []
    code, _, err = zygote.run(command)
    assert code == 0, err
    same_as(undisturbed, tmp_path / "run")
