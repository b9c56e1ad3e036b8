"""Errors of smooth functions of sums over independent sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _none() -> NDArray[np.float64]:
    return np.zeros(())


@dataclass
class Sums:
    """Sums over sequences of vectors [d] and of their outer products: a monoid."""

    total: NDArray[np.float64] = field(default_factory=_none)
    outer: NDArray[np.float64] = field(default_factory=_none)
    sequences: int = 0

    def add(self, vectors: ArrayLike) -> None:
        """Add sequences: `vectors` [sequences, d]."""
        v = np.asarray(vectors, dtype=np.float64)
        self.total = self.total + v.sum(0)
        self.outer = self.outer + v.T @ v
        self.sequences += len(v)

    def merge(self, other: Self) -> Self:
        """The sums of both parts."""
        return type(self)(self.total + other.total, self.outer + other.outer, self.sequences + other.sequences)

    def stderr(self, gradient: ArrayLike) -> float:
        """Standard error of g(total), where `gradient` [d] is that of g at the total; NaN for fewer than two sequences.

        The delta method: the variance of the total is k/(k-1) Σ (v - v̄)(v - v̄)ᵀ over the k sequences.
        """
        k, g = self.sequences, np.asarray(gradient, dtype=np.float64)
        if k < 2:
            return math.nan
        variance = g @ self.outer @ g - (g @ self.total) ** 2 / k
        return math.sqrt(max(float(variance), 0.0) * k / (k - 1))
