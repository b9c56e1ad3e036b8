"""Affine maps against least squares with the penalty written out as rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lamina.maths.affine import FREE, affine, held_out


def rows(n: int = 30, a: int = 4, b: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, a, generator=generator, dtype=torch.float64) + 2.0
    return x, x @ torch.randn(a, b, generator=generator, dtype=torch.float64) + x.square()[:, :b]


def literal(x: Tensor, y: Tensor, ridge: float, size: float) -> tuple[Tensor, Tensor]:
    """Least squares on rows and penalty rows; `size` is the typical squared distance of all rows."""
    left = torch.cat([x, torch.ones(len(x), 1)], 1)
    penalty = torch.eye(x.shape[1] + 1, dtype=torch.float64) * (ridge * size) ** 0.5
    penalty[-1, -1] = (ridge / FREE) ** 0.5
    zeros = torch.zeros(len(penalty), y.shape[1], dtype=torch.float64)
    w = torch.linalg.lstsq(torch.cat([left, penalty]), torch.cat([y, zeros])).solution
    return w[:-1], w[-1]


def typical(x: Tensor) -> float:
    return float(((x - x.median(0).values) ** 2).sum(1).median())


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
def test_is_ridge_regression(ridge: float) -> None:
    x, y = rows()
    centre = x.median(0).values
    w, c = literal(x - centre, y, ridge, typical(x))
    got = affine(x, y, ridge)
    torch.testing.assert_close(got[0], w, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(got[1], c - centre @ w, rtol=1e-5, atol=1e-5)


def test_an_affine_map_is_found() -> None:
    x, _ = rows()
    w, c = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    got = affine(x.float(), (x @ w + c).float(), 1e-9)
    torch.testing.assert_close(got[0], w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], c, rtol=1e-5, atol=1e-5)


def test_zero_stays_zero() -> None:
    x, y = rows()
    w, c = affine(x, torch.zeros_like(y), 0.1)
    assert not w.any()
    assert not c.any()
    assert not held_out(x, torch.zeros_like(y), [0, 1, 2] * 10, 0.1).any()


def test_rows_of_an_owner_are_held_out() -> None:
    """Refitted without them, penalty and centre those of all rows."""
    x, y = rows()
    owners = [i % 4 for i in range(28)] + [9, 9]
    got = held_out(x, y, owners, 0.05)
    centre = x.median(0).values
    for owner in set(owners):
        mine = torch.tensor([o == owner for o in owners])
        w, c = literal(x[~mine] - centre, y[~mine], 0.05, typical(x))
        torch.testing.assert_close(got[mine], (x[mine] - centre) @ w + c, rtol=1e-6, atol=1e-8)


def test_one_owner_leaves_nothing_to_fit() -> None:
    x, y = rows()
    assert not held_out(x, y, [5] * len(x), 0.1).any()


def test_equal_rows_are_no_trouble() -> None:
    x = torch.ones(6, 4)
    w, c = affine(x, torch.full((6, 2), 3.0), 0.1)
    torch.testing.assert_close(x.double() @ w + c, torch.full((6, 2), 3.0, dtype=torch.float64), rtol=1e-2, atol=1e-2)
