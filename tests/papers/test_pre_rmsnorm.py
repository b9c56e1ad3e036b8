"""Pre-RMSNorm against the paper's conversion written out by hand, on every tiny model that has LayerNorms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_kinds import bert, kind
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lamina.anatomy import Anatomy
from lamina.core.documents import Step
from lamina.core.errors import LaminaError
from lamina.core.registry import REWRITES, rewrite_of
from lamina.exporters.hf import form, save_checkpoint
from lamina.lab import Lab
from lamina.testing.models import lively, text, tiny

IDS = text(3, 9)
LAYER_NORMS = ("gpt2", "gpt_neox", "phi", "falcon", "falcon_new", "cohere", "nanogpt")
SMALL: dict[str, Any] = {"vocab_size": 99, "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "starcoder2": ("Starcoder2Config", {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}),
    "gptj": ("GPTJConfig", {"vocab_size": 99, "n_layer": 3, "n_embd": 32, "n_head": 4, "rotary_dim": 4}),
    "stablelm": ("StableLmConfig", {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}),
}


def built(name: str) -> Any:
    if name not in OTHERS:
        return tiny(name)
    config, settings_ = OTHERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lively(AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings_))).eval()


def step(anatomy: Anatomy) -> Step:
    return Step(rewrite="rms-norm", sites=tuple(b.site.id for k in anatomy.stacks for b in k.blocks))


def converted(model: Any) -> tuple[Lab, Any]:
    lab = Lab(model, IDS)
    return lab, rewrite_of(one := step(lab.anatomy)).apply(one, lab)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    out = model(ids)
    return getattr(out, "logits", out)


def streams(lab: Lab) -> list[Tensor]:
    """What enters every block, and what leaves the last."""
    met: list[Tensor] = []
    blocks = lab.anatomy.stacks[0].blocks
    handles = []
    for block in blocks:

        def note(_: nn.Module, args: Any, kwargs: Any, place: int | str = block.stream) -> None:
            met.append(args[place] if isinstance(place, int) else kwargs[place])

        handles.append(lab.model.get_submodule(block.path).register_forward_pre_hook(note, with_kwargs=True))
    logits(lab.model)
    for handle in handles:
        handle.remove()
    return met


@pytest.mark.parametrize("name", [*LAYER_NORMS, *OTHERS])
def test_the_network_computes_the_same_and_its_stream_has_no_mean(name: str) -> None:
    model = built(name)
    dense = logits(model)
    means = [float(s.mean(-1).abs().max()) for s in streams(Lab(model, IDS))]
    assert max(means) > 1e-2, "there was no mean to take out"
    lab, receipt = converted(model)
    torch.testing.assert_close(logits(lab.model), dense, rtol=1e-4, atol=2e-5)
    assert max(float(s.mean(-1).abs().max()) for s in streams(lab)) < 2e-5
    left = [m for m in lab.model.modules() if "LayerNorm" in type(m).__name__]
    assert not left, "norms that take a mean away are left"
    assert receipt.before == receipt.after == lab.anatomy.total()


def by_hand(model: Any, ids: Tensor) -> Tensor:
    """The paper's steps on the plain model: gains into the readers, writers without their mean, norms without one."""

    def rms(x: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def folded(norm: nn.LayerNorm, reader: nn.Linear) -> tuple[Tensor, Tensor]:
        bias = torch.zeros(len(reader.weight)).to(reader.weight) if reader.bias is None else reader.bias
        return reader.weight * norm.weight, bias + reader.weight @ norm.bias

    def no_mean(writer: nn.Linear) -> tuple[Tensor, Tensor]:
        return writer.weight - writer.weight.mean(0), writer.bias - writer.bias.mean()

    x = model.tokens.weight[ids] + model.places.weight[: ids.shape[1]]
    x = x - x.mean(-1, keepdim=True)
    for block in model.blocks:
        weight, bias = folded(block.before, block.mixes.qkv)
        qkv = rms(x, block.before.eps) @ weight.T + bias
        q, k, v = (t.unflatten(-1, (block.mixes.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        weight, bias = no_mean(block.mixes.out)
        x = x + mixed @ weight.T + bias
        weight, bias = folded(block.between, block.feeds[0])
        wide = nn.functional.gelu(rms(x, block.between.eps) @ weight.T + bias)
        weight, bias = no_mean(block.feeds[2])
        x = x + wide @ weight.T + bias
    weight, bias = folded(model.norm, model.head)
    return rms(x, model.norm.eps) @ weight.T + bias


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 20))
def test_it_is_the_conversion_by_hand(seed: int) -> None:
    model = tiny("nanogpt", seed=seed).double()
    with torch.no_grad():
        dense, hand = logits(model), by_hand(model, IDS)
    torch.testing.assert_close(hand, dense, rtol=1e-9, atol=1e-9)
    lab, _ = converted(model)  # the new norm computes in float32
    torch.testing.assert_close(logits(lab.model), hand, rtol=1e-4, atol=1e-4)


def test_dropping_a_channel_loses_nothing() -> None:
    """What CRMSNorm rests on: the last channel of the stream is minus the sum of the others."""
    lab, _ = converted(tiny("gpt2"))
    for stream in streams(lab):
        torch.testing.assert_close(stream[..., -1], -stream[..., :-1].sum(-1), rtol=1e-4, atol=5e-5)


def test_tied_embeddings_stay_tied_and_survive_a_checkpoint(tmp_path: Path) -> None:
    model = tiny("gpt2")
    dense, head = logits(model), model.lm_head.weight.clone()
    lab, receipt = converted(model)
    assert lab.model.lm_head.weight is lab.model.transformer.wte.weight
    assert torch.equal(lab.model.lm_head.weight, head), "the head reads the weights as they were"
    assert form(lab.model, [receipt]) == "shim"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(loaded), dense, rtol=1e-4, atol=2e-5)


def test_low_precision_stays_within_its_rounding() -> None:
    model = tiny("gpt_neox").to(torch.bfloat16)
    dense = logits(model).float()
    lab, _ = converted(model)
    apart = (logits(lab.model).float() - dense).norm() / dense.norm()
    assert 0 < float(apart) < 0.05
    assert all(p.dtype == torch.bfloat16 for p in lab.model.parameters())


def bloom() -> Anatomy:
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=3, n_head=4)
    return Anatomy.of(lively(AutoModelForCausalLM.from_config(config)).eval())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Anatomy.of(tiny("llama")), "takes no mean away"),
        (lambda: Anatomy.of(tiny("olmo2")), "not a linear map's own output"),
        (lambda: Anatomy.of(*bert()), "more to the stream"),
        (lambda: Anatomy.of(*kind("t5")), "several streams"),
        (bloom, "no linear map and no embedding"),
    ],
    ids=["llama", "olmo2", "bert", "t5", "bloom"],
)
def test_other_networks_are_refused_in_one_line(make: Any, words: str) -> None:
    anatomy = make()
    problems = REWRITES.make("rms-norm").check(step(anatomy), anatomy)
    assert problems
    assert words in problems[0].what
    assert all("\n" not in p.what for p in problems)


def test_a_reader_of_the_mean_is_found() -> None:
    """A head that reads the stream itself would answer otherwise: refused, and nothing is changed."""
    model = tiny("nanogpt")
    model.norm = nn.Identity()
    before = logits(model)
    with pytest.raises(LaminaError, match="reads the stream's mean"):
        converted(model)
    assert torch.equal(logits(model), before)


def test_part_of_the_blocks_is_not_enough() -> None:
    anatomy = Anatomy.of(tiny("gpt2"))
    method = REWRITES.make("rms-norm")
    assert "together" in method.check(Step(rewrite="rms-norm", sites=("block.1",)), anatomy)[0].what
    assert "no such block" in method.check(Step(rewrite="rms-norm", sites=("block.9",)), anatomy)[0].what
    assert method.check(Step(rewrite="rms-norm", sites=()), anatomy)
