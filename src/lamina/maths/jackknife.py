"""Standard errors of what is no mean: the jackknife over groups of independent sequences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
GROUPS = 16
"""At most so many values are computed with a group left out."""


def jackknife(
    statistic: Callable[[NDArray[np.bool_]], ArrayLike], owners: ArrayLike, groups: int = GROUPS
) -> tuple[Array, Array]:
    """Value and standard error of a statistic of rows that belong to sequences.

    `statistic` takes a mask [rows] and gives an array; `owners` [rows] names each row's sequence. Sequences are dealt
    out to at most `groups` groups, and the error is that of the delete-a-group jackknife (Shao and Tu, The Jackknife
    and Bootstrap, 1995, section 5.1.2). NaN where there is one sequence.
    """
    owner = np.unique(np.asarray(owners), return_inverse=True)[1]
    whole = np.asarray(statistic(np.ones(len(owner), dtype=bool)), dtype=np.float64)
    count = min(groups, int(owner.max()) + 1 if len(owner) else 0)
    if count < 2:
        return whole, np.full_like(whole, math.nan)
    left = np.stack([np.asarray(statistic(owner % count != g), dtype=np.float64) for g in range(count)])
    return whole, spread(left)


def spread(left_out: ArrayLike) -> Array:
    """The jackknife's standard error from the values [groups, …] with each group left out."""
    left = np.asarray(left_out, dtype=np.float64)
    if len(left) < 2:
        return np.full(left.shape[1:], math.nan)
    return np.sqrt((len(left) - 1) / len(left) * ((left - left.mean(0)) ** 2).sum(0))
