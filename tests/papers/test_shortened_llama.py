"""Shortened LLaMA's criterion (arXiv 2402.02834): the rise of the loss without a site, against the naive loop."""

from __future__ import annotations

import copy
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lamina.core.documents import Budget
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.testing.models import lively, padded, text, tiny
from lamina.testing.planted import silence

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gemma2", "granite", "mixtral")
NATS = 2e-6
"""What float32 logits leave of a mean loss's accuracy."""


def measured(lab: Lab) -> Scores:
    return MEASURES.make("leave-one-out").measure(lab)


def naive(model: nn.Module, name: str, ids: torch.Tensor, literal: ModuleType) -> dict[str, float]:
    """One whole forward per site, its projections masked."""
    dense = literal.loss(model, ids)
    rises = {}
    for n in range(len(literal.layers(model, name))):
        block = f"block.{n}"
        for site in (block, *literal.parts(name, block)):
            with literal.masked(model, name, [site]):
                rises[site] = literal.loss(model, ids) - dense
    return rises


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_naive_loop(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 10)
    wanted = naive(model, name, ids, literal)
    got = measured(Lab(model, ids, batch_size=2))
    assert got.unit == "nats"
    assert set(got.values) == set(wanted)
    for site, rise in wanted.items():
        assert got[site] == pytest.approx(rise, abs=NATS), site


def test_blocks_equal_a_network_without_the_block(literal: ModuleType) -> None:
    """As the paper's code does it: the block leaves the list."""
    model, ids = tiny("llama"), text(3, 10)
    got = measured(Lab(model, ids))
    for n in range(4):
        shorter = copy.deepcopy(model)
        del shorter.model.layers[n]
        shorter.config.num_hidden_layers = 3
        assert got[f"block.{n}"] == pytest.approx(literal.loss(shorter, ids) - literal.loss(model, ids), abs=NATS)


def test_same_order_as_perplexity(literal: ModuleType) -> None:
    model, ids = tiny("gpt_neox"), text(3, 10)
    got = measured(Lab(model, ids))
    ppl = {}
    for n in range(4):
        with literal.masked(model, "gpt_neox", [f"block.{n}"]):
            ppl[f"block.{n}"] = np.exp(literal.loss(model, ids))
    assert sorted(ppl, key=lambda b: ppl[b]) == [s for s in got.ranked() if s in ppl]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_what_adds_nothing_costs_nothing(name: str) -> None:
    """A silent block, and each of its sublayers, raise the loss by exactly zero."""
    lab = Lab(tiny(name), text(3, 10))
    silence(lab.anatomy, "block.1")
    got = measured(lab)
    for site in ("block.1", *(p.id for p in lab.anatomy.parts("block.1"))):
        assert got[site] == 0.0, site
    assert all(got[s] != 0.0 for s in got.values if not s.startswith("block.1"))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_at_most_055_of_the_naive_loops_block_evaluations(name: str) -> None:
    depth = 12
    lab = Lab(tiny(name, num_hidden_layers=depth), text(2, 6))
    measured(lab)
    sites = 3 * depth
    assert lab.counts.blocks <= 0.55 * (sites + 1) * depth * lab.tokens
    assert lab.counts.heads <= (sites + 1) * lab.tokens
    assert lab.counts.backwards == 0


def test_at_most_055_of_the_naive_loop_with_thirty_blocks() -> None:
    depth = 30
    lab = Lab(tiny("llama", num_hidden_layers=depth), text(2, 6))
    measured(lab)
    naively = (3 * depth + 1) * depth * lab.tokens
    assert lab.counts.blocks <= 0.55 * naively


