"""Scores: what a measure says of each site, higher = keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lamina.core.sites import Site, depth_key

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One measure's table.

    `values[site]` has shape `[width]`, float64, higher = keep; `stderr[site]` is its standard error over
    sequences (NaN where it is not defined). `unit` is `nats` where the score is an expected rise of the
    loss. `spans[site][n-1]`, where a measure gives it, scores the n contiguous blocks that begin at `site`.
    """

    measure: str
    values: Mapping[str, Array]
    stderr: Mapping[str, Array] = field(default_factory=dict[str, Array])
    unit: str = ""
    spans: Mapping[str, Array] = field(default_factory=dict[str, Array])

    def __getitem__(self, site: Site | str) -> float:
        """The score of a site of width 1, or the mean over its units."""
        return float(np.mean(self.values[site if isinstance(site, str) else site.id]))

    def __contains__(self, site: object) -> bool:
        return (site.id if isinstance(site, Site) else site) in self.values

    def ranked(self) -> list[str]:
        """Site ids, lowest score first; ties in depth order."""
        return sorted(self.values, key=lambda s: (self[s], depth_key(s)))
