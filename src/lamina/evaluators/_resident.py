"""The resident memory of this process, as the system counts it; None where it doesn't tell."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(status: Path = STATUS, field: str = "VmRSS") -> int | None:
    """Bytes that are resident at this moment."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def peak(status: Path = STATUS) -> int | None:
    """The most bytes that were resident since the process began, or since `forget`."""
    return resident(status, "VmHWM")


def forget(reset: Path = RESET) -> None:
    """Let the peak begin anew, where the system allows it."""
    with contextlib.suppress(OSError):
        reset.write_text("5", encoding="ascii")
