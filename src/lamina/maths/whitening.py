"""Whitening: a root of a second moment and its inverse, by which errors of maps become errors of their outputs."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-9
"""Eigenvalues are held above this share of the largest."""


def whitener(moment: Tensor, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """S = Q √Λ and S⁻¹ = Λ^(-1/2) Qᵀ, float64 [n, n], of a moment Σ x xᵀ = Q Λ Qᵀ [n, n].

    S Sᵀ is the moment, so that ‖D S‖ = ‖D X‖ for every D [m, n]. Eigenvalues below `floor` times the largest are raised
    to that: directions that no input has can't blow up.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    roots = values.clamp_min(floor * float(values[-1].clamp_min(1e-300))).sqrt()
    return vectors * roots, (vectors / roots).T


def whitened_energies(weight: Tensor, moment: Tensor) -> Tensor:
    """Squared singular values of W S, float64 [min(outputs, inputs)] ascending, of W [outputs, inputs].

    From the smaller of W M Wᵀ and R M Rᵀ, W = O R with orthogonal columns O: no root of the moment is taken.
    """
    weight = weight.double()
    small = torch.linalg.qr(weight, mode="r").R if weight.shape[0] > weight.shape[1] else weight
    return torch.linalg.eigvalsh(small @ moment.double() @ small.T).clamp_min(0.0)


def leading(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, inputs] and B [outputs, rank], float64, of the least ‖(W - B A) S‖, S Sᵀ the moment [inputs, inputs].

    The best such product is U Uᵀ W, U the first eigenvectors of W S Sᵀ Wᵀ, whose eigenvalues are the squared singular
    values σ² of W S: no root of the moment is taken. A and B share the σ evenly.
    """
    weight = weight.double()
    basis, small = torch.linalg.qr(weight) if weight.shape[0] > weight.shape[1] else (None, weight)
    energies, vectors = torch.linalg.eigh(small @ moment.double() @ small.T)
    energies, vectors = energies.flip(0)[:rank].clamp_min(0.0), vectors.flip(1)[:, :rank]
    root = energies.clamp_min(torch.finfo(energies.dtype).eps * float(energies[0])).clamp_min(1e-300).pow(0.25)
    first = (vectors.T @ small) / root.unsqueeze(1)
    return first, (vectors if basis is None else basis @ vectors) * root
