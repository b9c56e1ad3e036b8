"""First- and second-order terms of a change to what a site adds, per sequence: what `damage` and prices are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.lab.rows import ids_of, real

if TYPE_CHECKING:
    from lamina.lab.taps import Taps


def bends(
    taps: Taps, slope: Tensor, along: Tensor, chunk: int, window: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Per sequence: Σ slope, Σ over windows of tokens · mean(‖f‖/‖x‖) · √F, predicted tokens.

    In a window of n positions F = mean over probes of Σ_chunks (Σ_chunk along)² / 2n. `slope` [tokens], `along`
    [probes, tokens], float64.
    """
    lengths = torch.bincount(taps.sequence, minlength=taps.sequences)
    position = torch.arange(len(taps.sequence), device=lengths.device) - (lengths.cumsum(0) - lengths)[taps.sequence]
    windows = -(lengths // -window)
    place = (windows.cumsum(0) - windows)[taps.sequence] + position // window
    pieces = place * (window // chunk) + position % window // chunk
    total = int(windows.sum())

    def summed(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
        zero = torch.zeros(*values.shape[:-1], size, dtype=torch.float64, device=values.device)
        return zero.index_add_(-1, index, values.double())

    squares = summed(along, pieces, total * (window // chunk)).square().unflatten(-1, (total, -1)).sum(-1)
    size = summed(torch.ones_like(position, dtype=torch.float64), place, total)
    curvature = squares.mean(0) / (2 * size)
    part = torch.where(taps.ff > 0, (taps.ff.double() / taps.xx.double().clamp_min(1e-30)).sqrt(), 0.0)
    bend = summed(part, place, total) * curvature.sqrt()
    owner = torch.repeat_interleave(torch.arange(taps.sequences, device=lengths.device), windows)
    predicted = (lengths - 1).clamp_min(0).double()
    told = _predicted(taps)
    apart = torch.ones_like(predicted)
    if told is not None and bool((told != predicted).any()):  # an encoder's stream: the decoder's tokens are predicted
        predicted, apart = told, (told / lengths.clamp_min(1)).sqrt()
    rows = (
        summed(slope, taps.sequence, taps.sequences),
        summed(bend, owner, taps.sequences) * apart,
        predicted,
    )
    return tuple(r.cpu().numpy() for r in rows)  # type: ignore[return-value]


def _predicted(taps: Taps) -> Tensor | None:
    """How many tokens each sequence predicts, float64 [sequences]; None where a model reads no tokens."""
    batch = taps.rows.batch
    if ids_of(batch) is None or len(real(batch)) != taps.sequences:
        return None
    return (real(batch).sum(1) - 1).clamp_min(0).double()
