"""Files are whole or not there: after a kill, on a full disk, and where something is in the way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lamina.core import files
from lamina.core.errors import InputError
from lamina.core.files import atomic, fingerprint, read_data, sweep, to_json, to_yaml, write_text

SOURCE = Path(files.__file__).parents[2]
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(SOURCE)!r})
from pathlib import Path
from lamina.core import files
path = Path(sys.argv[1])
with files.atomic(path) as draft:
    if sys.argv[2] == "file":
        draft.write_text("half")
    else:
        draft.mkdir()
        (draft / "a").write_text("half")
    if sys.argv[3] == "between":
        replace = os.replace
        os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def killed(path: Path, kind: str, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind, when], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("when", ["inside", "between"])
def test_a_kill_leaves_the_old_file(tmp_path: Path, when: str) -> None:
    path = tmp_path / "plan.yaml"
    write_text(path, "old")
    killed(path, "file", when)
    assert path.read_text() == "old"
    sweep(tmp_path)
    assert names(tmp_path) == ["plan.yaml"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("when", ["inside", "between"])
def test_a_kill_leaves_the_old_folder(tmp_path: Path, when: str) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "a").write_text("old")
    killed(path, "folder", when)
    sweep(tmp_path)
    assert names(tmp_path) == ["model"]
    assert (path / "a").read_text() == "old"


def test_a_kill_before_anything_was_there_leaves_nothing(tmp_path: Path) -> None:
    killed(tmp_path / "model", "folder", "inside")
    sweep(tmp_path)
    assert names(tmp_path) == []


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def put(path: Path, kind: str, text: str) -> None:
    if kind == "file":
        write_text(path, text)
        return
    with atomic(path) as draft:
        draft.mkdir()
        (draft / "a").write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("where", [(Path, "write_text"), (os, "replace"), (files.tempfile, "mkdtemp"), (Path, "mkdir")])
@pytest.mark.parametrize("before", ["something", "nothing"])
def test_a_full_disk_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: tuple[Any, str], before: str
) -> None:
    path = tmp_path / "out"
    if before == "something":
        put(path, kind, "old")
    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        with pytest.raises(InputError) as caught:
            put(path, kind, "new")
    assert "No space left on device" in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    if before == "nothing":
        assert names(tmp_path) == []
    else:
        assert names(tmp_path) == ["out"]
        assert (path if kind == "file" else path / "a").read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, InputError])
def test_an_error_inside_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out"
    put(path, "folder", "old")

    def stop() -> None:
        with atomic(path) as draft:
            draft.mkdir()
            raise error("stop")

    with pytest.raises(error):
        stop()
    assert names(tmp_path) == ["out"]
    assert (path / "a").read_text() == "old"


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "out", "folder", "old")
    with pytest.raises(InputError), atomic(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="can't write"):
        write_text(tmp_path / "file" / "plan.yaml", "x")
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_is_replaced_is_gone(tmp_path: Path) -> None:
    for text in ("first", "second"):
        put(tmp_path / "out", "folder", text)
    assert (tmp_path / "out" / "a").read_text() == "second"
    assert names(tmp_path) == ["out"]


def test_sweep_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("mine")
    (tmp_path / "a.tmp").write_text("mine")
    sweep(tmp_path)
    assert names(tmp_path) == [".hidden", "a.tmp"]


def test_fingerprints(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, text in ((one, "x"), (other, "x")):
        folder.mkdir()
        (folder / "a").write_text(text)
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(one).startswith("sha256:")
    (other / "a").write_text("y")
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(b"x") != fingerprint(b"y")


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    data = {"b": [1, 2.5, "x: y", None, True], "a": {"k": "v", "long": {"n": [{"x": 1}, {}]}}, "e": [], "o": {}}
    (tmp_path / "a.yaml").write_text(to_yaml(data))
    (tmp_path / "a.json").write_text(to_json(data))
    assert read_data(tmp_path / "a.yaml") == read_data(tmp_path / "a.json") == data
