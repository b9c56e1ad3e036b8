"""Feature complexity (arXiv 2407.06076): information of linear maps on planted features."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.lab.sample import Sampled
from lamina.testing.models import text, tiny


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(*depths: Tensor) -> Sampled:
    count = len(depths[0])
    blocks = tuple(f"block.{i}" for i in range(len(depths) - 1))
    return Sampled(blocks, torch.stack(depths), np.arange(count) // 5, np.arange(count) % 5, None, None)


def least_squares_r2(x: Tensor, z: Tensor) -> np.ndarray:
    """Var(z) - min E‖z - W x - b‖² over Var(z), on groups of five rows that the others' map predicts."""
    left = torch.zeros_like(z)
    for start in range(0, len(x), 5):
        out = torch.arange(len(x))
        test = (out >= start) & (out < start + 5)
        ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        left[test] = z[test] - ones[test] @ (torch.linalg.pinv(ones[~test]) @ z[~test])
    return (1 - (left**2).sum(0) / ((z - z.mean(0)) ** 2).sum(0)).numpy()


def test_it_is_the_r2_of_least_squares_on_held_out_rows() -> None:
    depths = [drawn(i, 100, 6) for i in range(3)]
    depths[1] = depths[1] + 0.7 * depths[2]
    found = MEASURES.make("decodability", {"features": 3, "ridge": 1e-9})._found(made(*depths))
    last = depths[2].double() - depths[2].double().mean(0)
    features = torch.linalg.svd(last, full_matrices=False).U[:, :3] * 10
    read = np.stack([least_squares_r2(d.double(), features) for d in depths])
    np.testing.assert_allclose(found.grids["decodability"].values[:, 0], read.mean(1), atol=1e-5)
    np.testing.assert_allclose(found.values, np.abs(np.diff(read.mean(1))), atol=1e-5)
    np.testing.assert_allclose(found.grids["complexity"].values[:, 0], 1 - np.clip(read[1:], 0, 1).mean(0), atol=1e-5)
    share = torch.linalg.svdvals(last)[:3] ** 2 / (last**2).sum()
    np.testing.assert_allclose(found.grids["complexity"].values[:, 1], share.numpy(), atol=1e-6)


def test_errors_are_those_over_sequences_with_features_and_maps_known() -> None:
    depths = [drawn(i, 100, 6) for i in range(2)]
    found = MEASURES.make("decodability", {"features": 2, "ridge": 1e-9})._found(made(*depths))
    last = depths[1].double() - depths[1].double().mean(0)
    features = torch.linalg.svd(last, full_matrices=False).U[:, :2] * 10
    lost = []
    for depth in depths:
        x = torch.cat([depth.double(), torch.ones(100, 1, dtype=torch.float64)], 1)
        left = torch.zeros_like(features)
        for start in range(0, 100, 5):
            test = torch.zeros(100, dtype=torch.bool)
            test[start : start + 5] = True
            left[test] = features[test] - x[test] @ (torch.linalg.pinv(x[~test]) @ features[~test])
        lost.append((left**2).mean(1).unflatten(0, (20, 5)).mean(1).numpy())
    steps = lost[1] - lost[0]
    assert found.stderr == pytest.approx([steps.std(ddof=1) / 20**0.5], rel=1e-4)


def test_a_feature_of_the_first_layer_is_simple_and_one_of_the_last_complex() -> None:
    early, late, noise = 9 * drawn(1, 200, 1), 4 * drawn(2, 200, 1), 0.01 * drawn(3, 4, 200, 5)
    without = torch.cat([early, drawn(4, 200, 1)], 1)
    depths = [torch.cat([without, n], 1) for n in noise[:3]]
    last = torch.cat([torch.cat([early, late], 1), noise[3]], 1)
    found = MEASURES.make("decodability", {"features": 2, "ridge": 1e-9})._found(made(*depths, last))
    assert found.grids["complexity"].values[:, 0] == pytest.approx([0, 1 - 1 / 3], abs=0.02)
    assert found.values[2] == pytest.approx(0.5, abs=0.05)
    assert found.values[:2].max() < 0.02


def test_an_identity_block_makes_nothing_readable(literal: ModuleType) -> None:
    model = literal.zeroed(tiny("llama"), "llama", ["block.2"])
    assert MEASURES.make("decodability").measure(Lab(model, text(4, 8)))["block.2"] == 0.0


def test_states_that_do_not_vary_have_no_features() -> None:
    with pytest.raises(UnsupportedError, match="do not vary"):
        MEASURES.make("decodability")._found(made(drawn(1, 10, 3), torch.ones(10, 3)))


@pytest.mark.parametrize("options", [{"features": 0}, {"ridge": -1.0}], ids=["features", "ridge"])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make("decodability", options)
