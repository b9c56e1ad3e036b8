"""Ridge maps against plain least squares and against refitting for every group that is held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError
from lamina.lab.sample import Sampled
from lamina.maths.maps import INTERCEPT, Ridge, cross_maps, groups


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refitted(x: Tensor, y: Tensor, train: Tensor, at: Tensor, penalty: float) -> Tensor:
    """Predictions at the rows `at` of a ridge regression on the rows `train`, by the normal equations in features."""
    x = x - x.median(0).values
    wide = torch.cat([x, torch.full((len(x), 1), INTERCEPT**0.5 * penalty**0.5, dtype=x.dtype)], 1)
    inner = wide[train].T @ wide[train] + penalty * torch.eye(wide.shape[1], dtype=x.dtype)
    return wide[at] @ torch.linalg.solve(inner, wide[train].T @ y[train])


@pytest.mark.parametrize(("rows", "width"), [(20, 6), (9, 30)])
def test_held_out_is_a_refit_for_every_owner(rows: int, width: int) -> None:
    x, y = drawn(0, rows, width) + 3, drawn(1, rows, 4) - 1
    owners = np.array([3, 1, 1, 0, 0, 0, 2, 2, 3] + [5] * (rows - 9))
    ridge = Ridge(x, 0.02)
    got = ridge.held_out(y, owners)
    everything = torch.arange(rows)
    for owner in np.unique(owners):
        out = torch.from_numpy(owners == owner)
        wanted = y[out] - refitted(x, y, everything[~out], everything[out], ridge.penalty)
        torch.testing.assert_close(got[out], wanted, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(
        ridge.fitted(y), y - refitted(x, y, everything, everything, ridge.penalty), rtol=1e-7, atol=1e-8
    )


def test_a_small_ridge_is_the_affine_map_of_least_squares() -> None:
    x, y = drawn(2, 40, 5) - 2, drawn(3, 40, 3) + 7
    ones = torch.cat([x, torch.ones(40, 1, dtype=x.dtype)], 1)
    wanted = y - ones @ (torch.linalg.pinv(ones) @ y)
    torch.testing.assert_close(Ridge(x, 1e-9).fitted(y), wanted, rtol=1e-5, atol=1e-5)


def test_an_affine_image_is_read_off_from_other_rows() -> None:
    x = drawn(4, 30, 5)
    y = x @ drawn(5, 5, 4) + 10
    left = Ridge(x, 1e-9).held_out(y, np.arange(30) // 3)
    assert float((left**2).sum() / ((y - y.mean(0)) ** 2).sum()) < 1e-8
    noise = drawn(6, 30, 4)
    left = Ridge(x, 1e-9).held_out(noise, np.arange(30) // 3)
    assert float((left**2).sum() / ((noise - noise.mean(0)) ** 2).sum()) > 0.9


def test_a_row_of_huge_norm_does_not_set_the_penalty_and_rows_given_twice_do_not_count() -> None:
    x = drawn(7, 20, 4)
    loud = torch.cat([x, 1e4 * x[:1]])
    once = Ridge(x, 0.01)
    assert Ridge(loud, 0.01).penalty == pytest.approx(once.penalty, rel=0.3)
    y, owners = drawn(8, 20, 2), np.arange(20)
    twice = Ridge(x.repeat(2, 1), 0.01)
    assert twice.penalty == pytest.approx(2 * once.penalty)
    torch.testing.assert_close(
        twice.held_out(y.repeat(2, 1), np.tile(owners, 2))[:20], once.held_out(y, owners), rtol=1e-4, atol=1e-4
    )


def test_rows_that_do_not_vary_and_a_single_owner() -> None:
    y = drawn(9, 6, 2)
    left = Ridge(torch.ones(6, 3), 0.1).held_out(y, np.arange(6))
    torch.testing.assert_close(left, (y - y.mean(0)) * 6 / 5, rtol=1e-3, atol=1e-3)  # the others' mean
    x = drawn(10, 6, 3)
    torch.testing.assert_close(Ridge(x, 0.1).held_out(y, np.zeros(6)), y, rtol=1e-6, atol=1e-6)  # nothing to learn from


def test_groups_of_equal_size_come_together() -> None:
    found = groups(np.array([7, 7, 2, 9, 9, 4]))
    assert [g.tolist() for g in found] == [[[2], [5]], [[0, 1], [3, 4]]]


def sample(states: Tensor, ids: Tensor | None = None) -> Sampled:
    count = states.shape[1]
    blocks = tuple(f"block.{i}" for i in range(len(states) - 1))
    return Sampled(blocks, states, np.arange(count) // 4, np.arange(count) % 4, ids, None)


def test_maps_across_models_find_the_layer_that_holds_the_same() -> None:
    """The deep model has each layer of the shallow one twice, turned: the best depths lie on a diagonal."""
    shallow = torch.stack([drawn(20 + i, 48, 4) for i in range(3)])
    deep = torch.stack([shallow[i // 2] @ drawn(30 + i, 4, 6) + i for i in range(6)])
    grid = cross_maps(sample(shallow), sample(deep), ridge=1e-8)
    assert grid.rows == ("input", "block.0", "block.1")
    assert grid.columns == ("input", *(f"block.{i}" for i in range(5)))
    assert grid.values.argmin(0).tolist() == [0, 0, 1, 1, 2, 2]
    assert grid.values.min(0).max() < 1e-6
    others = [grid.values[i, j] for i in range(3) for j in range(6) if i != j // 2]
    assert min(others) > 0.7
    wide = deep[3] - deep[3].mean(0)
    left = Ridge(shallow[0], 1e-8).held_out(deep[3], sample(shallow).owner)
    assert grid.values[0, 3] == pytest.approx(float((left**2).sum() / (wide**2).sum()))


def test_maps_across_models_want_the_same_tokens() -> None:
    states, ids = drawn(40, 2, 8, 3), torch.arange(8)
    with pytest.raises(InputError, match="other tokens"):
        cross_maps(sample(states), sample(states[:, :4]))
    with pytest.raises(InputError, match="other tokens"):
        cross_maps(sample(states, ids), sample(states, ids + 1))
    assert cross_maps(sample(states, ids), sample(states)).values.shape == (2, 2)
