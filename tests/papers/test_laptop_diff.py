"""LAPTOP-Diff's criterion (arXiv 2404.11098): the mean squared difference of outputs, number by number."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import lively, padded, text, tiny
from lamina.testing.planted import silence


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_is_the_papers_formula(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 10)
    dense = literal.logits(model, ids).double()
    got = MEASURES.make("output-mse").measure(Lab(model, ids, batch_size=2))
    sites = [s for n in range(4) for s in (f"block.{n}", *literal.parts(name, f"block.{n}"))]
    assert list(got.values) == sites
    for site in sites:
        with literal.masked(model, name, [site]):
            difference = literal.logits(model, ids).double() - dense
        mean = sum(float(v) ** 2 for v in difference.flatten()) / difference.numel()
        assert got[site] == pytest.approx(mean, rel=2e-4, abs=1e-9), site
    assert got.unit == ""


def test_what_adds_nothing_moves_nothing() -> None:
    lab = Lab(tiny("llama"), text(3, 10))
    silence(lab.anatomy, "block.1")
    got = MEASURES.make("output-mse").measure(lab)
    assert got["block.1"] == got["block.1.attention"] == got["block.1.mlp"] == 0.0


def test_padding_does_not_count(literal: ModuleType) -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 11, 7)]
    total, count = 0.0, 0
    for row in rows:
        dense = literal.logits(model, row.unsqueeze(0)).double()
        with literal.masked(model, "llama", ["block.2"]):
            total += float((literal.logits(model, row.unsqueeze(0)).double() - dense).square().sum())
        count += dense.numel()
    got = MEASURES.make("output-mse").measure(Lab(model, padded(rows, 3, side="left")))
    assert got["block.2"] == pytest.approx(total / count, rel=1e-4)


def test_models_without_a_head_are_compared_by_their_states() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = lively(transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99))).eval()
    ids = text(3, 9)
    lab = Lab(model, ids)
    got = MEASURES.make("output-mse").measure(lab)
    with torch.no_grad():
        dense = model(ids).last_hidden_state.double()
        with lab.ablate(["block.1.mlp"]):
            wanted = float((model(ids).last_hidden_state.double() - dense).square().mean())
    assert got["block.1.mlp"] == pytest.approx(wanted, rel=1e-4)
