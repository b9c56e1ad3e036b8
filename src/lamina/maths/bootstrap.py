"""Bootstrap intervals over independent sequences or rounds, deterministic for a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]
CELLS = 4_000_000
"""Resampling weights held at once."""


def ratio_interval(
    sums: ArrayLike, counts: ArrayLike, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval | None:
    """Interval of Σsums / Σcounts over sequences that are drawn whole: `sums` and `counts` have shape [sequences].

    BCa (bias-corrected and accelerated; Efron 1987, "Better bootstrap confidence intervals"), with the percentile
    interval where its correction is not defined. For a paired difference give the sums' difference. None for fewer
    than two sequences.
    """
    s, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if s.shape != n.shape or s.ndim != 1:
        raise ValueError(f"sums {s.shape} and counts {n.shape} must be one number per sequence")
    if len(s) < 2 or n.sum() <= 0:
        return None

    def draw(weights: Array) -> Array:
        below = weights @ n
        return np.divide(weights @ s, below, out=np.full(len(below), np.nan), where=below > 0)

    drawn = _resample(draw, len(s), seed, resamples)
    rest = n.sum() - n
    left_out = np.divide(s.sum() - s, rest, out=np.full(len(s), np.nan), where=rest > 0)
    return bca(drawn[np.isfinite(drawn)], float(s.sum() / n.sum()), left_out[np.isfinite(left_out)], level)


def median_interval(values: ArrayLike, *, seed: int, resamples: int = 2000, level: float = 0.95) -> Interval | None:
    """Percentile interval of the median of `values` [rounds]; None for fewer than two."""
    v = np.asarray(values, dtype=np.float64)
    if len(v) < 2:
        return None
    drawn = np.median(v[np.random.default_rng(seed).integers(0, len(v), (resamples, len(v)))], axis=1)
    return _quantiles(drawn, (1 - level) / 2, (1 + level) / 2)


def bca(drawn: Array, estimate: float, left_out: Array, level: float) -> Interval:
    """The BCa interval from resampled values, the estimate and its values with one sequence left out."""
    from scipy.special import ndtr, ndtri

    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    below = (np.sum(drawn < estimate) + 0.5 * np.sum(drawn == estimate)) / len(drawn)
    away = left_out.mean() - left_out
    spread = np.sum(away**2)
    if 0 < below < 1 and spread > 0:
        bias = ndtri(below)
        acceleration = np.sum(away**3) / (6 * spread**1.5)
        shifted = bias + ndtri(tails)
        if np.all(1 - acceleration * shifted > 0):
            tails = ndtr(bias + shifted / (1 - acceleration * shifted))
    return _quantiles(drawn, *tails)


def _resample(draw: Callable[[Array], Array], size: int, seed: int, resamples: int) -> Array:
    """`draw` on multinomial weights [resamples, size], in parts of bounded size."""
    generator = np.random.default_rng(seed)
    even = np.full(size, 1 / size)
    part = max(1, CELLS // size)
    parts = [min(part, resamples - start) for start in range(0, resamples, part)]
    return np.concatenate([draw(generator.multinomial(size, even, p).astype(np.float64)) for p in parts])


def _quantiles(drawn: Array, low: float, high: float) -> Interval:
    found = np.quantile(drawn, [low, high])
    return float(found[0]), float(found[1])
