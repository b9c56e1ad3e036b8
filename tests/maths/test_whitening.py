"""A root of a moment, its inverse, and the spectrum that it gives a map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.maths.whitening import leading, whitened_energies, whitener


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_norms_and_spectra_are_those_of_outputs(outputs: int, inputs: int, seed: int) -> None:
    weight, x = drawn(outputs, inputs, seed=seed), drawn(inputs, 30, seed=seed + 1)
    root, inverse = whitener(x @ x.T)
    torch.testing.assert_close(root @ root.T, x @ x.T)
    torch.testing.assert_close(inverse @ root, torch.eye(inputs, dtype=torch.float64))
    assert float((weight @ root).norm()) == pytest.approx(float((weight @ x).norm()))
    literal = torch.linalg.svdvals(weight @ x)[: min(outputs, inputs)].square().flip(0)
    torch.testing.assert_close(whitened_energies(weight, x @ x.T), literal, rtol=1e-8, atol=1e-9)


def test_directions_that_no_input_has_stay_finite() -> None:
    x = drawn(5, 2)
    root, inverse = whitener(x @ x.T)
    assert float(inverse.abs().max()) < 1e6
    torch.testing.assert_close(root @ root.T, x @ x.T, rtol=0, atol=1e-7)
    for number in whitener(torch.zeros(3, 3)):
        assert bool(torch.isfinite(number).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_leading_factors_are_the_cut_whitened_decomposition(outputs: int, inputs: int, rank: int, seed: int) -> None:
    weight, x = drawn(outputs, inputs, seed=seed), drawn(inputs, 30, seed=seed + 1)
    rank = min(rank, outputs, inputs)
    first, second = leading(weight, x @ x.T, rank)
    assert first.shape == (rank, inputs)
    assert second.shape == (outputs, rank)
    root, inverse = whitener(x @ x.T)
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    literal = (u[:, :rank] * s[:rank]) @ v[:rank] @ inverse
    torch.testing.assert_close(second @ first, literal, rtol=1e-6, atol=1e-6)
    lost = float(((weight - second @ first) @ x).square().sum())
    assert lost == pytest.approx(float(s[rank:].square().sum()), abs=1e-8 * float(s[0] ** 2))


def test_leading_factors_of_a_map_that_does_nothing_are_finite() -> None:
    for weight, moment in ((torch.zeros(3, 4), torch.eye(4)), (drawn(3, 4), torch.zeros(4, 4))):
        assert all(bool(torch.isfinite(f).all()) for f in leading(weight, moment, 2))
