"""A sample of tokens with their states at every depth: for measures that compare states and not only sum over them.

Bounded in size, and a monoid: it holds the sequences of least key, and of each the tokens of least key, so that parts
of a text keep what the whole would. States of n tokens at L + 1 depths take n · (L + 1) · width · 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from lamina.core.errors import UnsupportedError
from lamina.core.sites import Kind, Site
from lamina.lab.rows import Keys

if TYPE_CHECKING:
    from lamina.lab.taps import Taps

SEQUENCES, EACH = 64, 8


@dataclass(frozen=True, eq=False)
class Sampled:
    """A stack's sample, in an order that depends on the sequences alone.

    `blocks` are the ids of its blocks; `states` [blocks + 1, n, width] float32, the first before the first block;
    `owner` [n] numbers each token's sequence, `position` its place in it; `ids` and `next_ids` [n] are its id and the
    next one's (-1 where there is none; both None where positions are no tokens).
    """

    blocks: tuple[str, ...]
    states: Tensor
    owner: np.ndarray
    position: np.ndarray
    ids: Tensor | None
    next_ids: Tensor | None


@dataclass(eq=False)
class _Part:
    """What is held of one stack: a row of each list per batch; states by site."""

    owners: list[Keys] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    next_ids: list[Tensor] = field(default_factory=list)
    entering: list[Tensor] = field(default_factory=list)
    leaving: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])


class TokenSample:
    """Collects the sample: `sequences` sequences and `each` tokens of every one. Give it every tap."""

    def __init__(self, sequences: int = SEQUENCES, each: int = EACH) -> None:
        if sequences < 1 or each < 1:
            raise ValueError(f"a sample takes at least one token of one sequence, not {each} of {sequences}")
        self.sequences, self.each = sequences, each
        self.parts: dict[str, _Part] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one block on one batch; other sites are passed over."""
        if site.kind is not Kind.BLOCK:
            return
        name = site.id.rpartition("block.")[0]
        rows, part = taps.rows, self.parts.setdefault(name, _Part())
        chosen = rows.picked(self.sequences, self.each)
        first = not part.leaving or next(iter(part.leaving)) == site.id
        if first:
            part.owners.append(rows.owners[rows.sequence.numpy()[chosen.numpy()]])
            part.positions.append(rows.position.numpy()[chosen.numpy()])
            if rows.ids is not None and rows.next_ids is not None:
                part.ids.append(rows.ids.cpu()[chosen])
                part.next_ids.append(rows.next_ids.cpu()[chosen])
            part.entering.append(taps.entering[chosen].float().cpu())
        part.leaving.setdefault(site.id, []).append(_leaving(taps, chosen))

    def merge(self, other: Self) -> Self:
        """The sample of both parts of a text."""
        both = type(self)(self.sequences, self.each)
        for name in {**self.parts, **other.parts}:
            a, b = self.parts.get(name, _Part()), other.parts.get(name, _Part())
            sites = {**a.leaving, **b.leaving}
            both.parts[name] = _Part(
                *(getattr(a, f) + getattr(b, f) for f in ("owners", "positions", "ids", "next_ids", "entering")),
                leaving={s: a.leaving.get(s, []) + b.leaving.get(s, []) for s in sites},
            )
        return both

    def stacks(self) -> list[Sampled]:
        """The samples of all stacks. Raises UnsupportedError where no token was seen."""
        if not self.parts:
            raise UnsupportedError("no token was sampled", hint="give it more text")
        return [self._sampled(part) for part in self.parts.values()]

    def _sampled(self, part: _Part) -> Sampled:
        owners, positions = np.concatenate(part.owners), np.concatenate(part.positions)
        order = np.lexsort((positions, owners))
        kept = np.unique(owners)[: self.sequences]
        order = order[np.isin(owners[order], kept)]
        index = torch.from_numpy(order)
        states = torch.stack([torch.cat(s)[index] for s in (part.entering, *part.leaving.values())])
        ids = torch.cat(part.ids)[index] if part.ids else None
        follows = torch.cat(part.next_ids)[index] if part.next_ids else None
        owner = np.searchsorted(kept, owners[order])
        return Sampled(tuple(part.leaving), states, owner, positions[order], ids, follows)


def _leaving(taps: Taps, chosen: Tensor) -> Tensor:
    if taps.out is not None:
        return taps.out[chosen].float().cpu()
    streams = getattr(taps, "streams", None)
    if streams is not None:
        return streams.leaving[chosen].float().cpu()
    return (taps.entering[chosen].float() + taps.added[chosen].float()).cpu()
