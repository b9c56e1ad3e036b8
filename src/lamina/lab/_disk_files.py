"""Tensors in safetensors files, mapped when they are asked for; and the streams of a text, in memory or in a file."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from lamina.core.errors import InputError, UnsupportedError
from lamina.lab.checkpoint import check_safetensors

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of number types in safetensors files → torch's."""
CHUNK = 1 << 24
"""Bytes that are compared at a time."""
LINE = 64
"""Bytes by which torch aligns what it allocates."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: bytes `begin` to `end`. `stamp`: size and time of the file when its header was read."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    stamp: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.end - self.begin

    def open(self) -> BinaryIO:
        """The file, which must be the one whose header was read; else InputError."""
        try:
            file = self.file.open("rb")
        except OSError as error:
            raise InputError(f"can't read: {error.strerror}", where=self.file) from error
        if _stamp(file) != self.stamp:
            file.close()
            raise InputError("the file has changed since it was opened", where=self.file, hint="start again")
        return file

    def read(self, dtype: torch.dtype | None = None, *, whole: bool = True) -> Tensor:
        """The tensor, as a private mapping of the file that lasts as long as the tensor, or converted to `dtype`.

        It lies in its page as it lies in the file, as a tensor that safetensors loads does: some kernels add up in
        another order where numbers lie otherwise. `whole`: all of it will be needed, so the system may read ahead.
        """
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype or self.dtype)
        start = self.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self.open() as file:
            try:
                mapped = mmap.mmap(file.fileno(), self.end - start, access=mmap.ACCESS_COPY, offset=start)
            except OSError as error:
                raise InputError(f"can't map {self.nbytes:,} bytes: {error.strerror}", where=self.file) from error
        if whole and hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_WILLNEED)
        count = self.nbytes // self.dtype.itemsize
        found = torch.frombuffer(mapped, dtype=self.dtype, count=count, offset=self.begin - start).reshape(self.shape)
        return found if dtype is None else found.to(dtype)

    def expect(self) -> None:
        """Tell the system that the tensor will be needed soon."""
        if hasattr(os, "posix_fadvise") and self.nbytes:
            with self.open() as file:
                os.posix_fadvise(file.fileno(), self.begin, self.nbytes, os.POSIX_FADV_WILLNEED)

    def same(self, other: Stored) -> bool:
        """Whether both hold the same bytes of the same type and shape."""
        if (self.dtype, self.shape, self.nbytes) != (other.dtype, other.shape, other.nbytes):
            return False
        with self.open() as mine, other.open() as yours:
            mine.seek(self.begin)
            yours.seek(other.begin)
            for done in range(0, self.nbytes, CHUNK):
                size = min(CHUNK, self.nbytes - done)
                if mine.read(size) != yours.read(size):
                    return False
        return True


def unmapped(tensor: Tensor) -> Tensor:
    """A copy that lies as far from a multiple of 64 bytes as the tensor does."""
    size = tensor.numel() * tensor.element_size()
    room = torch.empty(size + LINE, dtype=torch.uint8)
    shift = (tensor.data_ptr() - room.data_ptr()) % LINE
    if not tensor.is_contiguous() or shift % tensor.element_size():
        return tensor.clone()
    return room[shift : shift + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _stamp(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def stored(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of these safetensors files by name, from their headers alone.

    Raises InputError for a header that is no such, for a type that torch has not, and for a size that is not that of
    the shape.
    """
    found: dict[str, Stored] = {}
    for path in files:
        header = check_safetensors(path)
        with path.open("rb") as file:
            data = 8 + struct.unpack("<Q", file.read(8))[0]
            stamp = _stamp(file)
        for name, row in header.items():
            if name != "__metadata__":
                found[name] = _row(path, name, row, data, stamp)
    return found


