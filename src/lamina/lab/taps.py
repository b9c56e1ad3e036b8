"""Taps: what a measure sees of one site on one batch; padding is gone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(eq=False)
class Taps:
    """The stream around one site on one batch.

    `entering` x, `added` f and `leaving` y = x + f have shape [tokens, width], in the model's own type; `sequence`
    [tokens] numbers each token's sequence within the batch (int64), `sequences` counts them. `gradient`
    [probes, tokens, width] is the loss's gradient with respect to f, where a measure asks for gradients.
    """

    entering: Tensor
    added: Tensor
    sequence: Tensor
    sequences: int
    gradient: Tensor | None = None
    out: Tensor | None = None

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
    def xx(self) -> Tensor:
        """‖x‖² per token."""
        return self.x.square().sum(-1)

    @cached_property
    def ff(self) -> Tensor:
        """‖f‖² per token."""
        return self.f.square().sum(-1)

    @cached_property
    def yy(self) -> Tensor:
        """‖y‖² per token."""
        return self.leaving.square().sum(-1)

    @cached_property
    def xy(self) -> Tensor:
        """x·y per token."""
        return (self.x * self.leaving).sum(-1)

    @cached_property
    def cosine(self) -> Tensor:
        """cos(x, y) per token; 1 where either is zero and the site adds nothing."""
        norm = (self.xx.double() * self.yy.double()).sqrt()
        return torch.where(norm > 0, self.xy.double() / norm.clamp_min(1e-300), (self.ff == 0).double())

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
