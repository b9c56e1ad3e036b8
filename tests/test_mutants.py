"""The suite catches mistakes: each is made in a copy of the package, and the tests that should see it must fail."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "mutants"


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants_list", FOLDER / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["mutants_list"] = made
    spec.loader.exec_module(made)
    return made


MUTANTS = module().MUTANTS
NAMES = [m.name for m in MUTANTS]


def source() -> Path:
    """The package as this test runs it."""
    import lamina.core

    return Path(lamina.core.__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_every_mutant_still_matches_the_source(mutant: Any) -> None:
    for edit in mutant.edits:
        count = (source() / edit.file).read_text(encoding="utf-8").count(edit.old)
        assert count == 1, f"{edit.file} holds the text of the mutant {mutant.name!r} {count} times:\n{edit.old}"
        assert edit.old != edit.new


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Outcome of each test by mutant; "" is the package as it is, on which every one of these tests runs."""
    folder = tmp_path_factory.mktemp("mutants")
    every = sorted({t for m in MUTANTS for t in m.caught_by})
    jobs = [job(folder, 0, (), every)]
    jobs += [job(folder, n, m.edits, list(m.caught_by)) for n, m in enumerate(MUTANTS, 1)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(FOLDER / "run.py"), str(folder / "jobs.json")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: read(j["result"]) for name, j in zip(["", *NAMES], jobs, strict=True)}


def job(folder: Path, number: int, edits: tuple[Any, ...], tests: list[str]) -> dict[str, Any]:
    here = folder / str(number)
    shutil.copytree(source(), here / "lamina", ignore=shutil.ignore_patterns("__pycache__", "prose"))
    if (source() / "lab" / "prose").is_dir():
        (here / "lamina" / "lab" / "prose").symlink_to(source() / "lab" / "prose")
    for edit in edits:
        path = here / "lamina" / edit.file
        path.write_text(path.read_text(encoding="utf-8").replace(edit.old, edit.new), encoding="utf-8")
    return {"source": str(here), "tests": tests, "result": str(here / "result.json")}


def read(result: str) -> dict[str, str]:
    """The outcomes by test; none where the run never ended."""
    path = Path(result)
    if path.exists():
        return json.loads(path.read_text())["outcomes"]
    return {"log": Path(result + ".log").read_text()[-2000:]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_a_mistake_all_of_them_pass(outcomes: dict[str, dict[str, str]]) -> None:
    expected = {t for m in MUTANTS for t in m.caught_by}
    assert set(outcomes[""]) == expected
    assert {t for t, outcome in outcomes[""].items() if outcome != "passed"} == set()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_the_suite_catches(mutant: Any, outcomes: dict[str, dict[str, str]]) -> None:
    found = outcomes[mutant.name]
    assert set(found) == set(mutant.caught_by), f"the tests did not run: {found}"
    missed = [test for test, outcome in found.items() if outcome != "failed"]
    assert not missed, f"not seen by {missed}"
