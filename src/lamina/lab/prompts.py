"""The lab's sequences one by one, for measures that run passes of their own on them: no padding, evenly chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from lamina.core.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.lab.lab import Lab
    from lamina.lab.rows import Batch

T = TypeVar("T")


def prompts(lab: Lab, count: int | None = None, length: int | None = None, shortest: int = 1) -> list[Tensor]:
    """Token ids [tokens] of at most `count` sequences of `shortest` tokens or more, cut to `length`.

    Raises UnsupportedError where the text is no tokens, or no sequence is long enough.
    """
    found = []
    for rows in lab.rows():
        if rows.ids is None or "decoder_input_ids" in rows.batch:
            raise UnsupportedError("needs a text of tokens that one stack of blocks reads", where="text")
        found += [rows.ids[(rows.sequence == row).to(rows.ids.device)] for row in range(rows.sequences)]
    return [ids[:length] for ids in _chosen([f for f in found if len(f) >= shortest], count, shortest)]


def singles(lab: Lab, count: int | None = None, length: int | None = None, shortest: int = 1) -> list[Batch]:
    """The same as batches of one sequence; of a model that reads no tokens, its inputs as they are."""
    if all("input_ids" in b and "decoder_input_ids" not in b for b in lab.batches):
        return [{"input_ids": ids.unsqueeze(0)} for ids in prompts(lab, count, length, shortest)]
    return _chosen([rows.only(row).batch for rows in lab.rows() for row in range(rows.sequences)], count, shortest)


def _chosen(sequences: list[T], count: int | None, shortest: int) -> list[T]:
    if not sequences:
        raise UnsupportedError(f"no sequence has {shortest} tokens", where="text")
    size = len(sequences) if count is None else min(count, len(sequences))
    return [sequences[i * len(sequences) // size] for i in range(size)]
