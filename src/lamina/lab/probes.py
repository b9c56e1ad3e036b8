"""Probes: cotangents on a model's output from which gradients along the stream are taken.

- "loss": p - onehot(label), so that the gradient is that of the summed next-token loss (Σ over positions, in nats);
- "fisher": √p·e - p·(√p·e summed) with e ~ N(0, 1), fresh at every position. Its covariance is diag(p) - ppᵀ, so that
  squares of such gradients are unbiased for the Gauss-Newton matrix of the loss, which is the Fisher matrix of the
  model's own distribution (Martens, New Insights and Perspectives on the Natural Gradient Method, 2020, section 8);
- "entropy": -p·(log p + H), the gradient of the summed entropy of the model's own distribution, which needs no labels.

Where a model predicts no tokens there are no labels, and "loss" is zero: it has no better rival. Where its
outputs are vectors y, "fisher" is √2·e / ‖y‖, so that half the square of a gradient along a change is the share of the
output that it changes, as expected.

The noise of a sequence follows from the seed and what it holds, whatever batch it comes in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lamina.lab.objective import Objective
from lamina.lab.rows import Rows

Probe = Callable[[Tensor, Tensor | None, torch.Generator], Tensor]
"""(probabilities [positions, vocabulary] float32, labels [positions] if any, noise) → cotangent of that shape."""


def _loss(p: Tensor, labels: Tensor | None, _: torch.Generator) -> Tensor:
    """Gradient of the summed cross-entropy with respect to the logits."""
    if labels is None:
        return torch.zeros_like(p)
    out = p.clone()
    out[torch.arange(len(labels), device=p.device), labels] -= 1
    return out


def _fisher(p: Tensor, _: Tensor | None, noise: torch.Generator) -> Tensor:
    """A draw whose covariance is the loss's Hessian with respect to the logits, diag(p) - ppᵀ."""
    drawn = torch.randn(p.shape, generator=noise).to(p.device).mul_(p.sqrt())
    return drawn.sub_(p * drawn.sum(-1, keepdim=True))


def _entropy(p: Tensor, _: Tensor | None, __: torch.Generator) -> Tensor:
    """Gradient of the summed entropy with respect to the logits."""
    logs = p.clamp_min(1e-30).log()
    return -p * (logs - (p * logs).sum(-1, keepdim=True))


PROBES: dict[str, Probe] = {"loss": _loss, "fisher": _fisher, "entropy": _entropy}


def refusal(probe: str, objective: Objective) -> str:
    """Why a probe can't be taken of a model's outputs; '' where it can."""
    vectors = probe == "entropy" and objective.name == "output"
    return "the model's outputs are no distributions, so they have no entropy" if vectors else ""


@torch.no_grad()
def cotangents(out: Tensor, objective: Objective, rows: Rows, probes: Sequence[str], seed: int) -> list[Tensor]:
    """One cotangent, shaped like the output, per probe; one softmax, sequence by sequence, serves all."""
    found = [torch.zeros_like(out) for _ in probes]
    flat = out.unsqueeze(1) if out.ndim == 2 else out.flatten(1, -2)
    views = [f.view(flat.shape) for f in found]
    here = rows.on(flat)
    for row in range(len(flat)):
        places = here.mask[row].nonzero().squeeze(1).to(out.device)
        own = rows.ids[(rows.sequence == row).to(rows.ids.device)] if rows.ids is not None else None
        labels = None
        if objective.name == "next-token" and own is not None:
            labels, places = own[1:].to(out.device), places[:-1]
        if not len(places):
            continue
        p = flat[row, places].float()
        p = p if objective.name == "output" else torch.softmax(p, -1)
        for probe, view in zip(probes, views, strict=True):
            noise = noise_of(rows.owners[row] if own is None else own.tolist(), probe, seed)
            made = _vector(p, probe, noise) if objective.name == "output" else PROBES[probe](p, labels, noise)
            view[row, places] = made.to(out.dtype)
    return found


def _vector(y: Tensor, probe: str, noise: torch.Generator) -> Tensor:
    """The cotangent on outputs that are vectors."""
    if probe == "loss":
        return torch.zeros_like(y)
    drawn = torch.randn(y.shape, generator=noise).to(y.device)
    return drawn * (2**0.5 / y.norm(dim=-1, keepdim=True).clamp_min(1e-30))


def noise_of(held: object, probe: str, seed: int) -> torch.Generator:
    """A generator that depends on the seed, the probe and what a sequence holds alone (its ids, else its key)."""
    text = f"{seed} {probe} {held}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
