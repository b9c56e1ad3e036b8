"""A browser for tests of pages: the machine's own chromium, driven by playwright."""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; the test is skipped where it or playwright is not there."""
    program = os.environ.get("LAMINA_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("chromium is not there: apt-get install chromium")
    try:
        api = importlib.import_module("playwright.sync_api")
    except ImportError:
        pytest.skip("playwright is not there: pip install playwright")
    with api.sync_playwright() as play:
        made = play.chromium.launch(executable_path=program, args=[*ARGUMENTS])
        yield made
        made.close()


class Opened:
    """A page, with what it said and asked for: `said` are errors and warnings, `asked` addresses."""

    def __init__(self, browser: Any, place: Path | str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1180, "height": 900}, **options})
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.said.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.said.append(str(e)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.set_default_timeout(15_000)
        self.page.goto(place.resolve().as_uri() if isinstance(place, Path) else place)

    def text(self, name: str) -> str:
        """What an element of that id says, blanks alike."""
        return " ".join(self.page.locator(f"#{name}").inner_text().replace("\N{NO-BREAK SPACE}", " ").split())

    def until(self, condition: Callable[[], bool], seconds: float = 15.0) -> None:
        """Wait for it. The page's policy lets no other script run, so that the browser can't be asked to wait."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            self.page.wait_for_timeout(30)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
