"""Permutation and usefulness of layers (arXiv 2603.15389) against plain loops over changed networks."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import lively, own_text, padded, text, tiny
from lamina.testing.planted import silence, twin


def exchanged(model: Any, name: str, ids: Tensor, i: int, j: int, literal: ModuleType) -> float:
    """The loss of a copy in whose list two layers have changed places."""
    other = copy.deepcopy(model)
    places = other.get_submodule(literal.PLACES[name].blocks)
    places[i], places[j] = places[j], places[i]
    return literal.loss(other, ids)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("reach", [1, 3])
def test_permutation_is_the_papers_formula(name: str, reach: int, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 9)
    dense = literal.loss(model, ids)
    got = MEASURES.make("permutation", {"reach": reach}).measure(Lab(model, ids, batch_size=2))
    table = np.zeros((4, 4))
    for i in range(4):
        for j in range(i + 1, min(i + 1 + reach, 4)):
            table[i, j] = table[j, i] = abs(dense - exchanged(model, name, ids, i, j, literal)) / dense
    assert got.grids["pairs"].values == pytest.approx(table, abs=2e-6)
    for n in range(4):
        near = [table[n, m] for m in range(4) if 0 < abs(n - m) <= reach]
        assert got[f"block.{n}"] == pytest.approx(np.mean(near), abs=2e-6)


def test_equal_blocks_change_places_for_free() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    twin(lab.anatomy, 1, 2)
    got = MEASURES.make("permutation").measure(lab)
    assert got.grids["pairs"].values[1, 2] == 0.0
    assert got.grids["pairs"].values[0, 1] > 0.0


def test_parameters_are_back_in_place_after_an_error() -> None:
    model = tiny("llama")
    before = {n: (p.data_ptr(), p.clone()) for n, p in model.named_parameters()}
    lab = Lab(model, text(3, 9))
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("stop")

    handle = model.get_submodule("lm_head").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        MEASURES.make("permutation").measure(lab)
    handle.remove()
    for n, p in model.named_parameters():
        assert p.data_ptr() == before[n][0]
        assert torch.equal(p, before[n][1])


def test_few_sequences_are_run_and_the_blocks_before_a_pair_are_not() -> None:
    lab = Lab(tiny("llama"), text(6, 9))
    MEASURES.make("permutation", {"sequences": 2, "length": 5}).measure(lab)
    assert lab.counts.blocks == 2 * 5 * (4 + 4 + 3 + 2)  # the dense pass, and those from blocks 0, 1 and 2 on


def test_blocks_that_differ_have_no_score() -> None:
    """A wider MLP in one block: its neighbours can't take its place."""
    model = tiny("llama", num_hidden_layers=3)
    mlp = model.model.layers[1].mlp  # type: ignore[union-attr]
    mlp.gate_proj, mlp.up_proj = torch.nn.Linear(32, 80, bias=False), torch.nn.Linear(32, 80, bias=False)
    mlp.down_proj = torch.nn.Linear(80, 32, bias=False)
    got = MEASURES.make("permutation").measure(Lab(model, text(3, 9)))
    assert not got.values
    assert got.missing == dict.fromkeys(("block.0", "block.1", "block.2"), "no block in reach is built like it")
    wide = MEASURES.make("permutation", {"reach": 2}).measure(Lab(model, text(3, 9)))
    assert set(wide.values) == {"block.0", "block.2"}


def mapped_loss(model: Any, ids: list[Tensor], block: int, ridge: float) -> float:
    """The loss with the block's output replaced by maps, each fitted by least squares to all other sequences."""
    layer, pairs = model.model.layers[block], []
    handle = layer.register_forward_hook(lambda _, a, out: pairs.append((a[0], out)))
    for row in ids:
        with torch.no_grad():
            model(row.unsqueeze(0), use_cache=False)
    handle.remove()
    x = [p[0][0].double() for p in pairs]
    f = [p[1][0].double() - p[0][0].double() for p in pairs]
    centre = torch.cat(x).median(0).values
    size = ((torch.cat(x) - centre) ** 2).sum(1).median() * ridge
    total, count = 0.0, 0
    for i, row in enumerate(ids):
        others = torch.cat([x[j] for j in range(len(ids)) if j != i]) - centre
        left = torch.cat([others, torch.ones(len(others), 1)], 1)
        penalty = torch.diag(torch.tensor([1.0] * 32 + [0.0], dtype=torch.float64)) * size.sqrt()
        target = torch.cat([f[j] for j in range(len(ids)) if j != i])
        w = torch.linalg.lstsq(torch.cat([left, penalty]), torch.cat([target, torch.zeros(33, 32)])).solution
        guess = torch.cat([x[i] - centre, torch.ones(len(x[i]), 1)], 1) @ w
        handle = layer.register_forward_hook(lambda _, a, out, g=guess: (a[0].double() + g).to(out.dtype))
        with torch.no_grad():
            logits = model(row.unsqueeze(0), use_cache=False).logits[0].double().log_softmax(-1)
        handle.remove()
        total -= float(logits[:-1].gather(1, row[1:].unsqueeze(1)).sum())
        count += len(row) - 1
    return total / count


def test_usefulness_is_the_papers_ratio_on_held_out_sequences(literal: ModuleType) -> None:
    model = tiny("llama")
    rows = [own_text(model, 1, n, seed=n)[0] for n in (14, 9, 12, 16)]
    lab = Lab(model, padded(rows, 2))
    got = MEASURES.make("usefulness", {"ridge": 0.02}).measure(lab)
    grid = got.grids["usefulness"]
    assert grid.columns == ("loss", "mapped loss", "ratio", "useful")
    for n in range(4):
        wanted = mapped_loss(model, rows, n, 0.02)
        assert grid.values[n, :2] == pytest.approx([lab.loss(), wanted], rel=1e-3)
        assert got[f"block.{n}"] == pytest.approx(wanted / lab.loss(), rel=1e-3)
        assert grid.values[n, 3] == float(wanted / lab.loss() > 1.1)


def test_an_identity_block_and_an_affine_one_are_replaced_for_free() -> None:
    lab = Lab(tiny("nanogpt"), text(24, 12))
    silence(lab.anatomy, "block.1")
    got = MEASURES.make("usefulness").measure(lab)
    assert got["block.1"] == 1.0
    block: Any = lab.model.get_submodule("blocks.2")
    block.forward = lambda x: x + x @ torch.full((32, 32), 0.01) + 0.5
    try:
        plain = MEASURES.make("usefulness", {"ridge": 1e-8}).measure(lab)
    finally:
        del block.forward
    assert plain["block.2"] == pytest.approx(1.0, abs=1e-5)
    assert plain["block.0"] > 1.001


def test_what_predicts_no_tokens_is_refused() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    lab = Lab(lively(transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=99))), text(2, 8))
    for name in ("usefulness", "permutation"):
        with pytest.raises(UnsupportedError, match="predicts no next tokens"):
            MEASURES.make(name).measure(lab)


def test_wrong_options_are_refused() -> None:
    for name, options, line in (
        ("permutation", {"reach": 0}, "reach is at least 1"),
        ("usefulness", {"ridge": 0.0}, "ridge is above 0"),
        ("usefulness", {"length": 0}, "length is at least 1"),
    ):
        with pytest.raises(InputError, match=line):
            MEASURES.make(name, options)
