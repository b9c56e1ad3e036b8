"""Packed blocks of tokens: calibration to fit on, held-out to judge by, nothing in both."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina.core.documents import Data
from lamina.core.errors import InputError
from lamina.core.files import fingerprint
from lamina.lab.sources import DEFAULT, Source, read

WIDTH = 13
"""The run of tokens by which overlap is checked (Brown et al., 2020, appendix C)."""
SMALL_VOCABULARY = 1024
"""Below it tokens are bytes or characters, and four times as many make a run."""
INPUT_ROWS = 4
"""Rows of named inputs in one batch."""
TOLERATED = 0.01
"""The share of held-out runs found in the calibration text above which a warning is given."""
ENOUGH = 16
"""Of a large source, this many times the text that is needed is tokenised, drawn by the seed."""


@dataclass(frozen=True)
class Tokens:
    """Blocks of token ids: `calibration` [n, length] and `heldout` [m, length], int64, without padding.

    Or batches of a model's inputs by name, which serve for both (see `prepare_inputs`).

    `sources` names where each split comes from; `warnings` says what the user should know.
    """

    calibration: Any
    heldout: Any
    fingerprint: str
    sources: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Want:
    """How many blocks of which length one split asks for."""

    split: str
    blocks: int
    length: int


def prepare(data: Data, tokenizer: Any, *, seed: int = 0) -> Tokens:
    """Read, tokenise, pack and choose the calibration and held-out blocks.

    Documents are tokenised without special tokens and joined by the end-of-sequence token. The blocks are
    drawn one from each of n equal stretches of the source, so that few of them still cover many documents.
    One source for both splits is parted by documents (one document: cut in two). Same data, tokenizer and
    seed, same blocks. Raises InputError where the text does not fill one block.
    """
    for name in ("length", "sequences", "heldout_sequences"):
        if getattr(data, name) < 1:
            raise InputError(f"data.{name} must be at least 1, not {getattr(data, name)}")
    wants = (
        _Want("calibration", data.sequences, data.length),
        _Want("held-out", data.heldout_sequences, data.length),
    )
    rng = np.random.default_rng(seed)
    if data.calibration != DEFAULT and _same(data.calibration, data.heldout):
        found = read(data.calibration, "calibration", column=data.column)
        pools, sources = _part(found, tokenizer, wants, rng), (found,)
    else:
        sources = (
            read(data.calibration, "calibration", column=data.column),
            read(data.heldout, "heldout", column=data.column),
        )
        pools = [_pool(s, _ids(s, tokenizer, w, rng), tokenizer, w) for s, w in zip(sources, wants, strict=True)]
    blocks, warnings = list[torch.Tensor](), [note for s in sources for note in s.notes]
    for pool, want in zip(pools, wants, strict=True):
        chosen, note = _choose(pool, want, rng)
        blocks.append(chosen)
        warnings += note
    if not data.calibration == data.heldout == DEFAULT:
        warnings += _check(blocks[0], blocks[1], tokenizer)
    mark = fingerprint(*(part for b in blocks for part in (list(b.shape), b.numpy().tobytes())))
    labels = tuple(f"{w.split}: {s.label}" for w, s in zip(wants, sources * (2 // len(sources)), strict=True))
    return Tokens(blocks[0], blocks[1], mark, labels, tuple(warnings))


def prepare_inputs(data: Data) -> Tokens | None:
    """Inputs of any kind of model from a safetensors file that holds them by name, batch first; None for other data.

    A file that holds `input_ids` alone is text. Each row is a sequence; a model of images or sounds has one per row.
    """
    path = Path(data.calibration).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        named = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"can't read: {error}", where=path) from None
    if set(named) <= {"input_ids"}:
        return None
    sizes = {len(t) if t.ndim else 0 for t in named.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError("every tensor must have one row per sequence, and as many as the others", where=path)
    count = min(sizes.pop(), data.sequences)
    edges = [*range(0, count, INPUT_ROWS), count]
    batches = tuple({k: v[low:high].contiguous() for k, v in named.items()} for low, high in itertools.pairwise(edges))
    mark = fingerprint(*(part for b in batches for k, v in sorted(b.items()) for part in (k, v.numpy().tobytes())))
    label = f"calibration: {', '.join(sorted(named))} of {path}"
    return Tokens(batches, batches, mark, (label,), ())


def overlap(calibration: torch.Tensor, heldout: torch.Tensor, width: int = WIDTH) -> float:
    """The share (0 to 1) of the held-out runs of `width` tokens that occur in the calibration blocks [n, t]."""
    width = min(width, calibration.shape[1], heldout.shape[1])
    return float(np.isin(_runs(heldout, width), _runs(calibration, width)).mean())


def _runs(blocks: torch.Tensor, width: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit polynomial hash of every run of `width` ids inside a row, flat."""
    ids = blocks.numpy().astype(np.uint64)
    count = ids.shape[1] - width + 1
    total = np.zeros((ids.shape[0], count), dtype=np.uint64)
    for k in range(width):
        total = total * np.uint64(0x9E3779B97F4A7C15) + ids[:, k : k + count] + np.uint64(1)
        total ^= total >> np.uint64(29)
    return total.reshape(-1)


def _check(calibration: torch.Tensor, heldout: torch.Tensor, tokenizer: Any) -> list[str]:
    width = WIDTH if tokenizer is None or len(tokenizer) >= SMALL_VOCABULARY else 4 * WIDTH
    share = overlap(calibration, heldout, width)
    if share <= TOLERATED:
        return []
    return [
        f"{share:.1%} of the held-out runs of {width} tokens occur in the calibration text too: "
        "held-out numbers will flatter"
    ]


