"""Similarity of two representations of the same rows: CKA, CCA, Procrustes; float64, symmetric in both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RANK = 1e-10
"""Directions with less than this share of the largest energy are rounding."""
FEW, SPARE, ITERATIONS = 64, 8, 12
"""Rows per component from which on components are found by iteration; more directions than asked for; and steps."""


def gram(x: Tensor, *, debiased: bool = False) -> Tensor:
    """Centred inner products of the rows of x [n, d], float64 [n, n].

    `debiased` centres for the unbiased estimate of HSIC instead (Székely and Rizzo, 2014; four rows at least).
    """
    x = x.double()
    k = (x - x.mean(0)) @ (x - x.mean(0)).T
    if not debiased:
        return k
    n = len(k)
    if n < 4:
        raise ValueError(f"the unbiased estimate needs four rows, not {n}")
    k.fill_diagonal_(0.0)
    means = k.sum(0) / (n - 2)
    means = means - means.sum() / (2 * (n - 1))
    return (k - means.unsqueeze(0) - means.unsqueeze(1)).fill_diagonal_(0.0)


def cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """Linear CKA of x [n, a] and y [n, b] (Kornblith et al., 2019): 0 where either does not vary."""
    return float(cka_map([x, y], debiased=debiased)[0, 1])


def cka_map(states: Sequence[Tensor] | Tensor, *, debiased: bool = False) -> Tensor:
    """Linear CKA of all pairs of L representations [n, d]: [L, L]."""
    grams = torch.stack([gram(s, debiased=debiased).flatten() for s in states])
    norms = grams.norm(dim=1)
    return (grams / norms.clamp_min(1e-300).unsqueeze(1)) @ (grams / norms.clamp_min(1e-300).unsqueeze(1)).T


def principal(x: Tensor, components: int | None = None) -> tuple[Tensor, Tensor]:
    """Left singular vectors [n, p] and values [p], descending, of the centred rows of x [n, d]; at most `components`.

    Directions without energy are left out, so that p may be smaller, also zero. The sign of a direction is that which
    makes its largest entry positive. A few components of many rows are found by subspace iteration.
    """
    k = gram(x)
    few = components is not None and FEW * components <= len(k)
    values, vectors = _leading(k, components) if few and components else torch.linalg.eigh(k)
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    real = values > (RANK * values[0]).clamp_min(1e-300)
    vectors = vectors[:, real]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign(), values[real].sqrt()


def _leading(k: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of k, ascending, and their vectors (Halko, Martinsson and Tropp, 2011, algorithm 4.4)."""
    start = torch.randn(len(k), components + SPARE, dtype=k.dtype, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(k @ basis).Q
    values, inside = torch.linalg.eigh(basis.T @ k @ basis)
    return values, basis @ inside


def cca(x: Tensor, y: Tensor, components: int | None = None) -> Tensor:
    """Canonical correlations of x [n, a] and y [n, b], descending, [min of both ranks].

    All are 1 where the ranks add up to n or more: `components` principal directions of each are compared then.
    """
    u, v = principal(x, components)[0], principal(y, components)[0]
    return torch.linalg.svdvals(u.T @ v).clamp(0.0, 1.0)


def procrustes(x: Tensor, y: Tensor, components: int | None = None) -> float:
    """Orthogonal Procrustes distance of x [n, a] and y [n, b], each centred and of Frobenius norm 1: in [0, 2].

    ‖A‖² + ‖B‖² - 2‖AᵀB‖ (nuclear norm), on `components` principal directions of each; 0 where one is the other turned.
    """
    a, b = (_scaled(*principal(z, components)) for z in (x, y))
    return float(((a * a).sum() + (b * b).sum() - 2 * torch.linalg.svdvals(a.T @ b).sum()).clamp_min(0.0))


def depth_maps(states: Tensor, components: int, *, debiased: bool = False) -> dict[str, Tensor]:
    """Maps [L, L] of states [L, n, d]: "cka", mean squared canonical correlation "cca", and "procrustes".

    The latter two compare at most `components` principal directions of each.
    """
    bases = [principal(s, components) for s in states]
    ranks = torch.tensor([b.shape[1] for b, _ in bases])
    plain = torch.stack([_wide(b, components) for b, _ in bases])
    scaled = torch.stack([_wide(_scaled(*b), components) for b in bases])
    squares = (_products(plain) ** 2).sum((2, 3))
    least = torch.minimum(ranks.unsqueeze(0), ranks.unsqueeze(1))
    nuclear = torch.linalg.svdvals(_products(scaled)).sum(-1)
    sizes = (scaled**2).sum((1, 2))
    return {
        "cka": cka_map(states, debiased=debiased),
        "cca": (squares / least.clamp_min(1)).clamp(0.0, 1.0),
        "procrustes": (sizes.unsqueeze(0) + sizes.unsqueeze(1) - nuclear - nuclear.T).clamp_min(0.0),
    }


def _products(bases: Tensor) -> Tensor:
    """AᵀB of all pairs of [L, n, p]: [L, L, p, p]."""
    count, _, width = bases.shape
    flat = bases.movedim(0, 1).flatten(1)
    return (flat.T @ flat).view(count, width, count, width).transpose(1, 2)


def _wide(basis: Tensor, width: int) -> Tensor:
    """Columns of zeros added up to `width`."""
    return torch.nn.functional.pad(basis, (0, width - basis.shape[1]))


def _scaled(basis: Tensor, values: Tensor) -> Tensor:
    """The representation in its principal directions, of Frobenius norm 1."""
    return basis * (values / values.norm().clamp_min(1e-300))
