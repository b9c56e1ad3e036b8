"""Damaged runs and disks that fill: one clear line, exit code 2, and what was there stays."""

from __future__ import annotations

import errno
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def finished(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.make_quick(patch)
        from lamina.cli import main

        with pytest.raises(SystemExit) as end:
            main(tiny_run.thin_command(bench, run, "--sublayers", "2", "--recipe", "llm-drop-joint"))
    assert end.value.code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change(path: Path, **keys: Any) -> None:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**data, **keys}), encoding="utf-8")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model": {"name": "other", "fingerprint": "sha256:00"}}, ("the plan was made for other", "plan again")),
        ({"steps": [{"rewrite": "drop", "sites": ["block.17"]}]}, ("block.17", "no such")),
        ({"steps": [{"rewrite": "dorp", "sites": ["block.1"]}]}, ("did you mean drop",)),
        ({"steps": [{"rewrite": "drop", "site": ["block.1"]}]}, ("steps.0.site",)),
        ({"steps": [{"rewrite": "drop", "sites": [f"block.{n}" for n in range(4)]}]}, ("block",)),
        ({"steps": [{"rewrite": "refit", "sites": ["block.0.mlp"]}]}, ("refit", "around")),
        ({"expect": {}}, ("unknown key 'expect'", "expects")),
    ],
)
def test_a_plan_that_can_not_be_applied(lamina: Any, run: Path, keys: dict[str, Any], says: tuple[str, ...]) -> None:
    before = tiny_run.contents(run / "model")
    change(run / "plan.yaml", **keys)
    tiny_run.refused(lamina("apply", run), *says)
    assert tiny_run.contents(run / "model") == before
    assert (run / "receipts.json").is_file()


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("recipe.yaml", "plan"), ("plan.yaml", "apply"), ("receipts.json", "prove"), ("evidence.json", "report"),
        ("survey.parquet", "report"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run(lamina: Any, run: Path, name: str, verb: str) -> None:
    (run / name).write_bytes(b'{"half": ')
    tiny_run.refused(lamina(verb, run), name)


@pytest.mark.parametrize(("name", "verb"), [("plan.yaml", "apply"), ("receipts.json", "prove"), ("model", "export")])
def test_a_missing_part_of_a_run(lamina: Any, run: Path, tmp_path: Path, name: str, verb: str) -> None:
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    more = ["--to", tmp_path / "new.gguf"] if verb == "export" else []
    tiny_run.refused(lamina(verb, run, *more), "missing", "lamina")
    assert not (tmp_path / "new.gguf").exists()


def test_healing_without_a_budget(lamina: Any, run: Path) -> None:
    tiny_run.refused(lamina("heal", run), "for how long?", "--steps")
    tiny_run.refused(lamina("heal", run, "--steps", 0), "positive")
    tiny_run.refused(lamina("heal", run, "--steps", 3, "--healer", "balm"), "balm")


def test_an_export_into_what_is_there_already(lamina: Any, run: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("mine", encoding="utf-8")
    tiny_run.refused(lamina("export", run, "--to", full), "already", "full")
    assert tiny_run.contents(full) == {"letter.txt": b"mine"}
    tiny_run.refused(lamina("export", run, "--to", full, "--format", "onxx"), "onxx")


# ---------------------------------------------------------------- a full disk


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: writing fails as on a full disk, in every library."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


ASKED = ("--sublayers", "2", "--recipe", "llm-drop-joint", "--heal", "2")


@pytest.mark.parametrize(
    ("size", "missing"),
    [(50, "recipe.yaml"), (3000, "survey.parquet"), (50_000, "model")],
)
def test_a_disk_that_fills(thin: Any, tmp_path: Path, size: int, missing: str) -> None:
    run = tmp_path / "run"
    with files_of_at_most(size):
        result = thin(*ASKED)
    line = tiny_run.refused(result)
    assert "write" in line
    assert not (run / missing).exists()
    assert not (run / "receipts.json").exists()
    assert not run.exists() or tiny_run.left_behind(run) == []
    assert thin(*ASKED)[0] == 0


def test_a_disk_that_fills_while_healing(lamina: Any, run: Path) -> None:
    before = tiny_run.contents(run, ".state", "log.txt", "recipe.yaml")
    with files_of_at_most(50_000):
        tiny_run.refused(lamina("heal", run, "--steps", 2), "write")
    assert tiny_run.contents(run, ".state", "log.txt", "recipe.yaml") == before
    assert lamina("heal", run, "--steps", 2)[0] == 0


@pytest.mark.parametrize(("verb", "more"), [("prove", ()), ("report", ()), ("export", ("--to", "new.gguf"))])
def test_a_disk_that_fills_later(lamina: Any, run: Path, tmp_path: Path, verb: str, more: tuple[str, ...]) -> None:
    (run / "evidence.json").unlink()
    (run / "report.html").unlink()
    with files_of_at_most(1500):
        tiny_run.refused(lamina(verb, run, *more), "write")
    assert not (run / "evidence.json").exists()
    assert not (run / "report.html").exists()
    assert not (tmp_path / "new.gguf").exists()
    assert tiny_run.left_behind(run) == []


def test_no_space_anywhere_in_a_verb(thin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no atomic write stands around it: a temporary folder of the reload contract, say."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/somewhere")

    with monkeypatch.context() as patch:
        patch.setattr("lamina.evaluators.reload.contract", full)
        tiny_run.refused(thin("--blocks", "1"), "/tmp/somewhere", "No space left on device")
    assert not {"model", "receipts.json"} & {p.name for p in (tmp_path / "run").iterdir()}
    assert tiny_run.left_behind(tmp_path / "run") == []
