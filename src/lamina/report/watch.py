"""A run while it is at work: its state as data, and a small server of pages on this machine alone."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lamina.core.errors import InputError, LaminaError
from lamina.report.page import HERE, css, render
from lamina.report.read import FILES, read_run
from lamina.report.scripts import policy, watching

VERBS = ("survey", "menu", "plan", "apply", "heal", "prove", "speed", "export")
LINES = 60
"""Of log.txt so many lines are shown."""
SOURCES = (*FILES, "menu.json", "solved.json", "speed.json", "ladder.json", "exports.json")
_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)$")
_DONE = re.compile(r"^(\S+) done in ([\d.]+) s$")


def state(folder: Path) -> dict[str, Any]:
    """Where a run stands: `verbs` (name, state, seconds), `now` (what the verb at work reports), `log`, `report`.

    A verb is "done", "at work" or "stopped" (it began and neither ended nor is a process at it). `report` changes with
    what the report would show; "" where there is nothing to show yet. Times are seconds since 1970.
    """
    lines = _tail(folder / "log.txt")
    now = _progress(folder / ".state" / "progress.json")
    verbs: dict[str, dict[str, Any]] = {}
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        words = found[2]
        verb = words.partition(" ")[0].removesuffix(":")
        if words.endswith(" begins"):
            verbs[verb] = {"name": verb, "state": "stopped", "began": _seconds(found[1]), "seconds": None}
        elif done := _DONE.match(words):
            row = verbs.setdefault(verb, {"name": verb, "began": _seconds(found[1])})
            row |= {"state": "done", "seconds": float(done[2])}
        elif words.endswith(": done already"):
            verbs.setdefault(verb, {"name": verb, "began": _seconds(found[1]), "seconds": None})["state"] = "done"
    if now is not None:
        verbs[now["verb"]] = {"name": now["verb"], "state": "at work", "began": now["began"], "seconds": None}
    order = {name: n for n, name in enumerate(VERBS)}
    rows = sorted(verbs.values(), key=lambda v: order.get(v["name"], len(order)))
    return {"folder": str(folder), "verbs": rows, "now": now, "log": lines[-LINES:], "report": mark(folder)}


def mark(folder: Path) -> str:
    """What tells one state of the report's files from another; "" where none of a run's is there."""
    found = [(n, p.stat().st_mtime_ns) for n in SOURCES if (p := folder / n).is_file()]
    return str(abs(hash(tuple(found)))) if any(n in FILES for n, _ in found) else ""


def _tail(path: Path, most: int = 200_000) -> list[str]:
    """The last lines of a log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return text.splitlines()[1 if size > most else 0 :]


def _seconds(stamp: str) -> float:
    return datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S").timestamp()


def _progress(path: Path) -> dict[str, Any] | None:
    """What the verb at work reports; None where none is, or its process is gone."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        pid = int(told["pid"])
        known = {k: told[k] for k in ("verb", "what", "done", "total", "began", "at")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if _alive(pid) else None


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


class Pages:
    """What the server hands out: the page that watches, and the report as the folder stands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._report: tuple[str, str] = ("", "")

    @cached_property
    def page(self) -> str:
        """The page that watches."""
        script = watching()
        environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
        rules = f"{policy(script)}; connect-src 'self'; frame-src 'self'"
        names = {"css": css(), "script": Markup(script), "policy": rules, "folder": str(self.folder)}
        return environment.get_template("watch.html.j2").render(names)

    @property
    def report(self) -> str:
        """The report, made anew where a file of the run has changed. Raises `LaminaError` while there is none."""
        with self._lock:
            here = mark(self.folder)
            if self._report[0] != here or not here:
                self._report = (here, render(read_run(self.folder)))
            return self._report[1]


class Handler(BaseHTTPRequestHandler):
    """Answers three addresses, to this machine alone: the page, its events and the report."""

    pages: ClassVar[Pages]
    over: ClassVar[threading.Event]
    hosts: ClassVar[frozenset[str]]

    def do_GET(self) -> None:
        """One request."""
        path = self.path.partition("?")[0]
        if self.headers.get("Host", "") not in self.hosts:
            self._send(403, "text/plain", "only for this machine")
        elif path == "/":
            self._send(200, "text/html", self.pages.page)
        elif path == "/state":
            self._send(200, "application/json", json.dumps(state(self.pages.folder)))
        elif path == "/events":
            self._events()
        elif path == "/report.html":
            try:
                self._send(200, "text/html", self.pages.report)
            except LaminaError as error:
                self._send(503, "text/plain", f"no report yet: {error}")
        else:
            self._send(404, "text/plain", "no such page")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Requests are not written down."""

    def _send(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def _events(self) -> None:
        """The state, again whenever it changes, until the browser or the server ends."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        last, quiet = "", 0
        try:
            while not self.over.is_set():
                text = json.dumps(state(self.pages.folder))
                quiet = quiet + 1 if text == last else 0
                if text != last or quiet % 30 == 0:  # now and then, so that a browser that left is noticed
                    self.wfile.write(f"data: {text}\n\n".encode())
                    self.wfile.flush()
                last = text
                self.over.wait(0.5)
        except OSError:
            return


class Watch:
    """A server of one run folder at 127.0.0.1; `serve` answers until `close`."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        """Raises `InputError` for what is no folder, or a port that is taken."""
        if not folder.is_dir():
            raise InputError("there is no such run folder", where=folder)
        self.over = threading.Event()
        made: Mapping[str, Any] = {"pages": Pages(folder), "over": self.over}
        self._handler = type("_Handler", (Handler,), dict(made))
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"can't listen at port {port}: {error}", where="--port", hint="0 takes a free one"
            ) from None
        self._server.daemon_threads = True
        place = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{place}/"
        self._handler.hosts = frozenset({f"127.0.0.1:{place}", f"localhost:{place}"})

    def serve(self) -> None:
        """Answer until closed."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Stop answering, and let open streams end."""
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def stop(self) -> None:
        """As `close`, from the thread that served."""
        self.over.set()
        self._server.server_close()
