"""Stands for the coverage run's worker: it speaks the protocol, and knows no model. What it does is in the names.

`dies`, `exits` and `hangs` do so after their second cell; `loses` dies while its checkpoint is loaded.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

FIRST = ("found", "certified", "block", "sublayer")
LATER = ("block_reloaded", "sublayer_reloaded", "generates")


def write(**data: Any) -> None:
    print(json.dumps(data), flush=True)


def end(name: str) -> None:
    if name.startswith("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("exits"):
        sys.exit(3)
    if name.startswith("hangs"):
        time.sleep(60)


waiting: list[str] = []
for line in sys.stdin:
    name = json.loads(line).get("name", "")
    if name.startswith("unbuilt"):
        write(name=name, cell="unbuilt", value="no such thing")
    elif name:
        for number, cell in enumerate(FIRST):
            if number == 2:
                end(name)
            write(name=name, cell=cell, value="yes")
        waiting.append(name)
    else:
        for one in waiting:
            if one.startswith("loses"):
                os.kill(os.getpid(), signal.SIGKILL)
            for cell in LATER:
                write(name=one, cell=cell, value="yes" if not one.startswith("bad") else "no: bad")
        waiting.clear()
    write()
