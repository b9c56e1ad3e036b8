"""StructPrune (arXiv 2510.03246): channel energies, channel by channel, from hooks on named maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.papers.width.struct_prune import shares
from lamina.testing.models import padded, text, tiny

NAMES = {
    "llama": {"attention.q_proj": "self_attn.q_proj", "attention.o_proj": "self_attn.o_proj", "mlp.down_proj": ""},
    "gpt2": {"attention.c_attn": "attn.c_attn", "attention.c_proj": "attn.c_proj", "mlp.c_fc": ""},
    "gpt_neox": {"attention.query_key_value": "", "mlp.dense_4h_to_h": ""},
}
"""Ends of the sites' ids → paths in a layer, where they differ."""


@torch.no_grad()
def literal(model: Any, name: str, ids: Tensor) -> dict[str, list[list[float]]]:
    """Per map and sequence, of each token: the mean over channels of ‖W_:,j‖² x_j²."""
    layers = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}[name]
    found: dict[str, list[list[float]]] = {}
    for number, layer in enumerate(model.get_submodule(layers)):
        for end, path in NAMES[name].items():
            module = layer.get_submodule(path or end)
            seen: list[Tensor] = []
            handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            model(ids, use_cache=False)
            handle.remove()
            weight = module.weight.T if name == "gpt2" else module.weight  # [outputs, inputs]
            norms = [sum(float(w) ** 2 for w in weight[:, j]) for j in range(weight.shape[1])]
            found[f"block.{number}.{end}"] = [
                [math.fsum(n * float(v) ** 2 for n, v in zip(norms, x, strict=True)) / len(norms) for x in row]
                for row in seen[0]
            ]
    return found


@pytest.mark.parametrize("name", list(NAMES))
def test_energies_are_norms_times_squares(name: str) -> None:
    model, ids = tiny(name), text(3, 5)
    got = MEASURES.make("energy").measure(Lab(model, ids, batch_size=2))
    for site, rows in literal(model, name, ids).items():
        means = [math.fsum(r) / len(r) for r in rows]
        assert got[site] == pytest.approx(np.mean(means), rel=1e-5)
        assert got.stderr[site][0] == pytest.approx(np.std(means, ddof=1) / 3**0.5, rel=1e-4)


def test_energy_is_what_the_output_loses_without_a_channel() -> None:
    model, ids = tiny("llama"), text(2, 6)
    got = MEASURES.make("energy").measure(Lab(model, ids))
    module: Any = model.get_submodule("model.layers.1.mlp.down_proj")
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        handle.remove()
        x = seen[0]
        losses = []
        for j in range(64):
            cut = x.clone()
            cut[..., j] = 0
            losses.append(float((module(x) - module(cut)).square().sum(-1).mean()))
    assert got["block.1.mlp.down_proj"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_padding_does_not_count() -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 9, 6)]
    alone = [literal(model, "llama", r[None]) for r in rows]
    got = MEASURES.make("energy").measure(Lab(model, padded(rows, 3, side="left")))
    for site in alone[0]:
        assert got[site] == pytest.approx(np.mean([e for a in alone for e in a[site][0]]), rel=1e-4)


def test_shares() -> None:
    even = shares(np.full(5, 3.0), 1.0)
    assert even == pytest.approx(0.2)  # equal energies: equal shares
    uneven = np.array([1.0, 2.0, 6.0])
    assert shares(uneven, 1e9) == pytest.approx(1 / 3)  # a high temperature too
    assert shares(uneven, 1.0) == pytest.approx(np.exp(uneven / 3) / np.exp(uneven / 3).sum())
    assert shares(uneven * 1e9, 1.0) == pytest.approx(shares(uneven, 1.0))
    assert shares(uneven, 1e-3).round(6).tolist() == [0, 0, 1]
    assert shares(np.zeros(2), 1.0).tolist() == [0.5, 0.5]


def test_the_grid_holds_energies_and_shares() -> None:
    got = MEASURES.make("energy", {"temperature": 0.5}).measure(Lab(tiny("llama"), text(4, 16)))
    grid = got.grids["shares"]
    assert grid.rows == tuple(got.values)
    assert len(grid.rows) == 28
    assert grid.values[:, 0] == pytest.approx(np.concatenate(list(got.values.values())))
    assert grid.values[:, 1] == pytest.approx(shares(grid.values[:, 0], 0.5))


def test_options() -> None:
    with pytest.raises(InputError, match="temperature"):
        MEASURES.make("energy", {"temperature": 0.0})
