"""Puzzle's replace-one-block scores (arXiv 2411.19146) with an empty block, against whole forwards."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.testing.models import lively, text, tiny
from lamina.testing.planted import silence


def measured(lab: Lab, metric: str = "kl") -> Scores:
    return MEASURES.make("replace-one", {"metric": metric}).measure(lab)


def sites(name: str, literal: ModuleType) -> list[str]:
    return [s for n in range(4) for s in (f"block.{n}", *literal.parts(name, f"block.{n}"))]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_kl_is_its_definition(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 10)
    dense = literal.logits(model, ids)
    got = measured(Lab(model, ids, batch_size=2))
    assert list(got.values) == sites(name, literal)
    for site in got.values:
        with literal.masked(model, name, [site]):
            wanted = literal.divergence("kl", dense, literal.logits(model, ids))
        assert got[site] == pytest.approx(wanted, rel=1e-3, abs=1e-5), site


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_loss_is_its_rise(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 10)
    dense = literal.loss(model, ids)
    got = measured(Lab(model, ids), "loss")
    assert got.unit == "nats"
    for site in got.values:
        with literal.masked(model, name, [site]):
            assert got[site] == pytest.approx(literal.loss(model, ids) - dense, abs=2e-6), site


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_cosine_is_that_of_the_last_states(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 10)
    dense = literal.pairs(model, name, ids)["block.3"][1]
    got = measured(Lab(model, ids), "cosine")
    for site in got.values:
        with literal.masked(model, name, [site]):
            here = literal.pairs(model, name, ids)["block.3"][1]
        cosines = (here * dense).sum(-1) / (here.norm(dim=-1) * dense.norm(dim=-1))
        assert got[site] == pytest.approx(float(1 - cosines.mean()), abs=2e-6), site


@pytest.mark.parametrize("metric", ["kl", "loss", "cosine"])
def test_an_empty_layer_in_the_place_of_an_empty_one_is_free(metric: str) -> None:
    lab = Lab(tiny("llama"), text(3, 10))
    silence(lab.anatomy, "block.1")
    got = measured(lab, metric)
    assert got["block.1"] == got["block.1.attention"] == got["block.1.mlp"] == 0.0


def test_the_sum_of_both_sublayers_is_near_the_block() -> None:
    """The paper's program adds scores up: on small branches they do add up."""
    model = tiny("llama", seed=1)
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.mul_(0.02)
    got = measured(Lab(model, text(4, 12)), "cosine")
    for n in range(4):
        assert got[f"block.{n}"] == pytest.approx(got[f"block.{n}.attention"] + got[f"block.{n}.mlp"], rel=0.5)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InputError, match="metric is one of kl, loss, cosine, not 'mse'"):
        MEASURES.make("replace-one", {"metric": "mse"})


def test_models_that_give_vectors_have_a_cosine_alone() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    lab = Lab(lively(transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99))), text(2, 8))
    assert set(measured(lab, "cosine").values) == {s.id for s in lab.anatomy.sites}
    for metric in ("kl", "loss"):
        with pytest.raises(UnsupportedError, match=r"no (distributions|next tokens)"):
            measured(lab, metric)
