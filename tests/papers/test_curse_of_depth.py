"""The Curse of Depth (arXiv 2502.05795): the variance of each layer, over tokens and channels."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import padded, text, tiny


def variances(pairs: dict[str, tuple[Tensor, Tensor]], front: int) -> list[float]:
    """At all depths, over all tokens behind the first few and all channels."""
    states = [pairs["block.0"][0], *(pairs[f"block.{i}"][1] for i in range(4))]
    return [float(np.var(s[:, front:].numpy())) for s in states]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
@pytest.mark.parametrize("front", [0, 1])
def test_variance_is_over_tokens_and_channels(name: str, front: int, literal: ModuleType) -> None:
    model, ids = tiny(name), text(5, 8)
    wanted = variances(literal.pairs(model, name, ids), front)
    got = MEASURES.make("variance-growth", {"front": front}).measure(Lab(model, ids, batch_size=2))
    grid = got.grids["variance"]
    assert grid.rows == ("input", "block.0", "block.1", "block.2", "block.3")
    np.testing.assert_allclose(grid.values[:, 0], wanted, rtol=1e-5)
    for i in range(4):
        assert got[f"block.{i}"] == pytest.approx(abs(np.log(wanted[i + 1] / wanted[i])), abs=1e-5)


def test_errors_are_those_of_a_jackknife_over_sequences(literal: ModuleType) -> None:
    model, rows = tiny("llama"), [text(1, n, seed=n)[0] for n in (5, 8, 9, 12, 6, 10, 7, 11)]
    per_row = [literal.pairs(model, "llama", r.unsqueeze(0)) for r in rows]

    def growth(rows: list[dict[str, tuple[Tensor, Tensor]]], site: str) -> float:
        before, behind = (torch.cat([r[site][i][0, 1:] for r in rows]) for i in (0, 1))
        return abs(float(np.log(np.var(behind.numpy()) / np.var(before.numpy()))))

    got = MEASURES.make("variance-growth").measure(Lab(model, padded(rows, 3)))
    for site in ("block.0", "block.3"):
        assert got[site] == pytest.approx(growth(per_row, site), rel=1e-5)
        out = [growth(per_row[:i] + per_row[i + 1 :], site) for i in range(len(rows))]
        jackknife = float(np.sqrt((len(rows) - 1) * np.var(out)))
        assert float(got.stderr[site][0]) == pytest.approx(jackknife, rel=0.25)


def test_an_identity_block_keeps_the_variance_exactly(literal: ModuleType) -> None:
    model = literal.zeroed(tiny("gpt2"), "gpt2", ["block.2"])
    got = MEASURES.make("variance-growth").measure(Lab(model, text(3, 8)))
    assert got["block.2"] == 0.0


def test_front_is_checked() -> None:
    with pytest.raises(InputError, match="front"):
        MEASURES.make("variance-growth", {"front": -2})
