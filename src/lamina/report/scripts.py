"""The page's own scripts: read from files, put together, and named by their hash so that no other can run."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

HERE = Path(__file__).parent / "explorer_js"
EXPLORER = ("words", "solve", "model", "yaml", "chart", "inside", "frontier", "main")


def script(*, explorer: bool) -> str:
    """What a page runs: the colours' button, and the explorer where the page has its data."""
    return _joined("theme", *(EXPLORER if explorer else ()), end="start();" if explorer else "")


def watching() -> str:
    """What the page of `lamina watch` runs."""
    return _joined("theme", "watch")


def _joined(*names: str, end: str = "") -> str:
    text = "\n".join((HERE / f"{name}.js").read_text(encoding="utf-8") for name in names)
    return f'(() => {{\n"use strict";\n{text}{end}\n}})();'


def policy(code: str) -> str:
    """A content security policy: this one script, styles of the page, and no request to anywhere."""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    rules = ("default-src 'none'", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'")
    return "; ".join((*rules, "base-uri 'none'", "form-action 'none'"))
