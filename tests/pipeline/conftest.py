"""A tiny model's folder, texts, and runs on them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _tiny_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_run() -> ModuleType:
    """The helpers."""
    return _tiny_run()


@pytest.fixture(scope="session")
def bench(tiny_run: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `calibration.txt` and `heldout.txt`."""
    return tiny_run.make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def zygote(tiny_run: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs commands in processes of their own, quickly."""
    found = tiny_run.Zygote(tmp_path_factory.mktemp("zygote"))
    yield found
    found.close()


@pytest.fixture
def quick(tiny_run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process without the contract's fresh process and without measuring times."""
    tiny_run.make_quick(monkeypatch)


@pytest.fixture
def lamina(tiny_run: ModuleType, capsys: pytest.CaptureFixture[str]) -> Any:
    """`lamina(*arguments)`: exit code, standard output and standard error of a command, run in this process."""
    return tiny_run.caller(capsys)
