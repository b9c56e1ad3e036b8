"""Affine maps fitted by ridge, also with groups of rows held out in turn; float64."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

FREE = 1e3
"""The penalty on the intercept is ridge / FREE times that on a weight of rows of typical size: next to none."""


def affine(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """W [a, b] and c [b] of the map x W + c of least ‖x W + c - y‖² + λ‖W‖², of rows x [n, a] and y [n, b].

    λ is `ridge` times the median squared distance of the rows of x from their channels' medians: a few rows of huge
    norm do not move it.
    """
    centre = _centre(x)
    rows = x.double() - centre
    kernel, intercept = _kernel(rows, ridge)
    weights = torch.linalg.solve(kernel, y.double())
    w = rows.T @ weights
    return w, intercept * weights.sum(0) - centre @ w


def held_out(x: Tensor, y: Tensor, owners: ArrayLike, ridge: float) -> Tensor:
    """What such maps, each fitted to the rows of all other owners, make of every row of x: [n, b].

    λ is that of all rows. Exact, and without refitting: with A the kernel's inverse, y minus the answer is
    (A_gg)⁻¹ (A y)_g for the rows g of an owner. Where all rows have one owner there is nothing to fit: zeros.
    """
    kernel, _ = _kernel(x.double() - _centre(x), ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
    owner = np.unique(np.asarray(owners), return_inverse=True)[1]
    y = y.double()
    if not len(owner) or not owner.any():
        return torch.zeros_like(y)
    weights, found = inverse @ y, torch.empty_like(y)
    for group in range(int(owner.max()) + 1):
        rows = torch.from_numpy(np.flatnonzero(owner == group)).to(y.device)
        found[rows] = y[rows] - torch.linalg.solve(inverse[rows][:, rows], weights[rows])
    return found


def _centre(x: Tensor) -> Tensor:
    return x.double().median(0).values


def _kernel(rows: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Inner products of rows that have one more entry, the intercept's, plus λ on the diagonal; that entry's square."""
    kernel = rows @ rows.T
    typical = float(kernel.diagonal().median()) or 1.0
    kernel += FREE * typical
    kernel.diagonal().add_(ridge * typical)
    return kernel, FREE * typical
