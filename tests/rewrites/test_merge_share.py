"""Merging and sharing, written out with plain loops over modules; sharing survives a save and a load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lamina.core.documents import Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import REWRITES
from lamina.exporters.hf import form, save_checkpoint
from lamina.lab import Lab
from lamina.testing.models import text, tiny


def run(name: str, lab: Lab, sites: tuple[str, ...], **options: Any) -> Any:
    return REWRITES.make(name, options).apply(Step(rewrite=name, sites=sites), lab)


def by_hand(model: Any, first: int, last: int, made: Any) -> Any:
    """The layers from `first` on become one with the maps that `made` gives; norms are the first one's."""
    layers = model.model.layers
    with torch.no_grad():
        for name, module in layers[first].named_modules():
            if isinstance(module, nn.Linear):
                weights = [layers[n].get_submodule(name).weight.clone() for n in range(first, last + 1)]
                module.weight.copy_(made(weights))
    for number in range(last, first, -1):
        del layers[number]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(layers)
    return model


@pytest.mark.parametrize(
    ("name", "options", "made"),
    [
        ("merge", {}, lambda w: sum(w) / len(w)),
        ("merge", {"weights": (0.5, 0.3, 0.2)}, lambda w: 0.5 * w[0] + 0.3 * w[1] + 0.2 * w[2]),
        ("laco", {}, lambda w: w[0] + (w[1] - w[0]) + (w[2] - w[0])),
        ("laco", {"form": "last"}, lambda w: w[2]),
    ],
)
def test_a_run_becomes_the_block_that_a_loop_makes(name: str, options: dict[str, Any], made: Any) -> None:
    ids = text(3, 9)
    want = by_hand(tiny("llama"), 1, 3, made)
    lab = Lab(tiny("llama"), ids)
    receipt = run(name, lab, ("block.1", "block.2", "block.3"), **options)
    with torch.no_grad():
        torch.testing.assert_close(lab.model(ids).logits, want(ids).logits, rtol=1e-4, atol=1e-5)
    assert form(lab.model, [receipt]) == "stock"
    assert receipt.rewrite == name
    assert len(lab.anatomy.stacks[0].blocks) == 2


def test_twins_merge_into_themselves_and_differences_of_two_are_the_second() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    layers = lab.model.model.layers
    layers[2].load_state_dict(layers[1].state_dict())
    before = {k: v.clone() for k, v in layers[1].state_dict().items()}
    run("merge", lab, ("block.1", "block.2"))
    for key, value in lab.model.model.layers[1].state_dict().items():
        torch.testing.assert_close(value, before[key])
    other = Lab(tiny("llama"), text(2, 8))
    second = other.model.model.layers[2].mlp.up_proj.weight.clone()
    run("laco", other, ("block.1", "block.2"))
    torch.testing.assert_close(other.model.model.layers[1].mlp.up_proj.weight, second)


def test_shared_maps_are_one_tensor_and_full_rank_gives_each_depth_its_own_back() -> None:
    ids, sites = text(3, 9), ("block.1", "block.2", "block.3")
    lab = Lab(tiny("llama"), ids)
    layers = lab.model.model.layers
    mean = torch.stack([layers[n].mlp.up_proj.weight for n in (1, 2, 3)]).mean(0)
    receipt = run("share", lab, sites)
    pointers = {layers[n].mlp.up_proj.weight.data_ptr() for n in (1, 2, 3)}
    assert len(pointers) == 1
    torch.testing.assert_close(layers[3].mlp.up_proj.weight, mean)
    maps = sum(p.numel() for p in layers[1].parameters() if p.ndim > 1)
    assert receipt.before.parameters - receipt.after.parameters == 2 * maps
    first = Lab(tiny("llama"), ids)
    keep = first.model.model.layers[1].mlp.up_proj.weight.clone()
    run("share", first, sites, by="first")
    torch.testing.assert_close(first.model.model.layers[3].mlp.up_proj.weight, keep)


def test_the_error_of_a_relaxed_depth_is_the_tail_of_its_difference() -> None:
    ids, sites = text(2, 8), ("block.1.mlp", "block.2.mlp", "block.3.mlp")
    dense = tiny("llama")
    maps = [dense.model.layers[n].mlp.down_proj.weight.detach().double() for n in (1, 2, 3)]
    lab = Lab(tiny("llama"), ids)
    run("share", lab, sites, rank=4)
    for number, weight in zip((1, 2, 3), maps, strict=True):
        made = lab.model.model.layers[number].mlp.down_proj
        tail = torch.linalg.svdvals(weight - torch.stack(maps).mean(0))[4:].square().sum()
        off = (made.weight.detach().double() - weight).square().sum()
        assert float(off) == pytest.approx(float(tail), rel=1e-3)
        assert made.base.weight.data_ptr() == lab.model.model.layers[1].mlp.down_proj.base.weight.data_ptr()


@pytest.mark.parametrize("rank", [0, 3])
def test_tied_maps_are_stored_once_and_loaded_tied(rank: int, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    ids = text(2, 9)
    lab = Lab(tiny("llama"), ids)
    receipt = run("share", lab, ("block.1", "block.2"), rank=rank)
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        ups = [k for k in file.keys() if "up_proj" in k and k.endswith(("up_proj.weight", "base.weight"))]  # noqa: SIM118
    assert len(ups) == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, lab.model(ids).logits)
    end = "mlp.up_proj.base.weight" if rank else "mlp.up_proj.weight"
    first, second = (again.model.layers[n].get_parameter(end) for n in (1, 2))
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize(
    ("name", "sites", "options", "said"),
    [
        ("merge", ("block.1",), {}, "two blocks"),
        ("merge", ("block.1", "block.3"), {}, "no run of neighbours"),
        ("merge", ("block.2", "block.1"), {}, "no run of neighbours"),
        ("merge", ("block.1", "block.2"), {"weights": (1.0,)}, "1 weights for 2"),
        ("merge", ("block.1.mlp", "block.2.mlp"), {}, "no such block"),
        ("share", ("block.1",), {}, "two sites"),
        ("share", ("block.1.mlp", "block.2.attention"), {}, "not built like"),
        ("share", ("block.1", "block.2"), {"rank": 30}, "takes more than"),
        ("share", ("block.1", "block.9"), {}, "no such site"),
    ],
)
def test_what_cannot_be_done_is_told(name: str, sites: tuple[str, ...], options: dict[str, Any], said: str) -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    with pytest.raises(LaminaError, match=said):
        run(name, lab, sites, **options)


@pytest.mark.parametrize(
    ("name", "options"), [("laco", {"form": "x"}), ("share", {"by": "x"}), ("share", {"rank": -1})]
)
def test_options_are_checked(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        REWRITES.make(name, options)
