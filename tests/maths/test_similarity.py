"""Indices of similarity: against their definitions, and the invariances that they must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.maths.similarity import cca, cka, cka_map, depth_maps, gram, principal, procrustes

seeds = st.integers(0, 10_000)


def drawn(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def turned(seed: int, width: int) -> Tensor:
    return torch.linalg.qr(drawn(seed, (width, width))[0]).Q


def literal_cka(x: Tensor, y: Tensor) -> float:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), features centred: the form in features."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def literal_hsic(k: Tensor, m: Tensor) -> float:
    """The unbiased estimate of HSIC (Song et al., 2007, eq. 5)."""
    n, k, m = len(k), k.clone().fill_diagonal_(0), m.clone().fill_diagonal_(0)
    one = torch.ones(n, dtype=k.dtype)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((torch.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


def literal_cca(x: Tensor, y: Tensor) -> Tensor:
    """Singular values of Σxx^(-1/2) Σxy Σyy^(-1/2)."""
    x, y = x - x.mean(0), y - y.mean(0)

    def whitened(z: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(z.T @ z)
        return z @ vectors @ torch.diag(values**-0.5) @ vectors.T

    return torch.linalg.svdvals(whitened(x).T @ whitened(y))


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_values_are_those_of_the_definitions(seed: int) -> None:
    x, y = drawn(seed, (15, 4), (15, 6))
    y[:, :2] += x[:, :2]
    assert cka(x, y) == pytest.approx(literal_cka(x, y), rel=1e-9)
    unbiased = literal_hsic(x @ x.T, y @ y.T) / (literal_hsic(x @ x.T, x @ x.T) * literal_hsic(y @ y.T, y @ y.T)) ** 0.5
    assert cka(x, y, debiased=True) == pytest.approx(unbiased, rel=1e-8)
    torch.testing.assert_close(cca(x, y), literal_cca(x, y), rtol=1e-8, atol=1e-8)
    a, b = ((z - z.mean(0)) / (z - z.mean(0)).norm() for z in (x, y))
    wanted = a.norm() ** 2 + b.norm() ** 2 - 2 * torch.linalg.matrix_norm(a.T @ b, "nuc")
    assert procrustes(x, y) == pytest.approx(float(wanted), rel=1e-8)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_a_representation_is_like_itself(seed: int) -> None:
    (x,) = drawn(seed, (12, 5))
    assert cka(x, x) == pytest.approx(1)
    assert cka(x, x, debiased=True) == pytest.approx(1)
    assert cca(x, x).tolist() == pytest.approx([1] * 5)
    assert procrustes(x, x) == pytest.approx(0, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0.1, 50))
def test_cka_and_procrustes_do_not_see_turns_scales_and_shifts(seed: int, scale: float) -> None:
    x, y, shift = drawn(seed, (14, 5), (14, 7), (1, 5))
    moved = scale * x @ turned(seed + 1, 5) + shift
    assert cka(moved, y) == pytest.approx(cka(x, y), rel=1e-8)
    assert cka(moved, y, debiased=True) == pytest.approx(cka(x, y, debiased=True), rel=1e-6, abs=1e-9)
    assert procrustes(moved, y) == pytest.approx(procrustes(x, y), rel=1e-8)
    assert procrustes(moved, x) == pytest.approx(0, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_cca_sees_no_invertible_map_and_the_others_do(seed: int) -> None:
    x, y, other = drawn(seed, (20, 4), (20, 5), (4, 4))
    mapped = x @ (other + 3 * torch.eye(4, dtype=other.dtype)) @ torch.diag(torch.tensor([1.0, 4.0, 0.2, 9.0]).double())
    torch.testing.assert_close(cca(mapped, y), cca(x, y), rtol=1e-6, atol=1e-8)
    assert abs(cka(mapped, x) - 1) > 1e-3
    assert procrustes(mapped, x) > 1e-3


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_all_are_symmetric_and_bounded(seed: int) -> None:
    x, y = drawn(seed, (11, 3), (11, 6))
    assert cka(x, y) == pytest.approx(cka(y, x))
    assert 0 <= cka(x, y) <= 1 + 1e-12
    assert procrustes(x, y) == pytest.approx(procrustes(y, x))
    assert 0 <= procrustes(x, y) <= 2
    assert bool(((cca(x, y) >= 0) & (cca(x, y) <= 1)).all())


def test_cca_finds_one_where_rows_are_too_few() -> None:
    x, y = drawn(0, (10, 8), (10, 9))
    assert cca(x, y).min() == pytest.approx(1)
    assert cca(x, y, components=2).min() < 0.9


def test_principal_directions_are_those_of_an_svd() -> None:
    (x,) = drawn(1, (9, 30))
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    basis, sizes = principal(x, 4)
    torch.testing.assert_close(sizes, s[:4])
    torch.testing.assert_close((basis.T @ u[:, :4]).abs(), torch.eye(4, dtype=x.dtype), atol=1e-8, rtol=0)
    assert principal(x)[0].shape[1] == 8  # one less than the rows, as these are centred
    assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())


def test_a_few_directions_of_many_rows_are_the_same() -> None:
    """They are found by iteration."""
    x = drawn(2, (200, 20))[0] @ torch.diag(0.7 ** torch.arange(20.0).double())
    basis, sizes = principal(x, 3)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(sizes, s[:3], rtol=1e-6, atol=0)
    torch.testing.assert_close((basis.T @ u[:, :3]).abs(), torch.eye(3, dtype=x.dtype), atol=1e-4, rtol=0)
    assert torch.equal(principal(x, 3)[0], basis)


def test_what_does_not_vary_is_like_nothing() -> None:
    x, y = drawn(3, (6, 3), (6, 2))
    still = torch.ones(6, 3)
    assert principal(still)[0].shape == (6, 0)
    assert cka(still, y) == 0
    assert len(cca(still, y)) == 0
    assert procrustes(still, x) == pytest.approx(1)


@pytest.mark.parametrize("debiased", [False, True])
def test_maps_hold_what_pairs_give(debiased: bool) -> None:
    states = torch.stack(drawn(4, *[(16, 5)] * 3))
    states[2] = states[0] * 2 + 1
    found = depth_maps(states, 3, debiased=debiased)
    for i in range(3):
        for j in range(3):
            x, y = states[i], states[j]
            assert found["cka"][i, j] == pytest.approx(cka(x, y, debiased=debiased))
            assert found["cca"][i, j] == pytest.approx(float((cca(x, y, 3) ** 2).mean()))
            assert found["procrustes"][i, j] == pytest.approx(procrustes(x, y, 3), abs=1e-12)
    torch.testing.assert_close(cka_map(states, debiased=debiased), found["cka"])


def test_maps_of_fewer_directions_than_asked_for() -> None:
    states = torch.stack([torch.ones(5, 3, dtype=torch.float64), *drawn(5, (5, 3))])
    found = depth_maps(states, 8)
    assert np.isfinite(torch.stack(list(found.values())).numpy()).all()
    assert found["cca"].diagonal().tolist() == pytest.approx([0, 1])
    assert found["procrustes"][0, 1] == pytest.approx(1)


def test_the_unbiased_estimate_asks_for_four_rows() -> None:
    with pytest.raises(ValueError, match="four rows"):
        gram(torch.ones(3, 2), debiased=True)
