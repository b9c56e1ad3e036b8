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


ROUNDING = 1e-6
"""Relative to the largest logit: what float32 sums over a vocabulary leave of a KL that is zero."""


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
        z = logits.float()
        found = self.negentropy - torch.linalg.vecdot(self.p, z) + torch.logsumexp(z, -1)
        return torch.where(found > ROUNDING * (1 + z.abs().amax(-1)), found, 0.0)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label]: [..., vocabulary] and [...] → [...]."""
    flat = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, -2), labels.reshape(-1).to(logits.device), reduction="none"
    )
    return flat.view(labels.shape)
