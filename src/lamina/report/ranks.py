"""Rank statistics of scores: ranks, how sure they are, and how alike two rankings are."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
LEVEL, Z = 0.95, 1.959964
DRAWS, FEWEST = 1000, 200
ROOM = 20_000_000
"""Ranks held at once: above 20 000 sites there are fewer draws, but never below `FEWEST`."""
APART = 6.0
"""Standard errors by which a site must lie above others to be left out of their draws."""


def order(values: ArrayLike) -> NDArray[np.int64]:
    """The rank of each value, 1 = least; ties keep the order given."""
    values = np.asarray(values, dtype=np.float64)
    places = np.empty(len(values), dtype=np.int64)
    places[np.argsort(values, kind="stable")] = np.arange(1, len(values) + 1)
    return places


def midranks(values: ArrayLike) -> Array:
    """The rank of each value, 1 = least; ties share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(left: ArrayLike, right: ArrayLike) -> tuple[float, int]:
    """Spearman's rank correlation over the places where both are finite, and how many those are.

    NaN with fewer than three places, or where one side is constant.
    """
    a, b = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    n = int(both.sum())
    if n < 3:
        return math.nan, n
    x, y = (r - r.mean() for r in (midranks(a[both]), midranks(b[both])))
    size = math.sqrt(float(x @ x) * float(y @ y))
    return (float(np.clip(x @ y / size, -1, 1)) if size > 0 else math.nan), n


def interval(correlation: float, n: int) -> tuple[float, float]:
    """The 95 % interval of Spearman's correlation over n sites; NaN below four sites.

    Fisher's z with the variance (1 + r²/2) / (n - 3) of Bonett & Wright (2000). The bootstrap over sites is not
    taken: sites drawn twice are ties, which pull a rank correlation away from its value, and a thousand pairs of
    measures would cost a million correlations. At ±1, where z is infinite, the inner end is that of the nearest
    value that n ranks can have: two neighbours exchanged.
    """
    if n < 4 or not math.isfinite(correlation):
        return math.nan, math.nan
    edge = 1 - 12 / (n * (n * n - 1))
    inside = min(edge, max(-edge, correlation))
    reach = Z * math.sqrt((1 + inside**2 / 2) / (n - 3))
    low, high = math.tanh(math.atanh(inside) - reach), math.tanh(math.atanh(inside) + reach)
    return (-1.0 if correlation < -edge else low), (1.0 if correlation > edge else high)


def rank_intervals(
    values: ArrayLike, stderr: ArrayLike, *, lowest: int | None = None, draws: int = DRAWS, seed: int = 0
) -> tuple[Array, Array]:
    """The 95 % interval of each value's rank: value + stderr·N(0, 1) is drawn `draws` times and ranked.

    A value without a standard error is taken as exact in the draws, and its own interval is NaN. `lowest` asks for
    the intervals of that many least values alone, all others being NaN; of many values, those that lie six
    standard errors above them then stay out of the draws.
    """
    values, errors = np.asarray(values, dtype=np.float64), np.asarray(stderr, dtype=np.float64)
    low, high = np.full(len(values), math.nan), np.full(len(values), math.nan)
    known, noise = np.isfinite(errors), np.nan_to_num(errors, nan=0.0, posinf=0.0)
    asked = known if lowest is None else known & (order(values) <= lowest)
    if not asked.any():
        return low, high
    drawn = np.arange(len(values))
    if lowest is not None and len(values) * draws > ROOM:
        drawn = np.flatnonzero(values - APART * noise <= float(np.max((values + APART * noise)[asked])))
    found = _draw(values[drawn], noise[drawn], draws, seed)
    edge = int((1 - LEVEL) / 2 * len(found))
    found.partition((edge, len(found) - 1 - edge), axis=0)
    low[drawn], high[drawn] = found[edge], found[len(found) - 1 - edge]
    low[~asked], high[~asked] = math.nan, math.nan
    return low, high


def _draw(values: Array, noise: Array, draws: int, seed: int) -> NDArray[np.int32]:
    """The ranks of each draw: [draws, sites]."""
    draws = min(draws, max(FEWEST, ROOM // len(values)))
    source = np.random.default_rng(seed)
    found = np.empty((draws, len(values)), dtype=np.int32)
    for row in found:
        row[:] = order(values + noise * source.standard_normal(len(values)))
    return found
