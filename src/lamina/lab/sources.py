"""Where text comes from: files, folders, JSON lines, Parquet, data sets, token files, and the shipped prose."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch

from lamina.core.errors import InputError, did_you_mean

Split = Literal["calibration", "heldout"]
DEFAULT = "default"
MOST = 50_000_000
"""The most characters that are read from one source; what lies beyond is left out, with a note."""
LINES = (".jsonl", ".ndjson")
SPLITS = ("train", "validation", "valid", "dev", "test")


@dataclass(frozen=True)
class Source:
    """What one source holds: documents, or rows of token ids [n, t] (int64). `notes` says what was left out."""

    spec: str
    label: str
    documents: tuple[str, ...] = ()
    rows: torch.Tensor | None = None
    notes: tuple[str, ...] = ()


def read(spec: str, split: Split, *, column: str = "text") -> Source:
    """Read a source: `default`, a file, a folder, or `hf:NAME[:CONFIG][:SPLIT]`.

    A name with the suffix .jsonl or .ndjson is JSON lines, .parquet a table (both with the text in `column`),
    .safetensors a file of token ids; any other file is text. Raises InputError, one line.
    """
    if spec == DEFAULT:
        return Source(spec, f"lamina's prose, {split}", tuple(shipped(split)))
    if spec.startswith("hf:"):
        return _capped(spec, spec, _hugging_face(spec, column))
    path = Path(spec).expanduser()
    if not spec or not path.exists():
        hint = did_you_mean(spec, [DEFAULT]) if len(spec) < 12 else "give a file, a folder, hf:NAME or default"
        raise InputError("no such file or folder", where=spec or "''", hint=hint)
    if path.suffix == ".safetensors":
        return Source(spec, path.name, rows=token_rows(path))
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _capped(spec, path.name, _hugging_face(f"hf:{path}", column))
        return _folder(spec, path, column)
    return _capped(spec, path.name, _file(path, column))


def shipped(split: Split) -> Iterator[str]:
    """The documents of the shipped prose (see prose/README.md), in a fixed order."""
    packed = resources.files("lamina.lab").joinpath("prose", f"{split}.jsonl.xz").read_bytes()
    for line in lzma.decompress(packed).decode("utf-8").splitlines():
        yield json.loads(line)["text"]


def token_rows(path: Path) -> torch.Tensor:
    """`input_ids` of a safetensors file, [n, t] int64."""
    from safetensors.torch import load_file

    from lamina.lab.checkpoint import check_safetensors

    header = check_safetensors(path)
    if "input_ids" not in header:
        names = set(header) - {"__metadata__"}
        raise InputError("no tensor input_ids", where=path, hint=did_you_mean("input_ids", names))
    rows = load_file(path)["input_ids"]
    if rows.dim() != 2 or rows.is_floating_point() or rows.dtype is torch.bool:
        what = f"input_ids must be whole numbers of shape [n, t], not {rows.dtype} {list(rows.shape)}"
        raise InputError(what, where=path)
    return rows.long()


def _file(path: Path, column: str) -> Iterator[str]:
    if path.suffix in LINES:
        yield from _json_lines(path, column)
    elif path.suffix == ".parquet":
        yield from _parquet(path, column)
    else:
        yield _text(path)


def _text(path: Path) -> str:
    """The text of a file, at most MOST characters and one."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MOST + 1)
    except UnicodeDecodeError as error:
        what = f"not a text file: byte {error.start:,} is not UTF-8"
        raise InputError(what, where=path, hint="convert it to UTF-8 text") from None
    except OSError as error:
        raise InputError(f"can't read: {error.strerror or error}", where=path) from None
    if "\0" in text:
        raise InputError("not a text file: it holds zero bytes", where=path, hint="convert it to UTF-8 text")
    return text


