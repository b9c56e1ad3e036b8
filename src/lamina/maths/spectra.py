"""Spectra of matrices: singular values, and how many of them count."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a matrix [rows, columns], descending, float64 [min(rows, columns)].

    From the smaller Gram matrix in float64: values below 1e-8 of the largest are rounding.
    """
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0.0).sqrt().flip(0)


def effective_rank(energies: Tensor) -> float:
    """exp(-Σ p ln p) with p = energies / Σ energies, of non-negative numbers; 0 where all are zero.

    With the squares of singular values: Roy and Vetterli, "The effective rank", 2007, in its form for energies.
    """
    energies = energies.double().clamp_min(0.0)
    total = energies.sum()
    if not total > 0:
        return 0.0
    return float(torch.special.entr(energies / total).sum().exp())
