"""How a sparsity is shared out over layers: rules that give each its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from lamina.core.errors import InputError

CEILING = 0.99
"""No layer is pruned beyond this share by rules with a spread, unless all are to be sparser on average."""


def uniform(shapes: Mapping[str, Sequence[int]], density: float, dense: Collection[str] = ()) -> dict[str, float]:
    """Site → sparsity, the same for all but those that stay `dense`; the weights' mean density is `density`."""
    return _scaled(shapes, density, dense, lambda shape: 1.0)


def er(shapes: Mapping[str, Sequence[int]], density: float, dense: Collection[str] = ()) -> dict[str, float]:
    """Site → sparsity by Erdős-Rényi: densities go with (outputs + inputs) / (outputs · inputs), at most 1.

    `shapes` are [outputs, inputs, …]. The weights' mean density is `density` exactly; those of `dense` stay whole.
    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity" (2018). Raises
    InputError where what stays dense is more than may be kept.
    """
    return _scaled(shapes, density, dense, lambda shape: sum(shape[:2]) / math.prod(shape[:2]))


def erk(
    shapes: Mapping[str, Sequence[int]], density: float, dense: Collection[str] = (), *, power: float = 1.0
) -> dict[str, float]:
    """As `er` with all dimensions of a kernel: densities go with (Σ shape / Π shape) to the `power`.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners" (2020). For matrices, with the power 1, it is `er`.
    """
    return _scaled(shapes, density, dense, lambda shape: (sum(shape) / math.prod(shape)) ** power)


def _scaled(
    shapes: Mapping[str, Sequence[int]],
    density: float,
    dense: Collection[str],
    rule: Callable[[Sequence[int]], float],
) -> dict[str, float]:
    """Densities ε · rule(shape), with ε by the mean; where one would be above 1, it is 1 and ε is found anew."""
    sizes, raw = _sizes(shapes, density), {site: rule(shape) for site, shape in shapes.items()}
    whole = set(dense)
    while free := [s for s in shapes if s not in whole]:
        kept = density * sum(sizes.values()) - sum(sizes[s] for s in shapes if s in whole)
        if kept <= 0:
            _refuse(density)
        scale = kept / sum(raw[s] * sizes[s] for s in free)
        most = max(raw[s] for s in free)
        if scale * most <= 1:
            return {s: 0.0 if s in whole else 1 - scale * raw[s] for s in shapes}
        whole |= {s for s in free if raw[s] == most}
    if density < 1 and shapes:
        _refuse(density)
    return dict.fromkeys(shapes, 0.0)


def _sizes(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, int]:
    if not 0 < density <= 1:
        raise InputError(f"a density lies above 0 and is at most 1, not {density:g}")
    return {site: math.prod(shape) for site, shape in shapes.items()}


def _refuse(density: float) -> None:
    what = f"no density of {density:g} with so much that stays whole"
    raise InputError(what, hint="keep more, or protect less")


def owl(
    outliers: Mapping[str, float], sparsity: float, spread: float = 0.08, sizes: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Site → sparsity by outliers: those with the most are pruned 2 · `spread` less than those with the fewest.

    With r = 2 · spread · (D - min D) / (max D - min D) the sparsity is S + mean(r) - r, S their mean; the mean is
    weighted by `sizes` (none: all alike). Where all D are equal, all get S. A value outside [0, 0.99] is held there and
    the others move together, so that the mean stays. "Outlier Weighed Layerwise Sparsity" (arXiv 2310.05175).
    """
    if not 0 <= sparsity < 1:
        raise InputError(f"a sparsity is at least 0 and below 1, not {sparsity:g}")
    if spread < 0:
        raise InputError(f"a spread is not below 0, not {spread:g}")
    if not outliers:
        return {}
    d = np.array([outliers[s] for s in outliers], dtype=np.float64)
    share = np.array([1.0 if sizes is None else sizes[s] for s in outliers], dtype=np.float64)
    share /= share.sum()
    range_ = d.max() - d.min()
    r = 2 * spread * (d - d.min()) / range_ if range_ > 0 else np.zeros_like(d)
    values = sparsity + share @ r - r
    most = max(CEILING, (1 + sparsity) / 2)
    low, high = -2.0 - 2 * spread, 2.0 + 2 * spread
    if values.min() < 0 or values.max() > most:
        for _ in range(100):
            middle = (low + high) / 2
            under = share @ np.clip(values + middle, 0, most) < sparsity
            low, high = (middle, high) if under else (low, middle)
        values = np.clip(values + high, 0, most)
    return dict(zip(outliers, map(float, values), strict=True))


def pq(
    indices: Mapping[str, float],
    sizes: Mapping[str, int],
    *,
    p: float = 0.5,
    q: float = 1.0,
    eta: float = 0.0,
    gamma: float = 1.0,
    most: float = 0.9,
) -> dict[str, float]:
    """Site → sparsity by the PQ index I of its d weights: as many go as the index says can go at no loss.

    m = ⌈d (1 + `eta`)^(q/(p-q)) (1 - I)^(pq/(q-p))⌉ weights must stay; ⌊min(`gamma` (d - m), `most` d)⌋ go. The
    indices decide, and no budget. I is 1 minus the score of the measure pq-index with the same p and q. "Pruning Deep
    Neural Networks from a Sparsity Perspective" (arXiv 2302.05601).
    """
    if not 0 < p < q:
        raise InputError(f"p and q must be 0 < p < q, not p = {p:g}, q = {q:g}")
    found = {}
    for site, index in indices.items():
        d = sizes[site]
        must = math.ceil(d * (1 + eta) ** (q / (p - q)) * (1 - index) ** (p * q / (q - p)))
        found[site] = math.floor(min(max(gamma * (d - must), 0.0), most * d)) / d
    return found
