"""Means over tokens with standard errors over sequences, as a monoid: parts add up in any order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass
class Mean:
    """Ratio estimator Σs / Σn of per-sequence sums s and counts n, any shape of s beyond the first axis.

    The standard error is the linearised one of a ratio over independent sequences
    (Cochran, Sampling Techniques, eq. 6.13).
    """

    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(()))
    count: float = 0.0
    square: NDArray[np.float64] = field(default_factory=lambda: np.zeros(()))
    cross: NDArray[np.float64] = field(default_factory=lambda: np.zeros(()))
    count_square: float = 0.0
    sequences: int = 0

    def add(self, sums: ArrayLike, counts: ArrayLike) -> None:
        """Add sequences: `sums` [sequences, …], `counts` [sequences]."""
        s, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
        shaped = n.reshape(-1, *([1] * (s.ndim - 1)))
        self.total = self.total + s.sum(0)
        self.square = self.square + (s * s).sum(0)
        self.cross = self.cross + (s * shaped).sum(0)
        self.count += float(n.sum())
        self.count_square += float((n * n).sum())
        self.sequences += len(n)

    def merge(self, other: Self) -> Self:
        """The mean of both parts."""
        return type(self)(
            self.total + other.total,
            self.count + other.count,
            self.square + other.square,
            self.cross + other.cross,
            self.count_square + other.count_square,
            self.sequences + other.sequences,
        )

    @property
    def value(self) -> NDArray[np.float64]:
        """Σs / Σn."""
        return self.total / self.count if self.count else np.full_like(self.total, math.nan)

    @property
    def stderr(self) -> NDArray[np.float64]:
        """Standard error over sequences; NaN for fewer than two."""
        k = self.sequences
        if k < 2 or not self.count:
            return np.full_like(self.total, math.nan)
        r = self.value
        spread = np.maximum(self.square - 2 * r * self.cross + r * r * self.count_square, 0.0)
        return np.sqrt(spread * k / (k - 1)) / self.count
