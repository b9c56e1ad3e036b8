"""Random weights that let every branch of any model matter."""

from __future__ import annotations

import torch
from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0, loud: float = 0.5) -> nn.Module:
    """Fill the parameters with numbers scaled by what each reads; ties stay, buffers and padding are left alone.

    Gates and scales that start at zero get about one half, so that nothing is silent. `loud` is the standard
    deviation of the embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    fans = {id(m.weight): m.weight[0].numel() for m in model.modules() if isinstance(m, _CONVOLUTIONS)}
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    for name, p in model.named_parameters():
        if not p.is_floating_point():
            continue
        noise = torch.randn(p.shape, generator=generator).to(p.dtype)
        if id(p) in embeddings:
            p.copy_(loud * noise)
            if (padding := embeddings[id(p)]) is not None:
                p[padding] = 0
        elif p.ndim > 1:
            p.copy_(noise / fans.get(id(p), max(p.shape[-1], 16)) ** 0.5)
        elif name.endswith("bias"):
            p.copy_(0.1 * noise)
        elif id(p) in norms:
            start = p.nan_to_num().mean() if p.numel() else 0.0
            p.copy_(0.1 * noise + (1.0 if start > 0.5 else 0.0))
        else:
            _vector(p, noise)
    return model


def _vector(p: nn.Parameter, noise: torch.Tensor) -> None:
    """A gate, scale or decay: around its start, or around one half if it starts at zero."""
    start = torch.nan_to_num(p, 0.0, 0.0, 0.0)
    p.copy_((start if start.abs().mean() > 0.05 else torch.full_like(p, 0.5)) + 0.1 * noise)
