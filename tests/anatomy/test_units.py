"""Heads, KV groups, neurons and experts: their number, their slices, and that zeroing one is cutting it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lamina.anatomy import Anatomy
from lamina.core.errors import CertificateError, InputError
from lamina.core.sites import Kind, Site, Tie
from lamina.testing import zoo
from lamina.testing.bench import fresh

# Of block 1: kind → how many. Written down from the configs; heads of falcon_new come two to a key, in one matrix with
# it, so that their rows are in unequal steps.
WIDTHS: dict[str, dict[str, int]] = {
    "llama": {"attention.head": 4, "attention.kv_group": 2, "mlp.neuron": 64},
    "gpt2": {"attention.head": 4, "attention.kv_group": 4, "mlp.neuron": 128},
    "gpt_neox": {"attention.head": 4, "attention.kv_group": 4, "mlp.neuron": 64},
    "falcon_new": {"attention.kv_group": 2, "mlp.neuron": 128},
    "phi": {"attention.head": 4, "attention.kv_group": 4, "mlp.neuron": 64},
    "gemma2": {"attention.head": 4, "attention.kv_group": 2, "mlp.neuron": 64},
    "mixtral": {"attention.head": 4, "attention.kv_group": 2, "moe.expert": 4},
    "nanogpt": {"attention.head": 4, "attention.kv_group": 4, "mlp.neuron": 128},
    "zoo phi3": {"attention.head": 4, "attention.kv_group": 2, "mlp.neuron": 64},
    "zoo deepseek_v2": {"attention.head": 4, "attention.kv_group": 4, "moe.expert": 4},
    "zoo bert": {"attention.head": 4, "attention.kv_group": 4, "mlp.neuron": 64},
    "zoo t5": {"attention.head": 4, "attention.kv_group": 4, "mlp.neuron": 64},
    "zoo vit": {"attention.head": 4, "attention.kv_group": 4, "mlp.neuron": 64},
}
# (end of the parameter's name, dimension, slice per unit, start), for one kind of unit of block 1.
SLICES: dict[tuple[str, str], set[tuple[str, int, int, int]]] = {
    ("llama", "attention.head"): {("q_proj.weight", 0, 8, 0), ("o_proj.weight", 1, 8, 0)},
    ("llama", "attention.kv_group"): {
        ("q_proj.weight", 0, 16, 0), ("k_proj.weight", 0, 8, 0), ("v_proj.weight", 0, 8, 0), ("o_proj.weight", 1, 16, 0)
    },
    ("llama", "mlp.neuron"): {
        ("gate_proj.weight", 0, 1, 0), ("up_proj.weight", 0, 1, 0), ("down_proj.weight", 1, 1, 0)
    },
    ("gpt2", "attention.head"): {
        *(("c_attn.weight", 1, 8, start) for start in (0, 32, 64)),
        *(("c_attn.bias", 0, 8, start) for start in (0, 32, 64)),
        ("attn.c_proj.weight", 0, 8, 0),
    },
    ("gpt2", "mlp.neuron"): {("c_fc.weight", 1, 1, 0), ("c_fc.bias", 0, 1, 0), ("mlp.c_proj.weight", 0, 1, 0)},
    ("gpt_neox", "attention.head"): {
        ("query_key_value.weight", 0, 24, 0), ("query_key_value.bias", 0, 24, 0), ("dense.weight", 1, 8, 0)
    },
    ("falcon_new", "attention.kv_group"): {("query_key_value.weight", 0, 32, 0), ("dense.weight", 1, 16, 0)},
    ("mixtral", "moe.expert"): {
        ("gate.weight", 0, 1, 0), ("experts.gate_up_proj", 0, 1, 0), ("experts.down_proj", 0, 1, 0)
    },
    ("nanogpt", "attention.head"): {
        *((f"qkv.{p}", 0, 8, start) for start in (0, 32, 64) for p in ("weight", "bias")), ("out.weight", 1, 8, 0)
    },
    ("zoo phi3", "attention.kv_group"): {
        ("qkv_proj.weight", 0, 16, 0), ("qkv_proj.weight", 0, 8, 32), ("qkv_proj.weight", 0, 8, 48),
        ("o_proj.weight", 1, 16, 0),
    },
    ("zoo phi3", "mlp.neuron"): {
        ("gate_up_proj.weight", 0, 1, 0), ("gate_up_proj.weight", 0, 1, 64), ("down_proj.weight", 1, 1, 0)
    },
}  # fmt: skip


@cache
def found(name: str) -> Anatomy:
    if name.startswith("zoo "):
        specimen = zoo.build(name.removeprefix("zoo "))
        return Anatomy.of(specimen.model, specimen.sample)
    return fresh(name)[1]


def units(name: str) -> dict[str, Site]:
    """The units of the second block of the first stack, by the end of their ids."""
    anatomy = found(name)
    block = anatomy.stacks[0].blocks[1].site.id
    return {s.id.removeprefix(f"{block}."): s for s in anatomy.units(block)}


@pytest.mark.parametrize("name", WIDTHS)
def test_widths(name: str) -> None:
    assert {k: s.width for k, s in units(name).items()} == WIDTHS[name]
    for site in units(name).values():
        parent = found(name).site(site.id.rpartition(".")[0])
        assert (site.path, site.block) == (parent.path, parent.block)
        assert found(name).units(parent, site.kind) == (site,)


@pytest.mark.parametrize("name", WIDTHS)
def test_zeroing_a_unit_is_cutting_it(name: str) -> None:
    for key, site in units(name).items():
        certificate = found(name).certify_units(site)
        # The bias over positions that T5's first block hands on has as many heads as before the cut.
        assert certificate.how == ("mask" if name == "zoo t5" and "attention" in key else "cut"), key
        assert certificate.error <= 1e-6
        assert certificate.tested


@pytest.mark.parametrize(("name", "key"), SLICES)
def test_slices(name: str, key: str) -> None:
    ties = found(name).ties(units(name)[key])
    for end, dim, size, start in SLICES[name, key]:
        assert [t for t in ties if t.param.endswith(end) and (t.dim, t.size, t.start) == (dim, size, start)], end
    assert len(ties) == len(SLICES[name, key])


@pytest.mark.parametrize("name", WIDTHS)
def test_units_share_no_slice_and_stay_inside(name: str) -> None:
    anatomy = found(name)
    values = {**dict(anatomy.model.named_parameters()), **dict(anatomy.model.named_buffers())}
    for site in units(name).values():
        seen: set[tuple[str, int, int]] = set()
        for tie in anatomy.ties(site):
            rows = range(tie.start, tie.start + site.width * tie.size)
            assert rows.start >= 0
            assert rows.stop <= values[tie.param].shape[tie.dim]
            assert not seen & {(tie.param, tie.dim, r) for r in rows}
            seen |= {(tie.param, tie.dim, r) for r in rows}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "nanogpt", "zoo phi3"])
def test_wrong_slices_are_found_out(name: str) -> None:
    anatomy = found(name)
    for site in units(name).values():
        ties = anatomy.ties(site)
        for number, tie in enumerate(ties):
            shifted = replace(tie, start=tie.start + 1)
            wide = replace(tie, size=tie.size + 1)
            swapped = replace(tie, start=tie.start + tie.size)
            for wrong in (shifted, wide, swapped):
                changed: tuple[Tie, ...] = (*ties[:number], wrong, *ties[number + 1 :])
                with pytest.raises(CertificateError):
                    anatomy.certify_units(site, changed)


CHANNELS: dict[str, set[tuple[str, int]]] = {
    "gemma2": {
        ("self_attn.q_proj.weight", 1), ("self_attn.k_proj.weight", 1), ("self_attn.v_proj.weight", 1),
        ("self_attn.o_proj.weight", 0), ("mlp.gate_proj.weight", 1), ("mlp.up_proj.weight", 1),
        ("mlp.down_proj.weight", 0), ("input_layernorm.weight", 0), ("post_attention_layernorm.weight", 0),
        ("pre_feedforward_layernorm.weight", 0), ("post_feedforward_layernorm.weight", 0),
    },
    "gpt2": {
        ("ln_1.weight", 0), ("ln_1.bias", 0), ("ln_2.weight", 0), ("ln_2.bias", 0), ("attn.c_attn.weight", 0),
        ("attn.c_proj.weight", 1), ("attn.c_proj.bias", 0), ("mlp.c_fc.weight", 0), ("mlp.c_proj.weight", 1),
        ("mlp.c_proj.bias", 0),
    },
    "mixtral": {
        ("self_attn.q_proj.weight", 1), ("self_attn.k_proj.weight", 1), ("self_attn.v_proj.weight", 1),
        ("self_attn.o_proj.weight", 0), ("mlp.gate.weight", 1), ("mlp.experts.gate_up_proj", 2),
        ("mlp.experts.down_proj", 1), ("input_layernorm.weight", 0), ("post_attention_layernorm.weight", 0),
    },
}  # fmt: skip
OUTER = {
    "gemma2": {("model.embed_tokens.weight", 1), ("model.norm.weight", 0)},
    "gpt2": {
        ("transformer.wte.weight", 1), ("transformer.wpe.weight", 1), ("transformer.ln_f.weight", 0),
        ("transformer.ln_f.bias", 0),
    },
    "mixtral": {("model.embed_tokens.weight", 1), ("model.norm.weight", 0), ("lm_head.weight", 1)},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANNELS)
def test_channels(name: str) -> None:
    anatomy = found(name)
    site = anatomy.channels(anatomy.stacks[0])
    assert site is not None
    assert (site.id, site.kind, site.width, site.block) == ("channel", Kind.CHANNEL, 32, None)
    expected = {(f"{b.path}.{end}", dim) for b in anatomy.stacks[0].blocks for end, dim in CHANNELS[name]}
    assert {(t.param, t.dim) for t in anatomy.ties(site)} == expected | OUTER[name]
    assert {(t.size, t.start) for t in anatomy.ties(site)} == {(1, 0)}


def test_norms_of_the_stream_itself_mix_its_channels() -> None:
    anatomy = found("zoo bert")
    assert anatomy.channels(anatomy.stacks[0]) is None
    assert anatomy.refused_channels(anatomy.stacks[0])


def test_experts_of_others_are_found_out() -> None:
    anatomy = found("mixtral")
    site = units("mixtral")["moe.expert"]
    ties = anatomy.ties(site)
    with pytest.raises(CertificateError):
        anatomy.certify_units(site, tuple(replace(t, dim=1) if t.param.endswith("down_proj") else t for t in ties))


def test_what_is_refused_says_why() -> None:
    anatomy = found("falcon_new")
    (site, reason), *more = anatomy.refused_units("block.1").items()
    assert not more
    assert site == "block.1.attention.head"
    assert "not in equal steps" in reason
    assert not anatomy.units("block.1.attention", Kind.HEAD)
    with pytest.raises(InputError, match="no such units"):
        anatomy.ties(Site("block.1.attention.head", Kind.HEAD, "transformer.h.1.self_attention", 1, 4))
    with pytest.raises(InputError, match="no such block or sublayer"):
        anatomy.units("block.9")


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon_new", "cohere", "zoo bert"])
def test_sublayers_cover_every_parameter_of_the_blocks_but_shared_norms(name: str) -> None:
    anatomy = found(name)
    assert all(len(owners) <= 1 for owners in anatomy.coverage().values())
    inside = {n for n, place in anatomy.uncovered().items() if place}
    assert all(dict(anatomy.model.named_parameters())[n].ndim == 1 for n in inside)
    assert bool(inside) == (name in {"cohere", "zoo bert"})


def test_looking_for_units_leaves_the_model_as_it_was() -> None:
    from lamina.testing.bench import expect_same, picture

    model, anatomy, _ = fresh("mixtral")
    model.train()
    before = picture(model)
    for block in anatomy.of_kind(Kind.BLOCK):
        assert anatomy.units(block)
    expect_same(before, picture(model), "looking for units")
    assert torch.is_grad_enabled()


@pytest.mark.real
def test_smollm2() -> None:
    from lamina.lab.load import load

    anatomy = Anatomy.of(load("smollm2-135m", dtype="float32").model)
    found_units = {s.id: s.width for s in anatomy.units("block.7")}
    assert found_units == {"block.7.attention.head": 9, "block.7.attention.kv_group": 3, "block.7.mlp.neuron": 1536}
    stream = anatomy.channels(anatomy.stacks[0])
    assert stream is not None
    assert (stream.width, len(anatomy.ties(stream))) == (576, 30 * 9 + 2)
    for site in anatomy.units("block.7"):
        assert anatomy.certify_units(site).how == "cut"
