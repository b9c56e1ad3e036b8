"""The bytes of blocks of 256 weights in GGUF's types with two levels.

Each function takes codes from 0 [..., 256] as bytes, whole scales and lows [..., runs], and the two bytes each of d and
dmin [..., 2].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pack = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def q2_k(codes: Tensor, scale: Tensor, low: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """Scales and lows of four bits, codes of two, d, dmin."""
    return torch.cat([(scale | low << 4).to(torch.uint8), _quarters(codes), d, dmin], -1)


def q3_k(codes: Tensor, scale: Tensor, low: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """The codes' third bits, then the others, scales of six bits, d."""
    s = scale + 32
    first, last = (s & 15).unflatten(-1, (2, 8)).unbind(-2)
    tops = _joined((s >> 4).unflatten(-1, (4, 4)), 2)
    return torch.cat([_bits(codes >> 2), _quarters(codes & 3), (first | last << 4).to(torch.uint8), tops, d], -1)


def q4_k(codes: Tensor, scale: Tensor, low: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """d, dmin, scales and lows of six bits, codes of four."""
    return torch.cat([d, dmin, _sixes(scale, low), _halves(codes, 32)], -1)


def q5_k(codes: Tensor, scale: Tensor, low: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """d, dmin, scales and lows of six bits, the codes' fifth bits, then the others."""
    return torch.cat([d, dmin, _sixes(scale, low), _bits(codes >> 4), _halves(codes & 15, 32)], -1)


def q6_k(codes: Tensor, scale: Tensor, low: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """The codes' lower four bits, then the others, scales of eight bits, d."""
    signed = scale.to(torch.int8).contiguous().view(torch.uint8)
    return torch.cat([_halves(codes & 15, 64), _quarters(codes >> 4), signed, d], -1)


def _joined(parts: Tensor, bits: int) -> Tensor:
    """Numbers [..., n, m] as m bytes: those of row i stand `bits` · i bits up."""
    places = bits * torch.arange(parts.shape[-2], device=parts.device).unsqueeze(-1)
    return (parts.int() << places).sum(-2).to(torch.uint8)


def _halves(codes: Tensor, run: int) -> Tensor:
    """Of every two runs one byte for each pair."""
    return _joined(codes.unflatten(-1, (-1, 2, run)), 4).flatten(-2)


def _quarters(codes: Tensor) -> Tensor:
    """Of every four runs of 32 one byte for each four."""
    return _joined(codes.unflatten(-1, (-1, 4, 32)), 2).flatten(-2)


def _bits(codes: Tensor) -> Tensor:
    """A bit of each run of 32, in 32 bytes."""
    return _joined(codes.unflatten(-1, (8, 32)), 1)


def _sixes(scale: Tensor, low: Tensor) -> Tensor:
    """Eight scales and eight lows of six bits in twelve bytes."""
    (a, b), (c, d) = (x.unflatten(-1, (2, 4)).unbind(-2) for x in (scale, low))
    return torch.cat([a | (b >> 4) << 6, c | (d >> 4) << 6, (b & 15) | (d & 15) << 4], -1).to(torch.uint8)


PACKS: dict[str, Pack] = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
"""GGUF's name → what packs its blocks."""
