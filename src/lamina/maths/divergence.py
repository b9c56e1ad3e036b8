"""Divergences between next-token distributions, per position, in nats."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p‖q) of softmaxes p of `reference` and q of `logits` [..., vocabulary] → [...]."""
    p, q = torch.log_softmax(reference.float(), -1), torch.log_softmax(logits.float(), -1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0)


def js_reversed(reference: Tensor, logits: Tensor) -> Tensor:
    """½[KL(m‖p) + KL(m‖q)] with m = (p+q)/2, as FinerCut's code computes it → [...]."""
    p, q = torch.log_softmax(reference.float(), -1), torch.log_softmax(logits.float(), -1)
    m = _mixture(p, q)
    return (m.exp() * (m - (p + q) / 2)).sum(-1).clamp_min(0.0)


def js(reference: Tensor, logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence ½[KL(p‖m) + KL(q‖m)], m = (p+q)/2 → [...]."""
    p, q = torch.log_softmax(reference.float(), -1), torch.log_softmax(logits.float(), -1)
    m = _mixture(p, q)
    return 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)).clamp_min(0.0)


def _mixture(p: Tensor, q: Tensor) -> Tensor:
    """log((exp p + exp q)/2): finite where both underflow, and exactly p where q = p."""
    return torch.maximum(p, q) + torch.log1p(torch.expm1(-(p - q).abs()) / 2)


ROUNDING = 1e-5
"""In nats: what float32 sums over a vocabulary may leave of a KL that is zero."""
ROWS = 64
"""Positions that are compared at once, so that a large vocabulary stays in cache."""


class KLFrom:
    """KL(p‖q) from one reference to many logits: the reference's softmax is computed once.

    `reference` [..., vocabulary]; calling it with logits of the same shape gives [...], in nats.
    """

    def __init__(self, reference: Tensor) -> None:
        log_p = torch.log_softmax(reference.float(), -1)
        self.p = log_p.exp()
        self.negentropy = (self.p * log_p).sum(-1)

    def __call__(self, logits: Tensor) -> Tensor:
        """KL from the reference to `logits`, per position."""
        p, rows = self.p.flatten(0, -2), logits.flatten(0, -2)
        parts = []
        for start in range(0, len(rows), ROWS):
            z = rows[start : start + ROWS].float()
            parts.append(torch.logsumexp(z, -1) - torch.linalg.vecdot(p[start : start + ROWS], z))
        found = self.negentropy + torch.cat(parts).view_as(self.negentropy)
        return torch.where(found > ROUNDING, found, 0.0)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label]: [..., vocabulary] and [...] → [...]."""
    flat = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, -2), labels.reshape(-1).to(logits.device), reduction="none"
    )
    return flat.view(labels.shape)
