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


def effective_rank_of(moment: Tensor) -> tuple[float, Tensor]:
    """The effective rank of the energies that are a moment's eigenvalues, and its gradient: [n, n] float64 both.

    With p the shares of the eigenvalues and H = -Σ p ln p the gradient is exp(H) · U diag(-ln p - H) Uᵀ / trace.
    Directions without energy have the gradient zero: what the sum holds has none of them.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(0.0)
    total = values.sum()
    if not total > 0:
        return 0.0, torch.zeros_like(moment, dtype=torch.float64)
    shares = values / total
    entropy = torch.special.entr(shares).sum()
    some = shares > 1e-15
    slopes = torch.where(some, -shares.clamp_min(1e-300).log() - entropy, 0.0) * entropy.exp() / total
    return float(entropy.exp()), (vectors * slopes) @ vectors.T
