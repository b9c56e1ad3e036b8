"""Files that are never half-written: atomic writes, fingerprints, and strict YAML and JSON documents."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from lamina.core.errors import InputError


@contextlib.contextmanager
def atomic(path: Path) -> Generator[Path]:
    """A temporary sibling of `path` (not yet made) that takes its place only if the block ends well.

    Works for files and folders. A kill leaves at most the sibling behind, named `.NAME.*.tmp`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise _unwritable(path, error) from error
    draft = holder / path.name
    try:
        yield draft
        if path.is_dir():
            os.rename(path, holder / "previous")
        elif draft.is_file():
            with draft.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if (holder / "previous").exists() and not path.exists():
            os.rename(holder / "previous", path)
        shutil.rmtree(holder, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"can't write: {error.strerror or error}", where=path, hint="free some room or choose another folder"
    )


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`."""
    for left in folder.glob(".*.tmp"):
        previous = left / "previous"
        name = left.name[1:].rsplit(".", 2)[0]
        if previous.exists() and not (folder / name).exists():
            os.rename(previous, folder / name)
        shutil.rmtree(left, ignore_errors=True)


def fingerprint(*parts: object) -> str:
    """`sha256:…` of bytes, text, files, folders' files or plain data."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
                if file.is_file():
                    digest.update(file.name.encode())
                    with file.open("rb") as stream:
                        while chunk := stream.read(1 << 22):
                            digest.update(chunk)
        elif isinstance(part, bytes | bytearray | memoryview):
            digest.update(cast("memoryview[int]", part))
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return "sha256:" + digest.hexdigest()


class _Dumper(yaml.SafeDumper):
    """YAML with keys in the order given and long lists in one line."""


def _sequence(dumper: yaml.SafeDumper, data: Any) -> yaml.Node:
    flat = not any(isinstance(x, Mapping | list | tuple) for x in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


def _mapping(dumper: yaml.SafeDumper, data: Any) -> yaml.Node:
    flat = len(data) <= 6 and not any(isinstance(x, Mapping | list | tuple) for x in data.values())
    return dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=flat)


_Dumper.add_representer(list, _sequence)
_Dumper.add_representer(tuple, _sequence)
_Dumper.add_representer(dict, _mapping)


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML that people read and diff."""
    rows = (
        yaml.dump(
            {key: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=False
        )
        for key, value in data.items()
    )
    return "".join(row[1:-2] + "\n" if row.startswith("{") else row for row in rows)


def to_json(data: Any) -> str:
    """Plain data as JSON, one canonical form."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The pairs as a mapping; a key that is given twice is an error."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
    return found


_Safe = cast("type[yaml.SafeLoader]", getattr(yaml, "CSafeLoader", yaml.SafeLoader))


class _Loader(_Safe):
    """YAML in which no key may be given twice."""


def _construct(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    build: Any = cast("Any", loader).construct_object
    return _unique([(build(key, deep=True), build(value, deep=True)) for key, value in cast("Any", node).value])


_Loader.add_constructor("tag:yaml.org,2002:map", _construct)


def read_data(path: Path) -> Any:
    """The plain data of a YAML or JSON file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read: {error}", where=path) from None
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        return yaml.load(text, Loader=_Loader)
    except (ValueError, yaml.YAMLError) as error:
        first = " ".join(str(error).split())
        raise InputError(f"not valid {path.suffix[1:] or 'YAML'}: {first}", where=path) from None
