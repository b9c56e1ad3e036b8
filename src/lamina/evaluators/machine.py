"""Which machine a time is of: processor, cores, threads, load, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("lamina", "torch", "transformers", "xllamacpp")


def machine(threads: int, *, dtype: str = "", device: str = "cpu", cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """Facts for `speed.json`; `load` is the mean number of processes that wanted to run in the last minute."""
    found: dict[str, Any] = {
        "processor": _processor(cpuinfo),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "device": device,
        "dtype": dtype,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor(cpuinfo: Path) -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def busy(facts: dict[str, Any]) -> str:
    """A line where more wanted to run than the cores and this measurement explain; "" else."""
    load = facts.get("load", 0.0)
    if load <= facts["threads"] + 0.5:
        return ""
    return f"the machine was busy: load {load:g} on {facts['cores']} cores; better measure it idle"


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Inside, torch computes with so many threads; afterwards with as many as before."""
    import torch

    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
