"""A literal Llama forward pass over extracted tensors: what llama.cpp will compute, held against the model itself."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.core.errors import CertificateError
from lamina.exporters._gguf_tensors import BlockWeights, Weights

TOKENS = 12
TOLERANCE = 1e-3
COARSE = 8e-2
"""Largest difference over largest logit: in float32, and where a large model computes in 16 bits."""
COPIED = 2_000_000_000
"""A model in 16 bits with at most this many parameters is certified by a float32 copy; rounding hides less there."""


def certify(model: nn.Module, weights: Weights) -> float:
    """Relative difference between the model's logits and plain Llama's on a few tokens.

    Catches what no name tells: scaled residuals and embeddings, soft caps, norms by 1 + w, other activations.
    Raises CertificateError where they differ.
    """
    if weights.embedding.dtype.itemsize < 4 and sum(p.numel() for p in model.parameters()) <= COPIED:
        model = copy.deepcopy(model).float()
    tolerance = TOLERANCE if next(model.parameters()).dtype.itemsize >= 4 else COARSE
    rows = weights.embedding.shape[0]
    tokens = (torch.arange(1, TOKENS + 1) * rows // (TOKENS + 2)).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            truth = model(input_ids=tokens.to(weights.embedding.device), use_cache=False).logits[0].float()
            guess = forward(weights, tokens[0].to(weights.embedding.device))
    finally:
        model.train(was_training)
    error = float((guess - truth).abs().max() / truth.abs().max().clamp_min(1e-12))
    if not error <= tolerance:
        raise CertificateError(
            f"the model does not compute what Llama computes from the same tensors: logits differ by {error:.1e}",
            where=type(model).__name__,
            hint="it scales, caps or normalises somewhere; GGUF's `llama` and `deci` can't hold it",
        )
    return error


def forward(weights: Weights, tokens: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] in float32 of one sequence of token ids [tokens]."""
    x = weights.embedding[tokens].float()
    dim = weights.head_dim
    frequency = weights.rope.base ** (-torch.arange(0, dim, 2, device=x.device).float() / dim)
    if weights.rope.divisors is not None:
        frequency = frequency / weights.rope.divisors.to(x.device)
    angle = torch.arange(len(tokens), device=x.device).float()[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)
    for block in weights.blocks:
        if block.q is not None:
            x = x + _attention(block, _norm(x, block.attn_norm, weights), turn, dim)
        if block.gate is not None:
            h = _norm(x, block.ffn_norm, weights)
            gate = F.silu(_linear(h, block.gate, block.gate_bias))
            x = x + _linear(gate * _linear(h, block.up, block.up_bias), block.down, block.down_bias)
    head = weights.embedding if weights.head is None else weights.head
    return _linear(_norm(x, weights.final_norm, weights), head, None)


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.float(), None if bias is None else bias.float())  # type: ignore[union-attr]


def _norm(x: Tensor, weight: Tensor | None, weights: Weights) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + weights.config.rms_norm_eps)
    return x * scale * weight.float()  # type: ignore[union-attr]


def _attention(block: BlockWeights, h: Tensor, turn: Tensor, dim: int) -> Tensor:
    """Causal attention of h [tokens, hidden] with rotation `turn` [tokens, dim/2], complex."""

    def rotated(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        halves = _linear(h, weight, bias).view(len(h), -1, 2, dim // 2)
        out = torch.complex(halves[:, :, 0], halves[:, :, 1]) * turn[:, None]
        return torch.cat((out.real, out.imag), -1).transpose(0, 1)

    q, k = rotated(block.q, block.q_bias), rotated(block.k, block.k_bias)
    v = _linear(h, block.v, block.v_bias).view(len(h), -1, dim).transpose(0, 1)
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    return _linear(out.transpose(0, 1).reshape(len(h), -1), block.o, block.o_bias)
