"""The projections of attentions against slices that are cut by each family's own names and layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.anatomy.projections import _Probe, _Unclear, projections
from lamina.core.errors import UnsupportedError
from lamina.core.sites import Kind
from lamina.testing.models import NAMES, NanoGPT, lively, tiny

HEADS, SIZE, WIDTH = 4, 8, 32
SEPARATE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "mixtral", "granite", "cohere", "phi")


def apart(matrix: Tensor) -> Tensor:
    """[heads or groups · size, width] → [heads, size, width]."""
    split = matrix.unflatten(0, (-1, SIZE))
    return split.repeat_interleave(HEADS // len(split), 0)


def literal(model: Any, name: str, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [heads, size, width] and o [heads, width, size], by name."""
    if name in SEPARATE:
        layer = model.model.layers[number].self_attn
        out = layer.dense if name == "phi" else layer.o_proj
        made = [apart(m.weight) for m in (layer.q_proj, layer.k_proj, layer.v_proj)]
    elif name == "gpt2":
        layer = model.transformer.h[number].attn
        made, out = [apart(m) for m in layer.c_attn.weight.T.chunk(3)], layer.c_proj
        return *made, out.weight.T.unflatten(1, (HEADS, SIZE)).movedim(1, 0)
    elif name == "nanogpt":
        layer = model.blocks[number].mixes
        made, out = [apart(m) for m in layer.qkv.weight.chunk(3)], layer.out
    elif name == "gpt_neox":
        layer = model.gpt_neox.layers[number].attention
        made = list(layer.query_key_value.weight.unflatten(0, (HEADS, 3, SIZE)).unbind(1))
        out = layer.dense
    else:
        layer = model.transformer.h[number].self_attention
        groups = 2 if name == "falcon_new" else 1
        fused = layer.query_key_value.weight.unflatten(0, (groups, HEADS // groups + 2, SIZE))
        made = [fused[:, :-2].flatten(0, 1), *(fused[:, i].repeat_interleave(HEADS // groups, 0) for i in (-2, -1))]
        out = layer.dense
    return *made, out.weight.unflatten(1, (HEADS, SIZE)).movedim(1, 0)


def norms(model: Any, name: str) -> tuple[Tensor, bool, Tensor]:
    """Gain and centring of the norm before the first attention, and the gain of the one behind it."""
    ones = torch.ones(WIDTH)
    if name == "olmo2":
        return ones, False, model.model.layers[0].post_attention_layernorm.weight
    if name.startswith("gemma"):
        layer = model.model.layers[0]
        return 1 + layer.input_layernorm.weight, False, 1 + layer.post_attention_layernorm.weight
    if name == "gpt2":
        return model.transformer.h[0].ln_1.weight, True, ones
    if name == "nanogpt":
        return model.blocks[0].before.weight, True, ones
    if name == "gpt_neox":
        return model.gpt_neox.layers[0].input_layernorm.weight, True, ones
    if name.startswith("falcon"):
        layer = model.transformer.h[0]
        return (layer.ln_attn if name == "falcon_new" else layer.input_layernorm).weight, True, ones
    return model.model.layers[0].input_layernorm.weight, name in ("phi", "cohere"), ones


@pytest.mark.parametrize("name", NAMES)
def test_the_slices_are_those_of_the_family(name: str) -> None:
    model = tiny(name)
    anatomy = Anatomy.of(model)
    for number, site in enumerate(anatomy.of_kind(Kind.ATTENTION)):
        found = projections(anatomy, site)
        for made, wanted in zip((found.q, found.k, found.v, found.o), literal(model, name, number), strict=True):
            assert made.dtype == torch.float32
            assert torch.equal(made, wanted), site.id


@pytest.mark.parametrize("name", NAMES)
def test_norms_before_and_behind(name: str) -> None:
    model = tiny(name)
    anatomy = Anatomy.of(model)
    found = projections(anatomy, "block.0.attention")
    gain, centred, after = norms(model, name)
    torch.testing.assert_close(found.gain, gain.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gain_after, after.detach(), rtol=1e-4, atol=1e-5)
    assert found.centred is centred
    assert found.group == {"falcon": 4, "gpt2": 1, "gpt_neox": 1, "phi": 1, "nanogpt": 1}.get(name, 2)


def test_bfloat16_and_trained_weights_are_read_as_they_are() -> None:
    anatomy = Anatomy.of(tiny("llama").to(torch.bfloat16))
    before = projections(anatomy, "block.1.attention")
    layer = anatomy.model.model.layers[1].self_attn  # type: ignore[union-attr,index]
    with torch.no_grad():
        layer.v_proj.weight.mul_(2)
    after = projections(anatomy, "block.1.attention")
    assert torch.equal(after.v, 2 * before.v)
    assert torch.equal(after.q, before.q)


def test_the_model_is_left_as_it_was() -> None:
    from lamina.testing.bench import expect_same, picture

    anatomy = Anatomy.of(tiny("qwen3").train())
    before = picture(anatomy.model)
    projections(anatomy, "block.2.attention")
    expect_same(before, picture(anatomy.model), "finding projections")


def test_many_heads_need_two_digits() -> None:
    model = tiny("llama", hidden_size=256, num_attention_heads=16, num_key_value_heads=4)
    found = projections(Anatomy.of(model), "block.0.attention")
    layer: Any = model.model.layers[0].self_attn  # type: ignore[union-attr,index]
    assert torch.equal(found.q, layer.q_proj.weight.unflatten(0, (16, 16)))
    assert torch.equal(found.v, layer.v_proj.weight.unflatten(0, (4, 16)).repeat_interleave(4, 0))


class _Mixed(nn.Module):
    """An attention whose values are a sum of two maps' outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)

    def values(self, x: Tensor, v: Tensor) -> Tensor:
        return v + self.two(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.one(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, self.values(x, v)))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _Chained(_Mixed):
    """An attention whose values are made in two steps."""

    def values(self, x: Tensor, v: Tensor) -> Tensor:
        return self.two(v)


class _Scaled(_Mixed):
    """An attention whose values are bent after the map."""

    def values(self, x: Tensor, v: Tensor) -> Tensor:
        return v * x.square().mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("made", "why"), [(_Mixed, "mixed|no single map"), (_Chained, "reads something else"), (_Scaled, "miss")]
)
def test_what_can_not_be_told_is_refused(made: type[nn.Module], why: str) -> None:
    model = NanoGPT()
    model.blocks[1].mixes = made(WIDTH)  # type: ignore[index,union-attr]
    model = lively(model).eval()
    anatomy = Anatomy.of(model)
    branch = replace(anatomy.branch(anatomy.parts("block.1")[0]), site=anatomy.branch("block.0.attention").site)
    with pytest.raises(_Unclear, match=why), torch.no_grad():
        _Probe(anatomy, anatomy.block("block.1"), branch).found()
    projections(anatomy, "block.0.attention")


def test_other_sublayers_have_none() -> None:
    anatomy = Anatomy.of(tiny("llama"))
    with pytest.raises(UnsupportedError, match="no queries"):
        projections(anatomy, "block.0.mlp")