def _same(one: str, other: str) -> bool:
    """Whether two specs name the same source."""
    if one == other:
        return True
    paths = [Path(p).expanduser() for p in (one, other)]
    return all(p.exists() for p in paths) and paths[0].samefile(paths[1])


def _ids(source: Source, tokenizer: Any, want: _Want, rng: np.random.Generator) -> list[list[int]]:
    """The token ids of each document; of a large source, of as many documents as are amply enough."""
    if source.rows is not None:
        return []
    if tokenizer is None:
        hint = "give load() a tokenizer, or token ids as a safetensors file with input_ids"
        raise InputError("this model has no tokenizer, so text can't be used", where=source.label, hint=hint)
    if not source.documents:
        raise InputError("the text is empty", where=source.spec, hint=f"{want.length} tokens make one sequence")
    texts = _ample(source.documents, 4 * ENOUGH * want.blocks * want.length, 8 * want.length, rng)
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [row for row in ids if row]


def _ample(documents: Sequence[str], characters: int, least: int, rng: np.random.Generator) -> list[str]:
    """All documents, or about `characters` of them: one stretch of each, at least `least` long where it can be.

    Where there are more documents than that allows, some are drawn. Their order stays.
    """
    sizes = np.array([len(d) for d in documents])
    if sizes.sum() <= characters:
        return list(documents)
    order = rng.permutation(len(documents))
    enough = int(np.searchsorted(np.cumsum(np.minimum(sizes[order], least)), characters)) + 1
    kept = np.sort(order[:enough])
    stretch = _level(sizes[kept], characters)
    return [_stretch(documents[i], max(stretch, least), rng) for i in map(int, kept)]


def _level(sizes: np.ndarray[Any, np.dtype[np.int64]], total: int) -> int:
    """The length at which documents are cut, so that together they hold `total` characters."""
    left, ordered = total, np.sort(sizes)
    for i, size in enumerate(ordered):
        if size * (len(ordered) - i) >= left:
            return left // (len(ordered) - i)
        left -= int(size)
    return int(ordered[-1])


def _stretch(text: str, length: int, rng: np.random.Generator) -> str:
    """`length` characters of a text from a drawn place on, beginning and ending between words."""
    if len(text) <= length:
        return text
    start = int(rng.integers(0, len(text) - length + 1))
    start = text.find(" ", start, start + 100) if start else 0
    return text[max(start, 0) : max(start, 0) + length].rsplit(" ", 1)[0]


def _pool(source: Source, ids: list[list[int]], tokenizer: Any, want: _Want) -> torch.Tensor:
    """Every block of a source, [N, length], in order."""
    if source.rows is None:
        return _pack(ids, tokenizer, want.length, source.spec)
    rows, length = source.rows, want.length
    if rows.shape[1] < length:
        what = f"its rows hold {rows.shape[1]} tokens, shorter than one sequence of {length}"
        raise InputError(what, where=source.spec, hint="ask for a shorter length")
    if tokenizer is not None and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(tokenizer):
        what = f"token ids from {int(rows.min())} to {int(rows.max())}; the tokenizer has {len(tokenizer)}"
        raise InputError(what, where=source.spec, hint="these ids were made with another tokenizer")
    per = rows.shape[1] // length
    return rows[:, : per * length].reshape(-1, length)


def _pack(ids: list[list[int]], tokenizer: Any, length: int, where: str) -> torch.Tensor:
    """Documents joined by the end-of-sequence token and cut into blocks [N, length]; the rest is left out."""
    end = tokenizer.eos_token_id
    stream = [token for row in ids for token in ([*row, end] if end is not None else row)]
    stream = stream[:-1] if end is not None else stream
    count = len(stream) // length
    if count == 0:
        what = f"too little text: one sequence takes {length:,} tokens, there are {len(stream):,}"
        raise InputError(what, where=where, hint="give more text or a shorter length")
    return torch.tensor(stream[: count * length], dtype=torch.long).reshape(count, length)


def _part(source: Source, tokenizer: Any, wants: Sequence[_Want], rng: np.random.Generator) -> list[torch.Tensor]:
    """One source for both splits: parted by documents, or cut in two where its documents are too few."""
    both = _Want("both", sum(w.blocks for w in wants), wants[0].length)
    ids = _ids(source, tokenizer, both, rng)
    if len(ids) > 1:
        halves: list[list[int]] = [[], []]
        filled = [0, 0]
        for i in rng.permutation(len(ids)):
            side = int(filled[0] / wants[0].blocks > filled[1] / wants[1].blocks)
            halves[side].append(int(i))
            filled[side] += len(ids[i])
        if all(f >= w.blocks * w.length for f, w in zip(filled, wants, strict=True)):
            return [_pack([ids[i] for i in sorted(h)], tokenizer, both.length, source.spec) for h in halves]
    blocks = _pool(source, ids, tokenizer, both)
    if len(blocks) < 2:
        what = f"too little text: calibration and held-out take one sequence of {both.length} tokens each; it has one"
        raise InputError(what, where=source.spec, hint="give more text or a shorter length")
    cut = round(len(blocks) * wants[0].blocks / both.blocks)
    cut = min(max(cut, 1), len(blocks) - 1)
    return [blocks[:cut], blocks[cut:]]


def _choose(pool: torch.Tensor, want: _Want, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    """`want.blocks` of the pool's blocks, one from each of as many equal stretches; all, with a note, if fewer."""
    total = len(pool)
    if total < want.blocks:
        return pool, [f"{want.split}: the text fills {total} of {want.blocks} sequences of {want.length} tokens"]
    edges = [total * i // want.blocks for i in range(want.blocks + 1)]
    picks = [int(rng.integers(low, high)) for low, high in itertools.pairwise(edges)]
    return pool[picks].contiguous(), []
