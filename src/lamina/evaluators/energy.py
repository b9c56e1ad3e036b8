"""Energy by the machine's own counters: the processor's through powercap (RAPL), a GPU's through NVML."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
ZONE = re.compile(r"intel-rapl:\d+(:\d+)?")
"""Zones of the interface that AMD's processors use too; `intel-rapl-mmio` counts the same package once more."""


@dataclass(frozen=True)
class Counter:
    """One counter: `read` gives microjoules, which begin at 0 again behind `most`."""

    name: str
    read: Callable[[], int]
    most: int | None = None


@dataclass(frozen=True)
class Meter:
    """All counters of what computes. What else runs on it meanwhile is in them too."""

    counters: Sequence[Counter]

    @property
    def name(self) -> str:
        """What is counted, in words."""
        return "energy of " + ", ".join(c.name for c in self.counters)

    def read(self) -> tuple[int, ...]:
        """Microjoules of each counter."""
        return tuple(c.read() for c in self.counters)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """What was used between two readings that lie less than one turn of a counter apart."""
        micro = 0
        for counter, was, now in zip(self.counters, before, after, strict=True):
            micro += now - was + (counter.most or 0 if now < was else 0)
        return max(micro, 0) / 1e6


def meter(device: Any = None, folder: Path = POWERCAP) -> tuple[Meter | None, str]:
    """The counters of what computes on `device` (a torch device; None: the processor), or why they can't be read.

    On a GPU its own counter is needed; the processor's is added where it can be read.
    """
    packages, why = _zones(folder)
    if device is None or device.type != "cuda":
        return (Meter(packages), "") if packages else (None, _line(why))
    own, why = _gpu(device)
    return (Meter((*own, *packages)), "") if own else (None, _line(why))


def _line(why: str) -> str:
    return f"energy: not readable here: {why}"


def _zones(folder: Path) -> tuple[tuple[Counter, ...], str]:
    """The packages, and the memory beside them where it is counted apart; all of them or none."""
    found: list[Counter] = []
    try:
        for zone in sorted(folder.iterdir()):
            fits = ZONE.fullmatch(zone.name)
            name = (zone / "name").read_text(encoding="utf-8").strip() if fits else ""
            if fits and (name == "dram" if fits[1] else name.startswith("package")):
                most = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
                counter = Counter(name, _reader(zone / "energy_uj"), most)
                counter.read()
                found.append(counter)
    except PermissionError as error:
        return (), f"{error.filename}: permission denied"
    except FileNotFoundError as error:
        return (), f"there is no {error.filename}"
    except (OSError, ValueError) as error:
        return (), f"{folder}: {error}"
    return tuple(found), "" if found else f"{folder} counts no processor package"


def _reader(path: Path) -> Callable[[], int]:
    return lambda: int(path.read_text(encoding="ascii"))


def _gpu(device: Any) -> tuple[tuple[Counter, ...], str]:
    """The GPU's counter, found by its own number, which no environment variable shifts."""
    import torch

    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return (), "a GPU's counter is read through pynvml, which is not installed"
    try:
        nvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(name)
        counter = Counter("GPU", lambda: 1000 * nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        counter.read()
    except nvml.NVMLError as error:
        return (), f"NVML: {error}"
    return (counter,), ""
