"""Geometric structure of layer updates (arXiv 2604.02459): local maps of tokens, fitted one token at a time."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.papers.representation.geometry import nearest, tokenwise
from lamina.testing.models import text, tiny


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def local_map(x: Tensor, d: Tensor, i: int, k: int, rank: int, ridge: float) -> Tensor:
    """t_i, from a fit to the k nearest others alone: the diagonal channel by channel, then the low-rank rest."""
    angles = [(float(x[i] @ x[j] / (x[i].norm() * x[j].norm())), -j) for j in range(len(x)) if j != i]
    near = [-j for _, j in sorted(angles, reverse=True)[:k]]
    a, b = x[near], d[near]
    penalty = ridge * float((a * a).sum(0).mean())
    diagonal = torch.stack([(a[:, c] @ b[:, c]) / (a[:, c] @ a[:, c] + penalty) for c in range(x.shape[1])])
    found = diagonal * x[i]
    if rank:
        directions = torch.linalg.svd(a, full_matrices=False).Vh[:rank].T
        z, rest = a @ directions, b - diagonal * a
        found = found + (x[i] @ directions) @ torch.linalg.solve(
            z.T @ z + penalty * torch.eye(z.shape[1], dtype=x.dtype), z.T @ rest
        )
    return found


@pytest.mark.parametrize("rank", [0, 3])
def test_local_maps_are_fits_to_the_neighbours(rank: int) -> None:
    x, d = drawn(0, 14, 6), drawn(1, 14, 6)
    near = nearest(x, torch.eye(14, dtype=torch.bool), 5)
    assert near.sum(1).tolist() == [5] * 14
    got = tokenwise(x, d, near, rank, 0.1)
    for i in range(14):
        torch.testing.assert_close(got[i], local_map(x, d, i, 5, rank, 0.1), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_score_is_the_residuals_share(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), torch.arange(3, 21).view(6, 3).T  # no token twice: twins are at one angle
    pairs = literal.pairs(model, name, ids)
    got = MEASURES.make("tokenwise", {"sequences": 3, "each": 6, "neighbours": 7}).measure(Lab(model, ids))
    for n in range(4):
        x, y = (s[:, 1:].flatten(0, 1) for s in pairs[f"block.{n}"])
        norms = x.norm(dim=1, keepdim=True)  # each token at norm 1: a map is linear
        x, d = x / norms, (y - x) / norms
        t = torch.stack([local_map(x, d, i, 7, 0, 0.1) for i in range(len(x))])
        r = d - t
        share = float(((r**2).sum(1) / (d**2).sum(1)).mean())
        cosines = [float(torch.nn.functional.cosine_similarity(d, z).mean()) for z in (t, r)]
        assert got[f"block.{n}"] == pytest.approx(share, rel=1e-4)
        np.testing.assert_allclose(got.grids["update"].values[n], [share, *cosines], rtol=1e-3, atol=1e-4)


def test_a_diagonal_layer_and_with_full_rank_any_linear_layer_leave_nothing() -> None:
    x = drawn(2, 60, 5)
    near = nearest(x, torch.eye(60, dtype=torch.bool), 20)
    diagonal = x * drawn(3, 5)
    assert float((tokenwise(x, diagonal, near, 0, 1e-9) - diagonal).abs().max()) < 1e-6
    linear = x @ drawn(4, 5, 5)
    assert float((tokenwise(x, linear, near, 0, 1e-9) - linear).norm() / linear.norm()) > 0.3
    assert float((tokenwise(x, linear, near, 5, 1e-9) - linear).abs().max()) < 1e-5


def test_a_larger_class_of_maps_fits_its_neighbours_better() -> None:
    x, d = drawn(5, 20, 8), drawn(6, 20, 8)
    near = torch.ones(20, 20, dtype=torch.bool)  # each row among its own neighbours: the error of the fit
    errors = [float(((tokenwise(x, d, near, rank, 1e-9) - d) ** 2).sum()) for rank in (0, 1, 3, 8)]
    assert errors == sorted(errors, reverse=True)


def test_a_token_that_comes_again_is_a_neighbour_once_and_never_its_own() -> None:
    x = drawn(7, 6, 3)
    twice = x.repeat_interleave(2, 0)
    same = torch.arange(6).repeat_interleave(2)
    near = nearest(twice, same.unsqueeze(0) == same.unsqueeze(1), 3)
    assert not near[:, 1::2].any()
    assert torch.equal(near[::2, ::2], nearest(x, torch.eye(6, dtype=torch.bool), 3))
    assert torch.equal(near[1::2], near[::2])


def test_an_identity_block_leaves_nothing(literal: ModuleType) -> None:
    model = literal.zeroed(tiny("llama"), "llama", ["block.3"])
    got = MEASURES.make("tokenwise").measure(Lab(model, text(4, 8)))
    assert got["block.3"] == 0.0
    assert np.isfinite(got.grids["update"].values).all()


def test_few_tokens_have_few_neighbours() -> None:
    got = MEASURES.make("tokenwise", {"sequences": 1, "each": 1}).measure(Lab(tiny("llama"), text(2, 4)))
    assert all(v.tolist() == [1.0] for v in got.values.values())  # nothing to fit to


@pytest.mark.parametrize(
    "options", [{"neighbours": 0}, {"rank": -1}, {"ridge": 0.0}], ids=["neighbours", "rank", "ridge"]
)
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make("tokenwise", options)
