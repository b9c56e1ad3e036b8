"""The server that watches a run: what it says of verbs, that it is for this machine alone; the page in a browser."""

from __future__ import annotations

import html
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest

from lamina.core.errors import InputError
from lamina.pipeline.live import live
from lamina.report.watch import Watch, mark, state

LOG = """\
2026-01-02 03:04:05 survey begins
2026-01-02 03:04:06 anatomy certified: worst error 0.0e+00 of 8e-03
2026-01-02 03:04:09 survey done in 3.5 s
2026-01-02 03:04:09 menu: done already
2026-01-02 03:04:10 plan begins
2026-01-02 03:04:11 warning: little text
"""


@pytest.fixture
def watched(run_folder: Path) -> Iterator[Watch]:
    (run_folder / "log.txt").write_text(LOG, encoding="utf-8")
    server = Watch(run_folder)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield server
    server.close()
    thread.join(5)
    assert not thread.is_alive()


def ask(server: Watch, path: str, host: str = "", method: str = "GET") -> tuple[int, str, str]:
    """Status, type and text."""
    place = server.url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(place, timeout=20)
    connection.request(method, path, headers={"Host": host} if host else {})
    found = connection.getresponse()
    answer = found.status, found.headers.get("Content-Type", ""), found.read().decode()
    connection.close()
    return answer


def verbs(folder: Path) -> dict[str, tuple[str, float | None]]:
    return {v["name"]: (v["state"], v["seconds"]) for v in state(folder)["verbs"]}


def test_the_timeline_is_the_log_s(tmp_path: Path) -> None:
    assert state(tmp_path)["verbs"] == []
    assert state(tmp_path)["report"] == ""
    (tmp_path / "log.txt").write_text(LOG, encoding="utf-8")
    assert verbs(tmp_path) == {"survey": ("done", 3.5), "menu": ("done", None), "plan": ("stopped", None)}
    assert state(tmp_path)["log"][-1].endswith("little text")


def test_what_a_verb_reports_is_there_while_it_works(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(LOG, encoding="utf-8")
    (tmp_path / ".state").mkdir()
    with live(tmp_path / ".state", "plan", lambda *_: None) as told:
        assert verbs(tmp_path)["plan"] == ("at work", None)
        told("judging", 3, 9)
        now = state(tmp_path)["now"]
        assert (now["verb"], now["what"], now["done"], now["total"]) == ("plan", "judging", 3, 9)
    assert state(tmp_path)["now"] is None
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    left = {"verb": "plan", "what": "", "done": 0, "total": 0, "began": 1.0, "at": 1.0, "pid": done.pid}
    (tmp_path / ".state" / "progress.json").write_text(json.dumps(left), encoding="utf-8")
    assert state(tmp_path)["now"] is None, "its process is gone"
    (tmp_path / ".state" / "progress.json").write_text("{half", encoding="utf-8")
    assert verbs(tmp_path)["plan"] == ("stopped", None)


def test_pages_and_nothing_else(watched: Watch, run_folder: Path) -> None:
    code, kind, page = ask(watched, "/")
    assert (code, kind) == (200, "text/html; charset=utf-8")
    assert "connect-src 'self'; frame-src 'self'" in html.unescape(page)
    code, kind, text = ask(watched, "/state")
    assert (code, kind) == (200, "application/json; charset=utf-8")
    assert json.loads(text)["report"] == mark(run_folder)
    code, _, report = ask(watched, "/report.html?1")
    assert code == 200
    assert 'id="lamina-data"' in report
    assert not (run_folder / "report.html").exists(), "the folder is left alone"
    for path in ("/../pyproject.toml", "/recipe.yaml", "/.state/plan.json", "//etc/passwd"):
        assert ask(watched, path)[0] == 404
    assert ask(watched, "/", method="POST")[0] == 501


def test_other_machines_and_names_are_refused(watched: Watch) -> None:
    assert ask(watched, "/", host="evil.example:80")[0] == 403
    assert ask(watched, "/report.html", host="127.0.0.1")[0] == 403
    place = watched.url.removeprefix("http://").rstrip("/")
    assert place.startswith("127.0.0.1:")
    assert ask(watched, "/", host=place.replace("127.0.0.1", "localhost"))[0] == 200


def test_the_report_is_made_anew_when_the_folder_changes(watched: Watch, run_folder: Path) -> None:
    first = ask(watched, "/report.html")[2]
    assert ask(watched, "/report.html")[2] == first
    (run_folder / "evidence.json").unlink()
    assert "not measured yet" in ask(watched, "/report.html")[2]
    for name in ("plan.yaml", "recipe.yaml", "receipts.json", "survey.parquet"):
        (run_folder / name).unlink()
    code, _, text = ask(watched, "/report.html")
    assert code == 503
    assert "no report yet: " in text


def test_events_tell_of_changes(watched: Watch, run_folder: Path) -> None:
    connection = http.client.HTTPConnection(watched.url.removeprefix("http://").rstrip("/"), timeout=20)
    connection.request("GET", "/events")
    stream = connection.getresponse()

    def event() -> Any:
        while not (line := stream.readline()).startswith(b"data: "):
            assert line, "the stream ended"
        return json.loads(line.removeprefix(b"data: "))

    assert event()["verbs"][-1]["state"] == "stopped"
    with (run_folder / "log.txt").open("a", encoding="utf-8") as file:
        file.write("2026-01-02 03:04:20 plan done in 10.0 s\n")
    assert event()["verbs"][-1] == {
        "name": "plan",
        "state": "done",
        "began": pytest.approx(0, abs=1e12),
        "seconds": 10.0,
    }
    connection.close()


def test_bad_folders_and_ports(tmp_path: Path, watched: Watch) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        Watch(tmp_path / "nowhere")
    taken = int(watched.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(InputError, match="can't listen at port"):
        Watch(tmp_path, taken)
    with pytest.raises(InputError, match="can't listen at port"):
        Watch(tmp_path, 70_000)


@pytest.mark.skipif(os.name != "posix", reason="signals of this system differ")
def test_ctrl_c_ends_it_with_one_line(run_folder: Path) -> None:
    command = [sys.executable, "-m", "lamina", "watch", str(run_folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith(f"watching {run_folder} at http://127.0.0.1:")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("no longer watched\n", "", 0)


@pytest.mark.slow
def test_the_page_follows_the_run(watched: Watch, run_folder: Path) -> None:
    with browser.chromium() as chrome, browser.Opened(chrome, watched.url) as opened:
        opened.until(lambda: "no verb is at work" in opened.text("status"))
        assert opened.text("verbs").startswith("survey done in 3.5 s menu done plan stopped")
        assert "little text" in opened.text("log")
        report = opened.page.frame_locator("#report")
        report.locator("html[data-ready]").wait_for()
        before = opened.page.locator("#report").get_attribute("src")
        (run_folder / ".state").mkdir()
        with live(run_folder / ".state", "prove", lambda *_: None) as told:
            told("quality", 1, 4)
            opened.until(lambda: opened.text("what") == "quality: 1 of 4")
            assert opened.text("status") == "prove is at work"
            assert opened.page.evaluate("document.getElementById('bar').value") == 1
        opened.until(lambda: opened.text("status") == "no verb is at work")
        (run_folder / "evidence.json").unlink()
        opened.until(lambda: opened.page.locator("#report").get_attribute("src") != before)
        report.get_by_text("not measured yet: run lamina prove").first.wait_for()
        assert opened.said == []
        assert all(a.startswith(watched.url) for a in opened.asked)
