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
