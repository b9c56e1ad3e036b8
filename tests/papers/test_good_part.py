"""Skip to the Good Part (arXiv 2603.07475): cosines of adjacent layers and of all pairs, token by token."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import padded, text, tiny


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def states(literal: ModuleType, model: torch.nn.Module, name: str, ids: Tensor) -> list[Tensor]:
    pairs = literal.pairs(model, name, ids)
    return [pairs["block.0"][0], *(pairs[f"block.{i}"][1] for i in range(4))]


def mean_cosine(one: Tensor, other: Tensor) -> float:
    """Averaged over tokens behind the first of each sequence (no cosine of averages)."""
    found = [cosine(a, b) for x, y in zip(one, other, strict=True) for a, b in list(zip(x, y, strict=True))[1:]]
    return math.fsum(found) / len(found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_adjacent_cosines_maps_and_runs(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 7)
    depths = states(literal, model, name, ids)
    measure = MEASURES.make("adjacent-similarity", {"sequences": 3, "each": 7})
    got = measure.measure(Lab(model, ids, batch_size=2))
    wanted = np.array([[mean_cosine(a, b) for b in depths] for a in depths])
    np.testing.assert_allclose(got.grids["similarity"].values, wanted, atol=1e-6)
    for i in range(4):
        assert got[f"block.{i}"] == pytest.approx(1 - wanted[i, i + 1], abs=1e-6)
        np.testing.assert_allclose(got.spans[f"block.{i}"], 1 - wanted[i, i + 1 :], atol=1e-6)
    drift, recency = got.grids["depths"].values.T
    np.testing.assert_allclose(drift, wanted[0], atol=1e-6)
    neighbours = [[cosine(x[t], x[t - 1]) for x in d for t in range(2, 7)] for d in depths]
    np.testing.assert_allclose(recency, np.mean(neighbours, axis=1), atol=1e-6)


def test_padding_and_the_ends_of_sequences_are_no_neighbours(literal: ModuleType) -> None:
    model, rows = tiny("llama"), [text(1, n, seed=n)[0] for n in (3, 9, 2)]
    alone = [states(literal, model, "llama", r.unsqueeze(0)) for r in rows]
    got = MEASURES.make("adjacent-similarity").measure(Lab(model, padded(rows, 3, side="left")))
    for depth in range(5):
        wanted = [cosine(a[depth][0, t], a[depth][0, t - 1]) for a in alone for t in range(2, a[depth].shape[1])]
        assert got.grids["depths"].values[depth, 1] == pytest.approx(np.mean(wanted), abs=1e-5)


def test_zeroed_projections_are_most_alike_and_first_to_go(literal: ModuleType) -> None:
    model = literal.zeroed(tiny("llama"), "llama", ["block.2"])
    got = MEASURES.make("adjacent-similarity").measure(Lab(model, text(3, 8)))
    assert got["block.2"] == 0.0
    assert got.ranked()[0] == "block.2"
    assert got.spans["block.2"][0] == pytest.approx(0, abs=1e-12)


def test_texts_of_two_tokens_have_no_neighbours_behind_the_first() -> None:
    got = MEASURES.make("adjacent-similarity").measure(Lab(tiny("llama"), text(3, 2)))
    assert np.isnan(got.grids["depths"].values[:, 1]).all()
    assert all(np.isfinite(v).all() for v in got.values.values())
