"""Talking Heads (arXiv 2406.09519): composition scores against products of whole matrices [width, width]."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.anatomy.projections import projections
from lamina.core.errors import UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import NanoGPT, text, tiny

HEADS, SIZE, WIDTH = 4, 8, 32


def layer_of(model: Any, name: str, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool, Tensor]:
    """q, k, v [heads, size, width], o [heads, width, size], the gain before, whether it centres, the gain behind."""
    ones = torch.ones(WIDTH, dtype=torch.float64)
    if name == "gpt2":
        block = model.transformer.h[number]
        q, k, v = (m.unflatten(0, (HEADS, SIZE)) for m in block.attn.c_attn.weight.T.chunk(3))
        o, gain, centred, after = block.attn.c_proj.weight.T, block.ln_1.weight, True, ones
    elif name == "gpt_neox":
        block = model.gpt_neox.layers[number]
        q, k, v = block.attention.query_key_value.weight.unflatten(0, (HEADS, 3, SIZE)).unbind(1)
        o, gain, centred, after = block.attention.dense.weight, block.input_layernorm.weight, True, ones
    else:
        block = model.model.layers[number]
        a = block.self_attn
        q, k, v = (m.weight.unflatten(0, (-1, SIZE)) for m in (a.q_proj, a.k_proj, a.v_proj))
        k, v = (m.repeat_interleave(HEADS // len(m), 0) for m in (k, v))
        o, gain, centred, after = a.o_proj.weight, block.input_layernorm.weight, False, ones
        if name == "gemma2":
            gain, after = 1 + gain, 1 + block.post_attention_layernorm.weight
    o = o.unflatten(1, (HEADS, SIZE)).movedim(1, 0)
    return *(t.detach().double() for t in (q, k, v, o, gain)), centred, after.detach().double()


def matrices(model: nn.Module, name: str) -> tuple[list[Tensor], dict[str, list[Tensor]], bool]:
    """Per layer: writers [heads, width, width]; readers of each side, the same shape."""
    writers, readers = [], {"v": [], "k": [], "q": []}
    for number in range(4):
        q, k, v, o, gain, centred, after = layer_of(model, name, number)
        middle = torch.eye(WIDTH, dtype=torch.float64) - (1 / WIDTH if centred else 0)
        fold = torch.diag(gain) @ middle
        ov = middle @ torch.diag(after) @ o @ v @ fold
        qk = fold.T @ q.mT @ k @ fold
        writers.append(ov)
        readers["v"].append(ov)
        readers["k"].append(qk)
        readers["q"].append(qk.mT)
    return writers, readers, centred


def cs(a: Tensor, b: Tensor) -> float:
    """‖B A‖ / (‖A‖ ‖B‖)."""
    return float((b @ a).norm() / (a.norm() * b.norm()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_scores_are_means_over_products_of_whole_matrices(name: str) -> None:
    model = tiny(name)
    got = MEASURES.make("composition").measure(Lab(model, text(1, 4)))
    writers, readers, centred = matrices(model, name)
    for layer in range(3):
        for head in range(HEADS):
            found = [
                cs(writers[layer][head], readers[side][later][reader])
                for side in ("v", "k", "q")
                for later in range(layer + 1, 4)
                for reader in range(HEADS)
            ]
            wanted = np.mean(found) - (WIDTH - centred) ** -0.5
            assert got.values[f"block.{layer}.attention.head"][head] == pytest.approx(wanted, abs=2e-6)
    assert got.missing == {"block.3.attention.head": "no later head reads it"}
    assert set(got.values) == {f"block.{n}.attention.head" for n in range(3)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_map_of_values_and_its_components(name: str) -> None:
    model = tiny(name)
    got = MEASURES.make("composition").measure(Lab(model, text(1, 4))).grids
    writers, readers, _ = matrices(model, name)
    assert got["v"].rows[5] == "block.1.attention.head.1"
    for writer, reader in ((0, 15), (5, 9), (11, 12), (5, 6), (9, 2)):
        a, b = writers[writer // HEADS][writer % HEADS], readers["v"][reader // HEADS][reader % HEADS]
        later = reader // HEADS > writer // HEADS
        assert got["v"].values[writer, reader] == pytest.approx(cs(a, b) if later else np.nan, abs=2e-6, nan_ok=True)
        u, s, vh = torch.linalg.svd(a)
        parts = [cs(s[i] * torch.outer(u[:, i], vh[i]), b) for i in range(SIZE)]
        assert got["v component"].values[writer, reader] == pytest.approx(
            max(parts) if later else np.nan, abs=2e-5, nan_ok=True
        )
        energy = sum(float(s[i]) ** 2 * parts[i] ** 2 for i in range(SIZE)) * float(b.norm()) ** 2
        assert energy == pytest.approx(float((b @ a).norm()) ** 2)  # the card's identity


def test_scale_does_not_matter() -> None:
    model = tiny("llama")
    before = MEASURES.make("composition").measure(Lab(model, text(1, 4)))
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
            layer.self_attn.o_proj.weight.mul_(2.0**number)
            layer.self_attn.q_proj.weight.mul_(0.5)
    after = MEASURES.make("composition").measure(Lab(model, text(1, 4)))
    for site, values in before.values.items():
        np.testing.assert_allclose(after.values[site], values, atol=1e-6)


def test_random_heads_are_at_chance_and_a_planted_pair_stands_out() -> None:
    model = tiny("llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=4, intermediate_size=16)
    layers: Any = model.model.layers  # type: ignore[union-attr]
    got = MEASURES.make("composition").measure(Lab(model, text(1, 4)))
    assert all(abs(v) < 0.03 for values in got.values.values() for v in values)
    with torch.no_grad():  # the first head of block 2 reads what the second of block 0 writes
        layers[2].self_attn.v_proj.weight[:32] = layers[0].self_attn.o_proj.weight[:, 32:64].T
        layers[2].input_layernorm.weight.fill_(1.0)
    again = MEASURES.make("composition").measure(Lab(model, text(1, 4)))
    row = again.grids["v"].values[1]
    assert np.nanargmax(row) == 8
    assert row[8] > 2 * np.sort(row[4:])[-2]
    assert again.values["block.0.attention.head"][1] > again.values["block.0.attention.head"][[0, 2, 3]].max()


def test_heads_that_write_nothing_score_minus_chance() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()  # type: ignore[union-attr,index]
    got = MEASURES.make("composition").measure(Lab(model, text(1, 4)))
    assert got.values["block.1.attention.head"] == pytest.approx(-(32**-0.5))
    assert np.isfinite(got.values["block.0.attention.head"]).all()


def test_an_attention_that_is_not_understood_is_told() -> None:
    model = tiny("falcon_new")  # heads that share keys and values in one fused map have no site
    assert projections(Anatomy.of(model), "block.0.attention").group == 2
    with pytest.raises(UnsupportedError, match="rows"):
        MEASURES.make("composition").measure(Lab(model, text(1, 4)))


def test_models_that_no_library_knows() -> None:
    got = MEASURES.make("composition").measure(Lab(NanoGPT().eval(), text(1, 4)))
    assert [len(v) for v in got.values.values()] == [4] * 3
