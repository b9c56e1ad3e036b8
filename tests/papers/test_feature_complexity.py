"""Iterative Feature Merging (arXiv 2310.06756) against a loop that merges real weights and measures all pairs anew."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.testing.models import text, tiny

PLACES = {
    "llama": ("model.layers.{}.mlp", ("gate_proj", "up_proj"), "down_proj", False),
    "gpt2": ("transformer.h.{}.mlp", ("c_fc",), "c_proj", True),
    "gpt_neox": ("gpt_neox.layers.{}.mlp", ("dense_h_to_4h",), "dense_4h_to_h", False),
    "nanogpt": ("blocks.{}.feeds", ("0",), "2", False),
}
"""MLP, maps upstream, map downstream, and whether their matrices are stored as [inputs, outputs]."""


def measured(model: Any, **options: Any) -> Scores:
    return MEASURES.make("feature-complexity", options).measure(Lab(model, text(1, 4)))


def group_of(model: nn.Module, name: str, number: int) -> list[tuple[Tensor, int]]:
    """Tensors that share the neurons, with 0 for producers (rows) and 1 for consumers (columns), as in the code."""
    path, ups, down, stored_across = PLACES[name]
    mlp = model.get_submodule(path.format(number))
    flip = (lambda w: w.T) if stored_across else (lambda w: w)
    found = [(flip(mlp.get_submodule(up).weight.detach()).double().clone(), 0) for up in ups]
    return [*found, (flip(mlp.get_submodule(down).weight.detach()).double().clone(), 1)]


def literally(group: list[tuple[Tensor, int]], beta: float, max_ratio: float = 1.0) -> list[list[int]]:
    """Sweeps as in the code: all distances, the closest pair, stop or merge; the merged channel comes last."""
    n0 = group[0][0].shape[group[0][1]]
    members, sweeps = [[i] for i in range(n0)], 0
    while sweeps < n0 * max_ratio and len(members) > 1:
        n = len(members)
        distance = torch.zeros(n, n, dtype=torch.float64)
        for tensor, axis in group:
            flat = torch.moveaxis(tensor, axis, 0).reshape(n, -1)
            distance += (flat.unsqueeze(0) - flat.unsqueeze(1)).square().sum(-1)
        closest = distance.clone().fill_diagonal_(math.inf)
        i, j = divmod(int(closest.argmin()), n)
        if closest[i, j] > beta * distance.max():
            break
        counts, merged = (len(members[i]), len(members[j])), []
        rest = [k for k in range(n) if k not in (i, j)]
        for tensor, axis in group:
            a, b = tensor.select(axis, i), tensor.select(axis, j)
            one = a + b if axis == 0 else (counts[0] * a + counts[1] * b) / sum(counts)
            merged.append((torch.cat([tensor.index_select(axis, torch.tensor(rest)), one.unsqueeze(axis)], axis), axis))
        group, members = merged, [*(members[k] for k in rest), members[i] + members[j]]
        sweeps += 1
    return members


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", list(PLACES))
def test_as_many_are_left_as_in_the_literal_loop(name: str, beta: float) -> None:
    model = tiny(name)
    got = measured(model, beta=beta)
    assert len(got.values) == 4
    for number in (0, 3):
        group = group_of(model, name, number)
        left = literally(group, beta)
        site = f"block.{number}.mlp"
        assert got[site] == pytest.approx(len(left) / group[0][0].shape[0], abs=1e-12)
        grid = got.grids["merging"]
        width, remaining, largest, _ = grid.values[grid.rows.index(site)]
        assert (width, remaining, largest) == (group[0][0].shape[0], len(left), max(map(len, left)))


def test_the_betas_above_merge_few_some_and_most() -> None:
    """Else the test above could not tell how merged neurons are treated."""
    shares = [measured(tiny("gpt2"), beta=b)["block.0.mlp"] for b in (0.3, 0.5, 0.7, 0.9)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.2


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_the_same_neurons_are_merged(beta: float) -> None:
    from lamina.papers.neurons.feature_complexity import merged

    group = group_of(tiny("gpt_neox"), "gpt_neox", 1)
    up, down = (torch.moveaxis(t, axis, 0) for t, axis in group)
    got, nearness = merged((up @ up.T).numpy(), (down @ down.T).numpy(), beta, len(up))
    assert {frozenset(g) for g in got} == {frozenset(g) for g in literally(group, beta)}
    distances = torch.cdist(torch.cat([up, down], 1), torch.cat([up, down], 1)).square()
    least = distances.clone().fill_diagonal_(math.inf).min()
    assert nearness == pytest.approx(float(least / distances.max()), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "nanogpt"])
def test_planted_twins_are_found_and_no_others(name: str) -> None:
    model, (path, ups, down, across) = tiny(name), PLACES[name]
    mlp = model.get_submodule(path.format(2))
    with torch.no_grad():
        for kind, maps in ((0, ups), (1, (down,))):
            for one in maps:
                weight = mlp.get_submodule(one).weight
                matrix = weight.T if (kind == 1) != across else weight
                matrix[[10, 20]] = matrix[[3, 4]]
    got = measured(model, beta=1e-6)
    width = 64 if name == "llama" else 128
    assert got["block.2.mlp"] == pytest.approx((width - 2) / width)
    assert got["block.1.mlp"] == 1.0
    grid = got.grids["merging"]
    assert grid.values[grid.rows.index("block.2.mlp"), 2] == 2


def test_of_three_alike_two_are_left() -> None:
    """The rows upstream of the first two are summed, so that the third is no twin of them any more; of four, one is."""
    model = tiny("gpt_neox")
    mlp = model.gpt_neox.layers[0].mlp
    for copies, left in (((10, 11), 63), ((10, 11, 12), 61)):
        with torch.no_grad():
            for copy in copies:
                mlp.dense_h_to_4h.weight[copy] = mlp.dense_h_to_4h.weight[3]
                mlp.dense_4h_to_h.weight[:, copy] = mlp.dense_4h_to_h.weight[:, 3]
        assert measured(model, beta=1e-6)["block.0.mlp"] == left / 64


def test_no_neuron_is_merged_below_the_least_distance() -> None:
    got = measured(tiny("llama"))
    nearness = got.grids["merging"].values[:, 3]
    assert (nearness > 0.1).all()
    assert all(v[0] == 1.0 for v in got.values.values())
    assert measured(tiny("llama"), beta=float(nearness[0]) * 1.001)["block.0.mlp"] < 1.0
    assert measured(tiny("llama"), beta=float(nearness[0]) * 0.999)["block.0.mlp"] == 1.0


@pytest.mark.parametrize("max_ratio", [0.1, 0.25])
def test_at_most_the_asked_share_goes(max_ratio: float) -> None:
    model = tiny("llama")
    got = measured(model, beta=0.95, max_ratio=max_ratio)["block.0.mlp"]
    assert got == len(literally(group_of(model, "llama", 0), 0.95, max_ratio)) / 64
    assert got == 1 - math.ceil(64 * max_ratio) / 64


def test_all_alike_end_as_one() -> None:
    model = tiny("nanogpt")
    with torch.no_grad():
        for p in model.blocks[1].feeds.parameters():
            p.zero_()
    assert measured(model)["block.1.mlp"] == 1 / 128


def test_bfloat16_scores_its_own_weights() -> None:
    model = tiny("llama").bfloat16()
    assert measured(model, beta=0.7)["block.0.mlp"] == len(literally(group_of(model, "llama", 0), 0.7)) / 64


def test_an_mlp_without_separate_neurons_is_told_of() -> None:
    model = tiny("nanogpt")
    model.blocks[1].feeds = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Softmax(-1), nn.Linear(64, 32))
    got = measured(model)
    assert set(got.values) == {"block.0.mlp", "block.2.mlp", "block.3.mlp"}
    assert got.missing["block.1.mlp"]
    assert not measured(tiny("mixtral")).values


@pytest.mark.parametrize(
    ("options", "words"),
    [({"beta": 1.0}, "beta must be"), ({"beta": -0.1}, "beta must be"), ({"max_ratio": 0.0}, "max_ratio must be")],
)
def test_bad_options(options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MEASURES.make("feature-complexity", options)
