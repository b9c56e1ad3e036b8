"""Rows: one batch's sequences as measures see them, padding gone; and which of them a sample takes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Batch = Mapping[str, Tensor]
Keys = NDArray[np.uint64]


PLACES = {"decoder": ("decoder_input_ids", "decoder_attention_mask"), "encoder": ("input_ids", "attention_mask")}
"""Where the ids of a side and their mask stand; a model of one side has the encoder's names."""


def real(batch: Batch, side: str | None = None) -> Tensor:
    """Which positions [batch, tokens] are no padding: of the decoder's ids, else of the ids, else one per row.

    `side`: "encoder" or "decoder" asks for that of an encoder-decoder.
    """
    for ids, mask in [PLACES[side]] if side else PLACES.values():
        if ids in batch:
            given = batch.get(mask)
            return given.bool() if given is not None else torch.ones_like(batch[ids], dtype=torch.bool)
    return torch.ones(len(next(iter(batch.values()))), 1, dtype=torch.bool)


def ids_of(batch: Batch, side: str | None = None) -> Tensor | None:
    """The token ids that `real` speaks of [batch, tokens]; None where a model reads no tokens."""
    return next((batch[ids] for ids, _ in ([PLACES[side]] if side else PLACES.values()) if ids in batch), None)


def sequence_keys(batch: Batch) -> Keys:
    """A number for each sequence that depends on what it holds alone, whatever its batch and padding."""
    found = []
    for row in range(len(real(batch))):
        digest = hashlib.blake2b(digest_size=8)
        for side in PLACES:
            ids = ids_of(batch, side)
            if ids is not None:
                kept = ids[row, real(batch, side)[row].to(ids.device)]
                digest.update(kept.cpu().long().numpy().tobytes())
        for name, tensor in sorted(batch.items()):
            if tensor.is_floating_point() and tensor.ndim > 1:
                digest.update(name.encode() + tensor[row].detach().float().cpu().contiguous().numpy().tobytes())
        found.append(int.from_bytes(digest.digest(), "big"))
    return np.array(found, dtype=np.uint64)


def _mixed(numbers: Keys) -> Keys:
    """Well-spread numbers from numbers (splitmix64; Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        z = numbers + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Rows:
    """The sequences of one batch on one stream.

    `offset` is the number of the batch's first sequence in the whole text, `number` that of the batch; `limits` are the
    keys of all the lab's sequences, in order; `side` tells an encoder's stream from a decoder's.
    """

    def __init__(
        self, batch: Batch, number: int = 0, offset: int = 0, limits: Keys | None = None, side: str | None = None
    ) -> None:
        self.batch, self.number, self.offset = batch, number, offset
        self._limits, self.side = limits, side
        self.mask = real(batch, side)
        self.tokens = ids_of(batch, side)

    def of(self, side: str) -> Rows:
        """The same for the stream of one side of an encoder-decoder; of a model of one side, itself."""
        if "decoder_input_ids" not in self.batch or side == self.side:
            return self
        return Rows(self.batch, self.number, self.offset, self._limits, side)

    def on(self, states: Tensor) -> Rows:
        """The same for a stream [batch, …, width] that has other positions than the ids: all of them are real."""
        shape = states.shape[:-1]
        if tuple(shape) == tuple(self.mask.shape) or tuple(shape) == (self.mask.numel(),):
            return self
        other = Rows(self.batch, self.number, self.offset, self._limits, self.side)
        each = max(shape.numel() // len(self.mask), 1)
        other.mask = torch.ones(len(self.mask), each, dtype=torch.bool)
        other.tokens = None
        return other

    def only(self, row: int) -> Rows:
        """One sequence of the batch, without its padding where all inputs are as long as the ids."""
        mask = self.mask[row]
        alike = all(t.ndim > 1 and t.shape[1] == len(mask) for t in self.batch.values())
        keep = mask.nonzero().squeeze(1) if alike else torch.arange(len(mask))
        batch = {
            k: v[row : row + 1][:, keep.to(v.device)] if alike else v[row : row + 1] for k, v in self.batch.items()
        }
        return Rows(batch, self.number, self.offset + row, self._limits, self.side)

    @cached_property
    def full(self) -> bool:
        """Whether there is no padding."""
        return bool(self.mask.all())

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self.mask)

    @cached_property
    def sequence(self) -> Tensor:
        """The number of each token's sequence within the batch, int64 [tokens]."""
        return torch.arange(len(self.mask)).unsqueeze(1).expand_as(self.mask)[self.mask]

    @cached_property
    def position(self) -> Tensor:
        """Each token's place in its sequence, padding not counted, int64 [tokens]."""
        return (self.mask.long().cumsum(1) - 1)[self.mask]

    @cached_property
    def ids(self) -> Tensor | None:
        """Token ids [tokens]; None where the stream's positions are no tokens."""
        return None if self.tokens is None else self.tokens[self.mask.to(self.tokens.device)]

    @cached_property
    def next_ids(self) -> Tensor | None:
        """The id of the token that follows, -1 behind a sequence's last, [tokens]."""
        if self.ids is None:
            return None
        follows = torch.full_like(self.ids, -1)
        same = self.sequence[1:] == self.sequence[:-1]
        follows[:-1] = torch.where(same.to(self.ids.device), self.ids[1:], -1)
        return follows

    @cached_property
    def owners(self) -> Keys:
        """The key of each sequence, uint64 [sequences]."""
        return sequence_keys(self.batch)

    @cached_property
    def keys(self) -> Keys:
        """A key of each token, of its sequence and place alone, uint64 [tokens]."""
        return _mixed(self.owners[self.sequence.numpy()] ^ _mixed(self.position.numpy().astype(np.uint64)))

    def strip(self, states: Tensor) -> Tensor:
        """[batch, …, width] → [tokens, width]."""
        if self.full:
            return states.flatten(0, -2) if states.ndim > 2 else states
        return states.reshape(*self.mask.shape, -1)[self.mask.to(states.device)]

    def picked(self, sequences: int, each: int) -> Tensor:
        """Indices of a sample's tokens: of the lab's `sequences` sequences of least key, `each` tokens of least key.

        The choice depends on the sequences alone, so that parts of a text choose what the whole would.
        """
        limits = self._limits if self._limits is not None else np.sort(self.owners)
        ceiling = limits[min(sequences, len(limits)) - 1]
        found = []
        owner = self.sequence.numpy()
        for row in np.flatnonzero(self.owners <= ceiling):
            inside = np.flatnonzero(owner == row)
            found.append(np.sort(inside[np.argsort(self.keys[inside], kind="stable")[:each]]))
        return torch.from_numpy(np.concatenate(found)) if found else torch.zeros(0, dtype=torch.long)
