"""Narrow against masks by hand, and the refit against least squares on columns that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.core.documents import ModelRef, Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import REWRITES
from lamina.core.sites import Kind
from lamina.exporters.hf import form, save_checkpoint
from lamina.lab import Lab
from lamina.rewrites.narrow import taken_over
from lamina.testing.models import lively, text, tiny


def step(gone: dict[str, list[int]]) -> Step:
    return Step(rewrite="narrow", sites=tuple(gone), options={"gone": gone})


@torch.no_grad()
def masked(model: Any, ids: Tensor, columns: dict[str, list[int]]) -> Tensor:
    """Logits with zeros in these columns of the input of maps."""
    handles = []
    for path, out in columns.items():

        def mask(_: Any, args: Any, out: list[int] = out) -> Any:
            x = args[0].clone()
            x[..., out] = 0
            return (x, *args[1:])

        handles.append(model.get_submodule(path).register_forward_pre_hook(mask))
    logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def test_neurons_heads_and_groups_that_go_are_masked_inputs_of_the_last_maps() -> None:
    model, ids = tiny("llama"), text(3, 10)  # 4 heads of 8 in 2 groups, 64 neurons
    gone = {
        "block.0.mlp.neuron": [0, 5, 63],
        "block.2.mlp.neuron": list(range(10, 50)),
        "block.1.attention.kv_group": [1],
    }
    heads = {"block.3.attention.head": [1, 2]}
    width = model.model.layers[0].self_attn.head_dim
    count = model.config.num_attention_heads // model.config.num_key_value_heads
    columns = {
        "model.layers.0.mlp.down_proj": gone["block.0.mlp.neuron"],
        "model.layers.2.mlp.down_proj": gone["block.2.mlp.neuron"],
        "model.layers.1.self_attn.o_proj": list(range(count * width, 2 * count * width)),
        "model.layers.3.self_attn.o_proj": [c for h in (1, 2) for c in range(h * width, (h + 1) * width)],
    }
    want = masked(model, ids, columns)
    lab = Lab(model, ids)
    receipt = REWRITES.make("narrow").apply(step(gone | heads), lab)
    with torch.no_grad():
        torch.testing.assert_close(lab.model(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
    layers = lab.model.model.layers
    assert layers[0].mlp.up_proj.weight.shape == (61, 32)
    assert layers[2].mlp.down_proj.in_features == 24
    assert layers[1].self_attn.k_proj.out_features == width
    assert layers[3].self_attn.q_proj.out_features == 2 * width
    assert receipt.after.kv_bytes < receipt.before.kv_bytes


def test_equal_widths_are_told_by_the_config_and_need_no_shim(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = tiny("llama"), text(2, 9)
    lab = Lab(model, ids)
    gone = {s.id: [n, n + 2, *range(40, 54)] for n, s in enumerate(lab.anatomy.of_kind(Kind.NEURON))}
    receipt = REWRITES.make("narrow").apply(step(gone), lab)
    assert lab.model.config.intermediate_size == 48
    assert form(lab.model, [receipt]) == "stock"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
        torch.testing.assert_close(again(ids).logits, lab.model(ids).logits)


def test_uneven_widths_travel_with_the_shim(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = tiny("qwen2"), text(2, 9)
    lab = Lab(model, ids)
    gone = {"block.0.mlp.neuron": [3, 4], "block.1.attention.kv_group": [0]}
    receipt = REWRITES.make("narrow").apply(step(gone), lab)
    assert form(lab.model, [receipt]) == "shim"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
        torch.testing.assert_close(again(ids).logits, lab.model(ids).logits)
    assert ModelRef(name="tiny", fingerprint="x").name == "tiny"


def test_taken_over_is_the_ridge_regression_of_what_goes() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 9, generator=draw, dtype=torch.float64)
    z = torch.randn(200, 9, generator=draw, dtype=torch.float64) @ torch.randn(
        9, 9, generator=draw, dtype=torch.float64
    )
    gone, keep, ridge = [1, 4, 8], [0, 2, 3, 5, 6, 7], 0.05
    got = taken_over(weight, z.T @ z, gone, ridge)
    level = ridge * z[:, keep].square().sum(0).mean()
    a = torch.cat([z[:, keep], level.sqrt() * torch.eye(6, dtype=torch.float64)])
    b = torch.cat([z[:, gone] @ weight[:, gone].T, torch.zeros(6, 5, dtype=torch.float64)])
    change = torch.linalg.lstsq(a, b).solution.T
    torch.testing.assert_close(got[:, keep], weight[:, keep] + change)
    assert torch.equal(got[:, gone], weight[:, gone])


def test_a_twin_neuron_is_made_up_for_wholly() -> None:
    model, ids = lively(tiny("llama")), text(6, 16)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight[7] = mlp.up_proj.weight[3]
        mlp.gate_proj.weight[7] = mlp.gate_proj.weight[3]
        want = model(ids).logits
    plain, lab = Lab(tiny("llama"), ids), Lab(model, ids)
    plain.model.load_state_dict(model.state_dict())
    REWRITES.make("narrow").apply(step({"block.1.mlp.neuron": [7]}), plain)
    REWRITES.make("narrow", {"refit": 1e-6}).apply(step({"block.1.mlp.neuron": [7]}), lab)
    with torch.no_grad():
        off = [float((m(ids).logits - want).abs().max()) for m in (plain.model, lab.model)]
    assert off[1] < 1e-3 * off[0]


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ({"block.1.mlp.neuron": [64]}, "units 0 to 63"),
        ({"block.1.mlp.neuron": []}, "no unit"),
        ({"block.1.mlp.neuron": list(range(64))}, "none of its units"),
        ({"block.1.attention.head": [0]}, "unequal"),
        ({"block.1.mlp": [0]}, "name a site of units"),
        ({"block.7.mlp.neuron": [0]}, "no such units"),
    ],
)
def test_what_cannot_be_done_is_told(gone: dict[str, list[int]], said: str) -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    with pytest.raises(LaminaError, match=said):
        REWRITES.make("narrow").apply(step(gone), lab)


def test_a_refit_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match="refit"):
        REWRITES.make("narrow", {"refit": -1})


def narrowed(name: str, gone: dict[str, list[int]], ids: Tensor) -> tuple[Lab, Any]:
    """A tiny model without these units, and what it was."""
    dense: Any = tiny(name)
    lab = Lab(tiny(name), ids)
    forecast = REWRITES.make("narrow").forecast(step(gone), lab.anatomy)
    receipt = REWRITES.make("narrow").apply(step(gone), lab)
    assert receipt.after == forecast == lab.anatomy.total()
    return lab, dense


def mixture_by_hand(moe: Any, x: Tensor, kept: list[int]) -> Tensor:
    """Token by token: the two best of the kept experts, their shares of the two scores, gated maps."""
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        scores = (moe.gate.weight[kept] @ token).softmax(0)
        best = scores.argsort(descending=True)[:2]
        for place in best:
            gate, up = (moe.experts.gate_up_proj[kept[place]] @ token).chunk(2)
            value = moe.experts.down_proj[kept[place]] @ (torch.nn.functional.silu(gate) * up)
            out[t] += scores[place] / scores[best].sum() * value
    return out


@torch.no_grad()
def test_experts_that_go_are_never_chosen() -> None:
    ids = text(3, 10)
    gone = {"block.0.moe.expert": [1], "block.2.moe.expert": [0, 3]}
    lab, dense = narrowed("mixtral", gone, ids)
    kept = {0: [0, 2, 3], 1: [0, 1, 2, 3], 2: [1, 2], 3: [0, 1, 2, 3]}
    for number, layer in enumerate(dense.model.layers):
        layer.mlp.forward = lambda x, m=layer.mlp, k=kept[number]: mixture_by_hand(m, x.flatten(0, 1), k).view_as(x)
    torch.testing.assert_close(lab.model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    mine: Any = lab.model
    assert mine.model.layers[2].mlp.experts.down_proj.shape[0] == mine.model.layers[2].mlp.experts.num_experts == 2
    assert mine.model.layers[2].mlp.gate.weight.shape == (2, 32)


def test_a_token_needs_its_experts() -> None:
    lab = Lab(tiny("mixtral"), text(2, 8))
    with pytest.raises(LaminaError, match="goes to 2 experts, 1 would be left"):
        REWRITES.make("narrow").apply(step({"block.1.moe.expert": [0, 1, 2]}), lab)
    with pytest.raises(LaminaError, match="make up for experts"):
        REWRITES.make("narrow", {"refit": 0.1}).apply(step({"block.1.moe.expert": [0]}), lab)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
@torch.no_grad()
def test_a_stream_of_fewer_channels_is_the_smaller_class_on_sliced_weights(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    ids, out = text(2, 9), [0, 5, 6, 13, 20, 21, 22, 31]
    keep = [c for c in range(32) if c not in out]
    lab, dense = narrowed(name, {"channel": out}, ids)
    data = {**dense.config.to_dict(), "hidden_size": 24, "head_dim": 8}
    small: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**data)).eval()
    weights = {}
    for key, value in dense.state_dict().items():
        last = key.split(".")[-2] if key.endswith("weight") else key.split(".")[-1]
        if key.endswith("bias"):
            weights[key] = value
        elif value.ndim == 1:
            weights[key] = value[keep]
        elif last in ("o_proj", "down_proj"):
            weights[key] = value[keep] if value.ndim == 2 else value[:, keep]
        else:
            weights[key] = value[..., keep]
    small.load_state_dict(weights)
    torch.testing.assert_close(lab.model(ids).logits, small(ids).logits)
    said = name != "qwen2"  # whose config has no word for the width of a head
    assert lab.model.config.hidden_size == (24 if said else 32)


@torch.no_grad()
def test_channels_neurons_and_groups_go_at_once_from_a_network_with_layer_norms() -> None:
    ids, out = text(2, 9), [1, 2, 30]
    keep = [c for c in range(32) if c not in out]
    gone = {"channel": out, "block.1.mlp.neuron": [0, 7], "block.2.attention.kv_group": [3]}
    lab, dense = narrowed("nanogpt", gone, ids)
    norm = torch.nn.functional.layer_norm
    x = dense.tokens.weight[ids][..., keep] + dense.places.weight[: ids.shape[1], keep]
    for number, block in enumerate(dense.blocks):
        rows = [r for r in range(32) if not (number == 2 and r >= 24)]
        h = norm(x, (29,), block.before.weight[keep], block.before.bias[keep])
        qkv = block.mixes.qkv
        parts = [[p * 32 + r for r in rows] for p in range(3)]
        q, k, v = ((h @ qkv.weight[p][:, keep].T + qkv.bias[p]).unflatten(-1, (-1, 8)).transpose(1, 2) for p in parts)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + mixed @ block.mixes.out.weight[keep][:, rows].T + block.mixes.out.bias[keep]
        h = norm(x, (29,), block.between.weight[keep], block.between.bias[keep])
        first, _, last = block.feeds
        hidden = torch.nn.functional.gelu(h @ first.weight[:, keep].T + first.bias)
        hidden[..., [0, 7] if number == 1 else []] = 0
        x = x + hidden @ last.weight[keep].T + last.bias[keep]
    want = norm(x, (29,), dense.norm.weight[keep], dense.norm.bias[keep]) @ dense.head.weight[:, keep].T
    torch.testing.assert_close(lab.model(ids), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "cohere"])
def test_tied_embeddings_stay_tied_and_what_reads_its_config_stays_right(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids, model = text(2, 9), tiny(name)
    lab = Lab(model, ids)
    scales = {k: v for m in model.modules() for k, v in vars(m).items() if "embed_scale" in k}
    receipt = REWRITES.make("narrow").apply(step({"channel": [3, 4, 5, 6]}), lab)
    assert lab.model.get_input_embeddings().weight is lab.model.get_output_embeddings().weight
    assert lab.model.get_input_embeddings().embedding_dim == 28
    assert scales == {k: v for m in lab.model.modules() for k, v in vars(m).items() if "embed_scale" in k}
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
        torch.testing.assert_close(again(ids).logits, lab.model(ids).logits)


@torch.no_grad()
def test_equal_widths_of_every_kind_make_a_plain_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = text(2, 9)
    gone: dict[str, list[int]] = {"channel": list(range(8))}
    for site in Lab(tiny("mixtral"), ids).anatomy.of_kind(Kind.EXPERT, Kind.KV_GROUP):
        gone[site.id] = [site.block % site.width if site.block else 0]
    lab, _ = narrowed("mixtral", gone, ids)
    receipt = REWRITES.make("narrow").apply(step({"channel": list(range(8))}), lab)
    assert form(lab.model, [receipt]) == "stock"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(again(ids).logits, lab.model(ids).logits)
    config = again.config
    assert (config.hidden_size, config.num_local_experts, config.num_key_value_heads) == (16, 3, 1)


def test_heads_and_groups_of_one_attention_do_not_go_at_once() -> None:
    gone = {"block.1.attention.kv_group": [0], "block.1.attention.head": [0, 2]}
    with pytest.raises(LaminaError, match="at once"):
        REWRITES.make("narrow").apply(step(gone), Lab(tiny("llama"), text(2, 8)))


def test_an_error_midway_leaves_model_and_config_as_they_were() -> None:
    from lamina.rewrites._narrow_config import undone_on_error
    from lamina.testing.bench import expect_same, picture

    model: Any = tiny("llama")
    before, path = picture(model), "model.layers.0.mlp.down_proj"

    def fails() -> None:
        with undone_on_error(model, [path]), torch.no_grad():
            model.get_submodule(path).weight.zero_()
            model.model.layers[1].mlp.up_proj = torch.nn.Identity()
            model.model.norm.weight = torch.nn.Parameter(torch.zeros(3))
            model.config.hidden_size, model.extra = 7, 1
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        fails()
    expect_same(before, picture(model), "the failed change")