def test_a_classifier_is_scored_by_the_divergence_of_its_output() -> None:
    """No next token: KL from the dense distributions at every position, the sublayers' last maps masked."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=99, max_position_embeddings=64)
    model, ids = lively(transformers.BertForMaskedLM(config)).eval(), text(3, 9)
    lab = Lab(model, ids, batch_size=2)
    got = measured(lab)
    assert got.unit == "nats"
    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        for site in lab.anatomy.sites:
            with lab.ablate([site.id]):
                q = model(ids).logits.double().log_softmax(-1)
            assert got[site] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-5), site


def test_encoder_and_decoder_are_both_tried() -> None:
    """The output is vectors: the share of it that changes, position by position of the decoder."""
    import transformers

    from lamina.anatomy import Anatomy

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    model = lively(transformers.T5Model(transformers.T5Config(**sizes, decoder_start_token_id=0))).eval()
    batch = {"input_ids": text(3, 9), "decoder_input_ids": text(3, 6, seed=1)}
    lab = Lab(model, [batch], anatomy=Anatomy.of(model, batch))
    got = measured(lab)
    assert got.unit == ""
    assert set(got.values) == {s.id for s in lab.anatomy.sites}
    assert {s.split(".block")[0] for s in got.values} == {"encoder", "decoder"}
    with torch.no_grad():
        dense = model(**batch).last_hidden_state.double()
        for site in got.values:
            with lab.ablate([site]):
                out = model(**batch).last_hidden_state.double()
            share = ((out - dense) ** 2).sum(-1) / (dense**2).sum(-1)
            assert got[site] == pytest.approx(float(share.mean()), rel=1e-4), site


def test_passes_of_one_module_are_tried_each() -> None:
    import transformers

    sizes = {"hidden_size": 32, "embedding_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=3, vocab_size=99, max_position_embeddings=64)
    model, ids = lively(transformers.AlbertForMaskedLM(config)).eval(), text(2, 8)
    lab = Lab(model, ids)
    got = measured(lab)
    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        for site in lab.anatomy.sites:
            with lab.ablate([site.id]):
                q = model(ids).logits.double().log_softmax(-1)
            assert got[site] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-5), site


def test_counts_say_what_really_ran(literal: ModuleType) -> None:
    """Blocks are counted by hooks of one's own: a block that is passed over counts nowhere."""
    model, ids = tiny("llama"), text(2, 6)
    lab = Lab(model, ids)
    runs = {"attention": 0, "mlp": 0}
    handles = []
    for layer in literal.layers(model, "llama"):
        for word, part in (("attention", layer.self_attn.q_proj), ("mlp", layer.mlp.up_proj)):
            handles.append(
                part.register_forward_hook(lambda _, a, __, w=word: runs.update({w: runs[w] + a[0].shape[:2].numel()}))
            )
    before = lab.counts.blocks
    measured(lab)
    for handle in handles:
        handle.remove()
    assert max(runs.values()) <= lab.counts.blocks - before <= sum(runs.values())


def test_padding_and_unequal_rows(literal: ModuleType) -> None:
    """The mean is over predicted tokens: long rows count more."""
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 11, 7)]
    alone = [naive(model, "llama", r.unsqueeze(0), literal) for r in rows]
    counts = np.array([len(r) - 1 for r in rows])
    got = measured(Lab(model, padded(rows, 3)))
    for site in got.values:
        assert got[site] == pytest.approx(float(np.average([a[site] for a in alone], weights=counts)), abs=5 * NATS)


def test_standard_error_is_over_sequences(literal: ModuleType) -> None:
    model, ids = tiny("llama"), text(6, 10)
    each = [naive(model, "llama", row.unsqueeze(0), literal) for row in ids]
    got = measured(Lab(model, ids))
    for site in got.values:
        rises = [e[site] for e in each]
        assert got.stderr[site] == pytest.approx(np.std(rises, ddof=1) / np.sqrt(len(rises)), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_least_rises_go(seed: int, literal: ModuleType, rows: SimpleNamespace) -> None:
    model, ids = tiny("gpt2", seed=seed), text(3, 10)
    wanted = naive(model, "gpt2", ids, literal)
    for name, parts, metric in (("leave-one-out", 3, "sublayers"), ("leave-one-out-block", 2, "blocks")):
        units = sorted((s for s in wanted if s.count(".") == parts - 1), key=lambda s: wanted[s])
        steps = rows.plan(name, Lab(model, ids), Budget(metric=metric, drop=2))  # type: ignore[arg-type]
        assert [s.sites for s in steps] == [(u,) for u in units[:2]]
