"""Second moments of what enters linear maps: XᵀX over the text, for all maps in one forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from lamina.core.errors import UnsupportedError
from lamina.core.scores import Scores

if TYPE_CHECKING:
    from lamina.core.sites import Site
    from lamina.lab.lab import Lab
    from lamina.lab.taps import Taps


class InputMoments:
    """Of each map Σ x xᵀ [inputs, inputs] and Σ |x| [inputs], float64; maps with the same input share the sums."""

    wants: ClassVar[frozenset[str]] = frozenset({"linears"})

    def __init__(self, sites: Iterable[str]) -> None:
        self.sites = frozenset(sites)
        self.second: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.home: dict[str, str] = {}
        """Site → the site whose sums are its own too."""
        self._last: tuple[str, Tensor] | None = None

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one map on one batch."""
        if site.id not in self.sites:
            return
        x = taps.entering
        if self._last is not None and self._shared(site.id, x):
            return
        self._last = site.id, x
        y = x.float()
        self.second[site.id] = self.second.get(site.id, 0) + (y.T @ y).double()
        self.first[site.id] = self.first.get(site.id, 0) + y.abs().sum(0).double()
        self.tokens[site.id] = self.tokens.get(site.id, 0) + len(x)

    def _shared(self, site: str, x: Tensor) -> bool:
        """Whether the map sees what the one before saw; what it did in the first batch it must do in all."""
        assert self._last is not None
        known, seen = self._last
        same = seen.shape == x.shape and torch.equal(seen, x)
        if site in self.home and not (same and self.home[site] == known):
            raise UnsupportedError("its input is another map's in one batch and not in the next", where=site)
        if same and site not in self.second:
            self.home[site] = known
        return site in self.home

    def merge(self, other: Self) -> Self:
        """The sums of both parts."""
        both = type(self)(self.sites | other.sites)
        both.home = {**self.home, **other.home}
        for name in ("second", "first", "tokens"):
            mine, theirs = getattr(self, name), getattr(other, name)
            keys = {**mine, **theirs}
            setattr(both, name, {k: mine.get(k, 0) + theirs.get(k, 0) for k in keys})
        return both

    def of(self, site: str) -> tuple[Tensor, Tensor, int]:
        """Σ x xᵀ, Σ |x| and the number of tokens. Raises UnsupportedError where the input was not seen."""
        home = self.home.get(site, site)
        if home not in self.second:
            raise UnsupportedError("no forward showed its input", where=site)
        return self.second[home], self.first[home], self.tokens[home]

    def knows(self, site: str) -> bool:
        """Whether the input of a map was seen."""
        return self.home.get(site, site) in self.second

    def scores(self) -> Scores:
        """A tally's table; these sums score nothing."""
        return Scores.none("input-moments", "sums for rewrites, no scores")


def input_moments(lab: Lab, sites: Iterable[str]) -> InputMoments:
    """One forward over the lab's text."""
    tally = InputMoments(sites)
    lab.stream([tally], "inputs", score=False)
    return tally
