"""The header of a GGUF file, read in milliseconds: enough to say whether the file is whole and what it holds."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from lamina.core.errors import InputError, UnsupportedError

ENCODERS = ("bert", "nomic-bert", "jina-bert", "t5encoder", "clip", "t5", "whisper")
AGAIN = "copy or download it again"
STRING, ARRAY = 8, 9
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each scalar value type; 8 is a string, 9 an array (GGUF specification, version 3)."""


@dataclass(frozen=True)
class Header:
    """What the file says of itself. `need` is the number of bytes that its tensors reach to."""

    architecture: str
    tensors: int
    need: int


class _Cursor:
    """A position in the mapped file; reading past the end raises struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def string(self) -> bytes:
        size = self.take("Q")
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise struct.error("a string reaches past the end")
        return self.data[start : self.at]

    def value(self, kind: int) -> object:
        """A string or unsigned 32-bit number; other values are stepped over."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.take("I"), self.take("Q")
            if inner in (STRING, ARRAY):
                for _ in range(count):
                    self.value(inner)
            else:
                self.at += WIDTHS[inner] * count
            return None
        if kind == 4:
            return self.take("I")
        self.at += WIDTHS[kind]
        return None


def check_gguf(path: Path) -> Header:
    """Refuse an empty, foreign, truncated or unsuitable GGUF in one line."""
    size = path.stat().st_size
    if size < 24:
        raise InputError("the file is empty" if size == 0 else f"truncated: {size} bytes", where=path, hint=AGAIN)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise InputError("not a GGUF file (wrong first bytes)", where=path, hint=AGAIN)
        try:
            header = _read(_Cursor(data), path)
        except (struct.error, KeyError, ValueError, OverflowError, RecursionError):
            raise InputError("corrupt or truncated GGUF header", where=path, hint=AGAIN) from None
    if header.need > size:
        what = f"truncated: its tensors need {header.need:,} bytes, the file has {size:,}"
        raise InputError(what, where=path, hint=AGAIN)
    if not header.tensors or not header.architecture:
        raise InputError("this GGUF holds no model (vocabulary or adapter only?)", where=path)
    if header.architecture in ENCODERS:
        raise UnsupportedError(f"an encoder ({header.architecture}) where a causal LM is needed", where=path)
    return header


def _read(cursor: _Cursor, path: Path) -> Header:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor.at = 4
    version = cursor.take("I")
    if version not in (2, 3):
        raise InputError(f"GGUF version {version}; 2 and 3 can be read", where=path)
    tensors, fields = cursor.take("Q"), cursor.take("Q")
    known: dict[bytes, object] = {}
    for _ in range(fields):
        key = cursor.string()
        known[key] = cursor.value(cursor.take("I"))
    reach = 0
    for _ in range(tensors):
        cursor.string()
        elements = 1
        for _ in range(cursor.take("I")):
            elements *= cursor.take("Q")
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(cursor.take("I"))]
        reach = max(reach, cursor.take("Q") + elements // block * width)
    alignment = known.get(b"general.alignment")
    step = alignment if isinstance(alignment, int) and alignment > 0 else 32
    start = -(-cursor.at // step) * step
    architecture = known.get(b"general.architecture")
    name = architecture.decode("utf-8") if isinstance(architecture, bytes) else ""
    return Header(name, tensors, start + reach if tensors else 0)
