"""Taps: what a measure sees of one site on one batch; padding is gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lamina.lab.rows import Rows

if TYPE_CHECKING:
    from lamina.lab.attention import Attention

PIECE = 256
"""Tokens that are worked on at once."""


@dataclass(eq=False)
class Taps:
    """The stream around one site on one batch.

    `entering` x, `added` f and `leaving` y = x + f have shape [tokens, width], in the model's own type; `sequence`
    [tokens] numbers each token's sequence within the batch (int64), `sequences` counts them. `gradient`
    [probes, tokens, width] is the loss's gradient with respect to f, where a measure asks for gradients.
    `rows` knows the tokens themselves: ids, places, which of them a sample takes.
    Of sublayers, where a tally wants it (see `lamina.lab.feed`): `inner` [tokens, features] is the input of the last
    linear map, `inner_gradient` [probes, tokens, features] the gradient with respect to it; `attention` gives attention
    weights; `weights` has of each parameter's name the parameter and the gradient of the summed loss over the batch.
    """

    entering: Tensor
    added: Tensor
    sequence: Tensor
    sequences: int
    gradient: Tensor | None = None
    out: Tensor | None = None
    rows: Rows = field(default_factory=lambda: Rows({"input_ids": torch.zeros(1, 1, dtype=torch.long)}))
    inner: Tensor | None = None
    inner_gradient: Tensor | None = None
    attention: Attention | None = None
    weights: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])

    @cached_property
    def x(self) -> Tensor:
        """The stream that enters, float32."""
        return self.entering.float()

    @cached_property
    def f(self) -> Tensor:
        """What the site adds, float32."""
        return self.added.float()

    @cached_property
    def leaving(self) -> Tensor:
        """y = x + f, float32 (a block's is what it really returned)."""
        return self.x + self.f if self.out is None else self.out.float()

    @cached_property
    def dots(self) -> tuple[Tensor, Tensor, Tensor]:
        """‖x‖², x·f and ‖f‖² per token, float64 of float32 sums."""
        f = self.f if self.out is None else self.out.float() - self.x
        return (self.x * self.x).sum(-1).double(), (self.x * f).sum(-1).double(), (f * f).sum(-1).double()

    @property
    def xx(self) -> Tensor:
        """‖x‖² per token."""
        return self.dots[0]

    @property
    def ff(self) -> Tensor:
        """‖f‖² per token."""
        return self.dots[2]

    @cached_property
    def yy(self) -> Tensor:
        """‖y‖² per token."""
        xx, xf, ff = self.dots
        return (xx + 2 * xf + ff).clamp_min(0.0)

    @cached_property
    def xy(self) -> Tensor:
        """x·y per token."""
        return self.dots[0] + self.dots[1]

    @cached_property
    def cosine(self) -> Tensor:
        """cos(x, y) per token; 1 where either is zero and the site adds nothing."""
        norm = (self.xx * self.yy).sqrt()
        return torch.where(norm > 0, self.xy / norm.clamp_min(1e-300), (self.ff == 0).double())

    @cached_property
    def last(self) -> Tensor:
        """Index [sequences] of each sequence's last token."""
        ends = torch.zeros(self.sequences, dtype=torch.long, device=self.sequence.device)
        return ends.scatter_reduce(0, self.sequence, torch.arange(len(self.sequence), device=ends.device), "amax")

    def per_sequence(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count of per-token `values` [tokens] in each sequence: two float64 [sequences]."""
        zero = torch.zeros(self.sequences, dtype=torch.float64, device=values.device)
        sums = zero.index_add(0, self.sequence, values.double())
        return sums, zero.index_add(0, self.sequence, torch.ones_like(values, dtype=torch.float64))


class Streams:
    """A block's incoming stream and what its branches add, [tokens, width] each, and their inner products."""

    def __init__(self, entering: Tensor, added: Sequence[Tensor], leaving: Tensor) -> None:
        self.parts = (entering, *added)
        self.leaving = leaving

    @cached_property
    def gram(self) -> dict[tuple[int, int], Tensor]:
        """(a, b) with a ≤ b → a·b per token, float64 of float32 sums; piece by piece, so that it stays in cache."""
        pairs = [(a, b) for a in range(len(self.parts)) for b in range(a, len(self.parts))]
        pieces = []
        for start in range(0, len(self.leaving), PIECE):
            here = [p[start : start + PIECE].float() for p in self.parts]
            pieces.append(torch.stack([torch.linalg.vecdot(here[a], here[b]) for a, b in pairs]))
        return dict(zip(pairs, torch.cat(pieces, 1).double(), strict=True))

    def dot(self, left: Sequence[int], right: Sequence[int]) -> Tensor:
        """The inner product of two sums of parts, per token."""
        terms = [self.gram[min(a, b), max(a, b)] for a in left for b in right]
        return torch.stack(terms).sum(0)

    def total(self, parts: Sequence[int]) -> Tensor:
        """A sum of parts, in the model's own type."""
        total = self.parts[parts[0]]
        for part in parts[1:]:
            total = total + self.parts[part]
        return total


class SharedTaps(Taps):
    """Taps of one site of a block that share the block's streams: nothing is computed that no measure asks for.

    `before` and `own` number the parts (0: the incoming stream) that make the site's x and f.
    """

    def __init__(
        self, streams: Streams, before: Sequence[int], own: Sequence[int], sequence: Tensor, sequences: int
    ) -> None:
        self.streams, self.before, self.own = streams, tuple(before), tuple(own)
        self.sequence, self.sequences = sequence, sequences
        self.weights = {}

    @cached_property
    def entering(self) -> Tensor:
        """x, in the model's own type."""
        return self.streams.total(self.before)

    @cached_property
    def added(self) -> Tensor:
        """f, in the model's own type."""
        return self.streams.total(self.own)

    @cached_property
    def leaving(self) -> Tensor:
        """y, float32: of the block's last branch what the block really returned."""
        whole = len(self.before) + len(self.own) == len(self.streams.parts)
        return self.streams.leaving.float() if whole else self.x + self.f

    @cached_property
    def dots(self) -> tuple[Tensor, Tensor, Tensor]:
        """‖x‖², x·f and ‖f‖² per token, float64, from the block's inner products."""
        s = self.streams
        return s.dot(self.before, self.before), s.dot(self.before, self.own), s.dot(self.own, self.own)