def _json_lines(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _field(json.loads(line), column, f"{path} line {number}")
    except UnicodeDecodeError:
        raise InputError("not UTF-8", where=path, hint="JSON lines are UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InputError(f"line {number} is not valid JSON: {error.msg}", where=path) from None


def _field(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise InputError(f"a JSON object is needed, not {type(row).__name__}", where=where)
    if column not in row:
        raise InputError(f"no column {column!r}", where=where, hint=did_you_mean(column, map(str, row)))
    if not isinstance(row[column], str):
        raise InputError(f"column {column!r} holds {type(row[column]).__name__}, not text", where=where)
    return row[column]


def _parquet(path: Path, column: str) -> Iterator[str]:
    import polars

    try:
        schema = polars.read_parquet_schema(path)
        known = column in schema
        table = polars.read_parquet(path, columns=[column]) if known else None
    except (OSError, polars.exceptions.PolarsError) as error:
        detail = (str(error).splitlines() or [""])[0]
        raise InputError(f"not a readable Parquet file: {detail[:200]}", where=path) from None
    if table is None:
        raise InputError(f"no column {column!r}", where=path, hint=did_you_mean(column, schema))
    if schema[column] != polars.String:
        raise InputError(f"column {column!r} holds {schema[column]}, not text", where=path)
    yield from (value for value in table[column] if value)


def _folder(spec: str, path: Path, column: str) -> Source:
    """Every text file below a folder, in the order of their paths; hidden and binary files are passed over."""
    passed = 0

    def documents() -> Iterator[str]:
        nonlocal passed
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                continue
            if not _looks_like_text(file) and file.suffix != ".parquet":
                passed += 1
                continue
            yield from _file(file, column)

    found = _capped(spec, f"{path.name}/", documents())
    if not found.documents:
        raise InputError("no text file in this folder", where=path, hint=f"{passed} other files" if passed else "")
    note = (f"{path.name}/: {passed} files that are not UTF-8 text were passed over",) if passed else ()
    return Source(spec, found.label, found.documents, notes=found.notes + note)


def _looks_like_text(path: Path) -> bool:
    """No zero byte and valid UTF-8 in the first 4 KB (a character cut off at the end is no fault)."""
    with path.open("rb") as file:
        head = file.read(4096)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and len(head) == 4096
    return b"\0" not in head


def _capped(spec: str, label: str, documents: Iterable[str]) -> Source:
    """Documents that are not blank, up to MOST characters together."""
    kept, size = list[str](), 0
    for text in documents:
        if size + len(text) > MOST:
            note = f"{label}: only its first {MOST:,} characters are used"
            return Source(spec, label, (*kept, *([text[: MOST - size]] if size < MOST else [])), notes=(note,))
        if text.strip():
            kept.append(text)
            size += len(text)
    return Source(spec, label, tuple(kept))


def _hugging_face(spec: str, column: str) -> Iterator[str]:
    """The rows of a data set of the `datasets` library: on the hub, or saved to disk."""
    try:
        import datasets
    except ImportError:
        hint = "pip install 'lamina[datasets]'"
        raise InputError("the library `datasets` is needed", where=spec, hint=hint) from None
    name, config, split = _parts(spec.removeprefix("hf:"))
    load: Callable[[], Any] = (
        (lambda: datasets.load_from_disk(name))
        if Path(name).is_dir()
        else (lambda: datasets.load_dataset(name, config, split=split or "train"))
    )
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        found = load()
    except Exception as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "check the name, CONFIG and SPLIT; offline, give a local file or folder"
        raise InputError(f"can't load this data set: {detail[:200]}", where=spec, hint=hint) from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    if isinstance(found, dict):
        wanted = split or ("train" if "train" in found else next(iter(found)))
        if wanted not in found:
            raise InputError(f"no split {wanted!r}", where=spec, hint=did_you_mean(wanted, found))
        found = found[wanted]
    if column not in found.column_names:
        raise InputError(f"no column {column!r}", where=spec, hint=did_you_mean(column, found.column_names))
    for row in found.select_columns([column]):
        yield _field(row, column, spec)


def _parts(rest: str) -> tuple[str, str | None, str | None]:
    """NAME, CONFIG and SPLIT of `NAME[:CONFIG][:SPLIT]`; one word after the name is a split if it is called so."""
    name, *more = rest.split(":")
    if len(more) > 2 or not name:
        raise InputError("write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT", where=f"hf:{rest}")
    if len(more) == 2:
        return name, more[0] or None, more[1] or None
    if more and (more[0].split("[")[0] in SPLITS or Path(name).is_dir()):
        return name, None, more[0]
    return name, (more[0] or None) if more else None, None
