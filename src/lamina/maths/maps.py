"""Linear maps between representations: ridge fits whose error is taken on rows that were held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lamina.core.errors import InputError
from lamina.core.scores import Grid

if TYPE_CHECKING:
    from lamina.lab.sample import Sampled

INTERCEPT = 1e6
"""How much weaker than the weights the intercept is held to zero."""


class Ridge:
    """The affine map x W + b of least ‖xW + b - y‖² + λ‖W‖², for any y: all in the rows' inner products, float64.

    λ is `ridge` times n times the median of the rows' squared distances from the channels' medians, which a few rows of
    huge norm do not move; rows given twice change nothing. The penalty on b is λ / `INTERCEPT`.
    """

    def __init__(self, x: Tensor, ridge: float) -> None:
        x = x.double()
        x = x - x.median(0).values
        kernel = x @ x.T
        self.penalty = ridge * len(kernel) * float(kernel.diagonal().median())
        self.penalty = self.penalty if self.penalty > 0 else 1.0
        kernel += INTERCEPT * self.penalty
        kernel.diagonal().add_(self.penalty)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))

    def fitted(self, y: Tensor) -> Tensor:
        """y minus what the map, fitted to all rows, makes of x: [n, outputs]."""
        return self.penalty * (self.inverse @ y.double())

    def held_out(self, y: Tensor, owners: ArrayLike) -> Tensor:
        """y minus what a map makes of x that was fitted to all rows of other owners: [n, outputs].

        Exact and without refitting: with A = (K + λI)⁻¹ the residuals of a group g of rows are (A_gg)⁻¹ (A y)_g.
        """
        weights = self.inverse @ y.double()
        out = torch.empty_like(weights)
        for rows in groups(owners):
            blocks = self.inverse[rows.unsqueeze(2), rows.unsqueeze(1)]
            out[rows] = torch.linalg.solve(blocks, weights[rows])
        return out


def groups(owners: ArrayLike) -> list[Tensor]:
    """The rows of each owner, those of owners with equally many together: index tensors [owners, rows]."""
    owner = np.unique(np.asarray(owners), return_inverse=True)[1]
    rows = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])
    sizes = sorted({len(r) for r in rows})
    return [torch.from_numpy(np.stack([r for r in rows if len(r) == size])) for size in sizes]


def cross_maps(one: Sampled, other: Sampled, ridge: float = 0.002) -> Grid:
    """Relative errors of the best affine map from every depth of `one` model to every depth of the `other`.

    Both samples hold the same tokens; sequences are held out in turn. A cell is Σ‖h W + b - h'‖² / Σ‖h' - mean h'‖²:
    0 where the map is exact, 1 where it knows no more than the mean. "Do Language Models Use Their Depth
    Efficiently?" (arXiv 2505.13898), where `one` is the shallower model: a diagonal means the same computation, spread
    out. Raises InputError where the tokens differ.
    """
    same = np.array_equal(one.owner, other.owner) and np.array_equal(one.position, other.position)
    if one.ids is not None and other.ids is not None:
        same = same and torch.equal(one.ids, other.ids)
    if not same:
        raise InputError(
            "the two samples hold other tokens", hint="sample both models on the same ids, as much of each"
        )
    wanted = other.states.double()
    spread = ((wanted - wanted.mean(1, keepdim=True)) ** 2).sum((1, 2)).clamp_min(1e-300)
    flat = wanted.movedim(1, 0).flatten(1)
    rows = []
    for states in one.states:
        left = Ridge(states, ridge).held_out(flat, one.owner)
        rows.append((left**2).unflatten(1, (len(wanted), -1)).sum((0, 2)) / spread)
    return Grid(values=torch.stack(rows).numpy(), rows=("input", *one.blocks), columns=("input", *other.blocks))
