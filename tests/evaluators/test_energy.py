"""Energy: a planted powercap folder and a planted NVML, read as the machine's own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lamina.evaluators.energy import Counter, Meter, meter

MOST = 262_143_328_850


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, one with its cores and memory; the platform; the same package once more by another way."""
    zones = {
        "intel-rapl": None, "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1", "intel-rapl:2": "psys", "intel-rapl-mmio": None,
        "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    for number, (zone, name) in enumerate(zones.items()):
        (tmp_path / zone).mkdir()
        if name is not None:
            (tmp_path / zone / "name").write_text(name + "\n")
            (tmp_path / zone / "energy_uj").write_text(f"{1_000_000 * number}\n")
            (tmp_path / zone / "max_energy_range_uj").write_text(f"{MOST}\n")
    return tmp_path


def use(folder: Path, zone: str, joules: float) -> None:
    """The zone's counter goes on, and begins anew behind its most."""
    path = folder / zone / "energy_uj"
    path.write_text(f"{(int(path.read_text()) + round(1e6 * joules)) % MOST}\n")


def test_packages_and_memory_count_once_each(powercap: Path) -> None:
    found, why = meter(folder=powercap)
    assert why == ""
    assert found is not None
    assert found.name == "energy of package-0, dram, package-1"
    before = found.read()
    for zone, joules in (("intel-rapl:0", 3.0), ("intel-rapl:0:1", 0.5), ("intel-rapl:1", 2.0)):
        use(powercap, zone, joules)
    for zone in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):  # parts of those, or the same again
        use(powercap, zone, 100.0)
    assert found.joules(before, found.read()) == pytest.approx(5.5)


def test_a_counter_that_begins_anew(powercap: Path) -> None:
    (powercap / "intel-rapl:0" / "energy_uj").write_text(f"{MOST - 1_000_000}\n")
    found, _ = meter(folder=powercap)
    assert found is not None
    before = found.read()
    use(powercap, "intel-rapl:0", 4.0)
    after = found.read()
    assert after[0] < before[0]
    assert found.joules(before, after) == pytest.approx(4.0)
    assert Meter([Counter("GPU", lambda: 0)]).joules([5], [2_000_005]) == 2.0


def test_a_counter_that_only_root_may_read(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def guarded(path: Path, *given: Any, **named: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *given, **named)

    monkeypatch.setattr(Path, "read_text", guarded)
    path = powercap / "intel-rapl:0" / "energy_uj"
    assert meter(folder=powercap) == (None, f"energy: not readable here: {path}: permission denied")


def test_where_nothing_is_counted(tmp_path: Path) -> None:
    missing = tmp_path / "powercap"
    assert meter(folder=missing) == (None, f"energy: not readable here: there is no {missing}")
    assert meter(folder=tmp_path)[1].endswith("counts no processor package")


def test_a_counter_that_says_no_number(powercap: Path) -> None:
    (powercap / "intel-rapl:1" / "energy_uj").write_text("\n")
    found, why = meter(folder=powercap)
    assert found is None, "one package of two would be half the truth"
    assert why.startswith(f"energy: not readable here: {powercap}: ")


class Nvml:
    """NVML with one GPU, which uses 7 J between readings."""

    class NVMLError(Exception):
        """What NVML raises."""

    def __init__(self, able: bool = True) -> None:
        self.able, self.millijoules, self.asked = able, 1000, ""

    def nvmlInit(self) -> None:
        """Nothing to begin."""

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.asked = name
        return name

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.able:
            raise self.NVMLError("Not Supported")
        self.millijoules += 7000
        return self.millijoules


CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2-3"))


@pytest.mark.usefixtures("gpu")
def test_a_gpu_counts_with_the_processor(powercap: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found, why = meter(CUDA, powercap)
    assert (why, nvml.asked) == ("", "GPU-1-2-3")
    assert found is not None
    assert found.name == "energy of GPU, package-0, dram, package-1"
    before = found.read()
    use(powercap, "intel-rapl:1", 2.0)
    assert found.joules(before, found.read()) == pytest.approx(9.0)
    alone, _ = meter(CUDA, tmp_path / "nothing")
    assert alone is not None
    assert alone.name == "energy of GPU"


@pytest.mark.usefixtures("gpu")
def test_without_the_gpus_counter_the_processors_would_mislead(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert meter(CUDA, powercap) == (
        None, "energy: not readable here: a GPU's counter is read through pynvml, which is not installed",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(able=False))
    assert meter(CUDA, powercap) == (None, "energy: not readable here: NVML: Not Supported")
