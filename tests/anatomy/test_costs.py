"""Costs against literal counts: the state dict, torch's FLOP counter, and a real cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_kinds import LAYERS, kind
from torch.utils.flop_counter import FlopCounterMode

from lamina.anatomy import Anatomy
from lamina.anatomy.stacks import call
from lamina.anatomy.trial import ablated
from lamina.core.sites import SUBLAYERS, Cost, Kind
from lamina.testing import zoo
from lamina.testing.bench import fresh
from lamina.testing.models import CONFIGS, NAMES, tiny
from lamina.testing.rewrites import logits


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_bytes_are_the_state_dict_s(name: str) -> None:
    model, anatomy, _ = fresh(name)
    storage = {t.data_ptr(): t for k, t in model.state_dict().items() if k in dict(model.named_parameters())}
    assert anatomy.total().parameters == sum(t.numel() for t in storage.values())
    assert anatomy.total().bytes == 4 * anatomy.total().parameters
    for site in anatomy.of_kind(Kind.BLOCK):
        held = {k: t for k, t in model.state_dict().items() if k.startswith(site.path + ".")}
        assert anatomy.cost(site).parameters == sum(t.numel() for t in held.values())
        parts = [anatomy.cost(p).parameters for p in anatomy.parts(site)]
        shared = anatomy.cost(site).parameters - sum(parts)
        if name in ("phi", "cohere", "falcon"):
            norm = {k: t for k, t in held.items() if "input_layernorm" in k}
            assert shared == sum(t.numel() for t in norm.values()) > 0
        else:
            assert shared == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon"])
def test_tied_weights_count_once(name: str) -> None:
    tied, loose = (Anatomy.of(tiny(name, tie_word_embeddings=t)).total() for t in (True, False))
    assert loose.parameters - tied.parameters == 99 * 32
    assert loose.bytes - tied.bytes == 4 * 99 * 32
    assert loose.macs == tied.macs


def test_sixteen_bits_take_half() -> None:
    full, half = fresh("llama")[1].total(), fresh("llama", dtype=torch.bfloat16)[1].total()
    assert (half.parameters, half.macs) == (full.parameters, full.macs)
    assert (2 * half.bytes, 2 * half.kv_bytes) == (full.bytes, full.kv_bytes)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mixtral"])
def test_products_are_the_flop_counter_s(name: str) -> None:
    model, anatomy, _ = fresh(name)
    with FlopCounterMode(display=False) as counter:
        logits(model, anatomy.sample["input_ids"])
    tokens = anatomy.sample["input_ids"].numel()
    exact = counter.get_total_flops() / 2 / tokens
    assert anatomy.total().macs == pytest.approx(exact, rel=0.01)
    flops: dict[str, dict[Any, int]] = counter.get_flop_counts()
    for site in anatomy.of_kind(Kind.BLOCK):
        key = next(k for k in flops if k.endswith("." + site.path))
        assert anatomy.cost(site).macs == pytest.approx(sum(flops[key].values()) / 2 / tokens, rel=0.01)
        assert sum(anatomy.cost(p).macs for p in anatomy.parts(site)) == pytest.approx(
            anatomy.cost(site).macs, rel=0.01
        )


@pytest.mark.parametrize("name", ["bert", "hrm_text", "swin", "t5", "vit", "whisper"])
def test_what_goes_is_what_the_flop_counter_misses(name: str) -> None:
    """Also in stages that are narrower than the first, in a decoder, and where blocks are run several times."""
    made = zoo.build(name)
    anatomy = Anatomy.of(made.model, made.sample)
    tokens = flops(made) / 2 / anatomy.total().macs
    for stack in anatomy.stacks:
        branch = stack.blocks[-1].branches[-1]
        with ablated(made.model, anatomy, [branch.site.id]):
            assert branch.macs > 0
            assert anatomy.total().macs - flops(made) / 2 / tokens == pytest.approx(branch.macs, rel=0.01, abs=1)


def flops(made: zoo.Specimen) -> int:
    with FlopCounterMode(display=False) as counter:
        call(made.model, made.sample)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_products_of_a_linear_map_by_hand(name: str) -> None:
    model, anatomy, _ = fresh(name)
    if name == "mixtral":
        return
    for site in anatomy.of_kind(Kind.MLP):
        core = model.get_submodule(site.path)
        by_hand = sum(p.numel() for p in core.parameters() if p.ndim == 2)
        assert anatomy.cost(site).macs == by_hand


@pytest.mark.parametrize("name", list(CONFIGS))
@torch.no_grad()
def test_kv_bytes_are_a_real_cache_s(name: str) -> None:
    model, anatomy, ids = fresh(name)
    cache: Any = model(ids[:1, :5], use_cache=True).past_key_values
    per_layer = [(c.keys.numel() + c.values.numel()) * 4 // 5 for c in cache.layers]
    assert anatomy.total().kv_bytes == sum(per_layer)
    assert [anatomy.cost(s).kv_bytes for s in anatomy.of_kind(Kind.ATTENTION)] == per_layer
    assert all(anatomy.cost(s).kv_bytes == 0 for s in anatomy.of_kind(Kind.MLP, Kind.MOE))
    heads = {"falcon": 1, "falcon_new": 4, "gpt2": 4, "gpt_neox": 4, "phi": 4}.get(name, 2)  # falcon_new repeats them
    assert per_layer == [2 * heads * 8 * 4] * 4


@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_an_encoder_decoder_keeps_what_both_its_attentions_read(name: str) -> None:
    """Per token of what each reads: the decoder's own, and the encoder's."""
    model, sample = kind(name)
    anatomy = Anatomy.of(model, sample)
    cache = model(**sample, use_cache=True).past_key_values
    tokens = {Kind.ATTENTION: sample["decoder_input_ids"].shape[1], Kind.CROSS_ATTENTION: sample["input_ids"].shape[1]}
    whole = 0
    for held, what in (
        (cache.self_attention_cache, Kind.ATTENTION),
        (cache.cross_attention_cache, Kind.CROSS_ATTENTION),
    ):
        per_layer = [(c.keys.numel() + c.values.numel()) * 4 // (2 * tokens[what]) for c in held.layers]
        (decoder,) = (k for k in anatomy.stacks if "decoder" in k.path)
        sites = [x.site for b in decoder.blocks for x in b.branches if x.site.kind is what]
        assert [anatomy.cost(s).kv_bytes for s in sites] == per_layer == [2 * 16 * 4] * LAYERS
        whole += sum(per_layer)
    assert anatomy.total().kv_bytes == whole
    assert all(anatomy.cost(s).kv_bytes == 0 for s in anatomy.sublayers if s.id.startswith("encoder"))


def test_without_a_cache_no_kv_bytes() -> None:
    assert fresh("nanogpt")[1].total().kv_bytes == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_dropping_frees(name: str) -> None:
    anatomy = fresh(name)[1]
    one, other = (p.id for p in anatomy.parts("block.1"))
    assert anatomy.freed([one]) == anatomy.cost(one)
    assert anatomy.freed([one, other]) == anatomy.freed(["block.1"]) == anatomy.cost("block.1")
    assert anatomy.freed(["block.1", one]) == anatomy.cost("block.1")
    assert anatomy.freed([]) == Cost()
    assert anatomy.freed([s.id for s in anatomy.sites if s.kind in SUBLAYERS]) == sum(
        (anatomy.cost(s) for s in anatomy.of_kind(Kind.BLOCK)), Cost()
    )