def _row(path: Path, name: str, row: Any, data: int, stamp: tuple[int, int]) -> Stored:
    try:
        dtype, shape = DTYPES.get(str(row["dtype"])), tuple(int(n) for n in row["shape"])
        begin, end = (data + int(n) for n in row["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"corrupt safetensors header at {name}", where=path, hint="copy it again") from None
    if dtype is None:
        raise InputError(f"{name} is of type {row['dtype']}, which can't be read", where=path)
    one = Stored(path, dtype, shape, begin, end, stamp)
    count = 1
    for n in shape:
        count *= n
    if begin < data or end > stamp[0] or one.nbytes != count * dtype.itemsize:
        what = (
            f"corrupt: {name} takes {one.nbytes:,} bytes, but its shape {list(shape)} needs {count * dtype.itemsize:,}"
        )
        raise InputError(what, where=path, hint="copy or download it again")
    return one


@dataclass(eq=False)
class States:
    """One stream per batch [batch, tokens, width]: in memory, or one after the other in a file in `folder`.

    `positions` is how many tokens each batch holds, padding included: by them the file's size is told from the first
    batch, and all of it is taken at once. The file has no name where the system can do without, and is gone when it is
    closed, whatever happens. Raises InputError where the folder can't hold it.
    """

    positions: Sequence[int]
    folder: Path | None = None
    _held: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    _places: dict[int, tuple[int, torch.Size, torch.dtype, torch.device]] = field(default_factory=dict)
    _file: Any = None
    _size: int = 0
    _used: int = 0

    def __enter__(self) -> Self:
        if self.folder is not None:
            try:
                self._file = tempfile.TemporaryFile(dir=self.folder, prefix=".lamina-", buffering=0)
            except OSError as error:
                raise InputError(f"can't write here: {error.strerror}", where=self.folder) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()

    @property
    def nbytes(self) -> int:
        """What all streams take."""
        return self._used if self.folder else sum(t.numel() * t.element_size() for t in self._held.values())

    def put(self, number: int, states: Tensor) -> None:
        """The stream of a batch, in the place of the one before."""
        states = states.detach()
        if self.folder is None:
            self._held[number] = states
            return
        size = states.numel() * states.element_size()
        place = self._places.get(number)
        if place is None:
            if self._used + size > self._size:
                todo = sum(self.positions[number:])
                self._reserve(self._used + max(size, size * todo // max(self.positions[number], 1)))
            place = self._places[number] = (self._used, states.shape, states.dtype, states.device)
            self._used += size
        if (place[1], place[2]) != (states.shape, states.dtype):
            raise UnsupportedError("a block changes the shape of its stream", where=f"batch {number}")
        with self._clear():
            self._file.seek(place[0])
            for part in _pieces(states.cpu()):
                view, done = memoryview(part), 0
                while done < len(view):
                    done += self._file.write(view[done:])

    def get(self, number: int) -> Tensor:
        """The stream of a batch."""
        if self.folder is None:
            return self._held[number]
        begin, shape, dtype, device = self._places[number]
        found = torch.empty(shape, dtype=dtype)
        with self._clear():
            self._file.seek(begin)
            for part in _pieces(found):
                view, done = memoryview(part), 0
                while done < len(view):
                    count = self._file.readinto(view[done:])
                    if not count:
                        raise OSError(0, "the scratch file ends too early")
                    done += count
        return found.to(device)

    def _reserve(self, size: int) -> None:
        """Take room for so many bytes."""
        assert self.folder is not None
        with self._clear(f"{size / 1e9:.2f} GB are needed for the states, {_free(self.folder) / 1e9:.2f} GB are free"):
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            elif _free(self.folder) < size - self._size:
                raise OSError(28, "No space left on device")
        self._size = size

    def _clear(self, more: str = "") -> _OneLine:
        assert self.folder is not None
        return _OneLine(self.folder, more)


@dataclass
class _OneLine:
    """Inside, what the system says of a file becomes one line."""

    folder: Path
    more: str

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            what = f"can't keep the states here: {error.strerror or error}"
            what += f"; {self.more}" if self.more else ""
            hint = "make room, choose another folder, or use less text"
            raise InputError(what, where=self.folder, hint=hint) from error


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _pieces(states: Tensor) -> Iterator[Any]:
    """The bytes of a contiguous tensor's numbers, in pieces that one system call takes."""
    raw = states.contiguous().reshape(-1).view(torch.uint8).numpy()
    for begin in range(0, len(raw), 1 << 30):
        yield raw[begin : begin + (1 << 30)]
