"""A tally for measures that are a mean over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from lamina.core.scores import Scores
from lamina.core.sites import Kind, Site
from lamina.maths.moments import Mean

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.lab.taps import Taps


class PerToken:
    """Mean over all tokens of `score(taps)` [tokens], per site of the given kinds; errors over sequences."""

    def __init__(self, measure: str, kinds: Sequence[Kind], score: Callable[[Taps], Tensor], unit: str = "") -> None:
        self.measure, self.kinds, self.score, self.unit = measure, tuple(kinds), score, unit
        self.means: dict[str, Mean] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one site on one batch."""
        if site.kind in self.kinds:
            sums, counts = taps.per_sequence(self.score(taps))
            self.means.setdefault(site.id, Mean()).add(sums.cpu().numpy(), counts.cpu().numpy())

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(self.measure, self.kinds, self.score, self.unit)
        for key in {**self.means, **other.means}:
            both.means[key] = self.means.get(key, Mean()).merge(other.means.get(key, Mean()))
        return both

    def scores(self) -> Scores:
        """Values and standard errors so far, [1] per site."""
        return Scores(
            measure=self.measure,
            values={k: np.atleast_1d(m.value) for k, m in self.means.items()},
            stderr={k: np.atleast_1d(m.stderr) for k, m in self.means.items()},
            unit=self.unit,
        )
