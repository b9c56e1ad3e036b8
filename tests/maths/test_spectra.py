from __future__ import annotations

import math

import pytest
import torch

from lamina.maths.spectra import effective_rank, singular_values


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_singular_values_are_those_of_an_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape).to(dtype)
    got = singular_values(matrix)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.linalg.svdvals(matrix.double()), rtol=1e-7, atol=1e-7)


def test_singular_values_of_a_rank_deficient_matrix_are_no_nan() -> None:
    got = singular_values(torch.ones(4, 6))
    assert got.tolist() == pytest.approx([math.sqrt(24), 0, 0, 0], abs=1e-6)


def test_effective_rank_of_flat_single_and_uneven_spectra() -> None:
    assert effective_rank(torch.full((7,), 3.0)) == pytest.approx(7)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)
    assert effective_rank(torch.tensor([1.0, -1e-18])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0.0
