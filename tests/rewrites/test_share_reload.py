"""Shared maps, for real: one tensor in memory, one in the file, one after loading, whatever else was done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lamina.core.documents import Step
from lamina.core.errors import UnsupportedError
from lamina.core.registry import REWRITES, rewrite_of
from lamina.exporters.hf import save_checkpoint
from lamina.lab import Lab
from lamina.rewrites.lamina_parts import Scaled
from lamina.testing.models import text, tiny


def step(rewrite: str, *sites: str, **options: Any) -> Step:
    return Step(rewrite=rewrite, sites=sites, options=options)


def reloaded(lab: Lab, receipts: list[Any], folder: Path, **options: Any) -> tuple[Any, int]:
    """The checkpoint as transformers loads it, and how many numbers its files hold."""
    from transformers import AutoModelForCausalLM

    save_checkpoint(lab.model, receipts, None, folder, name="tiny", **options)
    stored = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored += sum(file.get_tensor(k).numel() for k in file.keys())  # noqa: SIM118
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval(), stored


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Names of one parameter, for each that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {frozenset(n) for n in names.values() if len(n) > 1}


SHARE = step("share", "block.1", "block.2")
PLANS: dict[str, tuple[str, list[Step], dict[str, Any]]] = {
    "linear maps": ("llama", [SHARE], {}),
    "Conv1D": ("gpt2", [SHARE], {}),
    "Conv1D and low rank": ("gpt2", [step("share", "block.1", "block.2", rank=2)], {}),
    "biases": ("gpt_neox", [SHARE], {}),
    "in shards": ("llama", [SHARE], {"shard": "20KB"}),
    "beside experts": ("mixtral", [SHARE], {}),
    "an earlier block goes": ("llama", [SHARE, step("drop", "block.0")], {}),
    "the first of two goes": ("llama", [SHARE, step("drop", "block.1")], {}),
    "the first of three goes": ("llama", [step("share", "block.1", "block.2", "block.3"), step("drop", "block.1")], {}),
    "blocks become a group": ("llama", [SHARE, step("drop", "block.1.attention")], {}),
    "crosswise": (
        "llama",
        [step("share", "block.1.mlp", "block.2.mlp"), step("share", "block.3.attention", "block.1.attention")],
        {},
    ),
    "scaled": ("gpt2", [step("stable-rps", "block.1", "block.2")], {}),
    "scaled, with biases and low rank": ("gpt_neox", [step("sret", "block.1", "block.2", rank=2)], {}),
    "trained": ("llama", [step("foldgpt", "block.0", "block.1", "block.2", "block.3", steps=1)], {}),
}


@pytest.mark.parametrize("plan", list(PLANS))
def test_what_is_shared_is_stored_once_and_loaded_tied(plan: str, tmp_path: Path) -> None:
    name, steps, options = PLANS[plan]
    ids = text(2, 9)
    lab = Lab(tiny(name), ids)
    receipts = [rewrite_of(s).apply(s, lab) for s in steps]
    again, stored = reloaded(lab, receipts, tmp_path / "m", **options)
    held = sum(p.numel() for p in lab.model.parameters())
    assert stored == held == sum(p.numel() for p in again.parameters())
    assert ties(again) == ties(lab.model)
    if plan == "the first of two goes":
        assert not any("layers" in n for names in ties(again) for n in names)
    else:
        assert any(len(names) > 1 and all("lm_head" not in n for n in names) for names in ties(again))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, lab.model(ids).logits, rtol=0, atol=0)
    again.save_pretrained(tmp_path / "n")
    with safe_open(tmp_path / "n" / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(k).numel() for k in file.keys()) == stored  # noqa: SIM118


def test_a_model_that_was_loaded_can_be_shared_further(tmp_path: Path) -> None:
    ids = text(2, 9)
    lab = Lab(tiny("llama"), ids)
    receipts = [rewrite_of(SHARE).apply(SHARE, lab)]
    again, _ = reloaded(lab, receipts, tmp_path / "m")
    further = Lab(again, ids)
    other = step("share", "block.0.mlp", "block.3.mlp")
    done = rewrite_of(other).apply(other, further)
    last, stored = reloaded(further, [done], tmp_path / "n")
    assert stored == sum(p.numel() for p in again.parameters()) == done.after.parameters
    with torch.no_grad():
        torch.testing.assert_close(last(ids).logits, again(ids).logits, rtol=0, atol=0)


def test_embeddings_that_the_class_ties_stay_tied(tmp_path: Path) -> None:
    ids = text(2, 9)
    lab = Lab(tiny("llama", tie_word_embeddings=True), ids)
    assert frozenset({"lm_head.weight", "model.embed_tokens.weight"}) in ties(lab.model)
    again, stored = reloaded(lab, [rewrite_of(SHARE).apply(SHARE, lab)], tmp_path / "m")
    assert ties(again) == ties(lab.model)
    assert stored == sum(p.numel() for p in again.parameters())


@pytest.mark.parametrize("sites", [("block.2", "block.3"), ("block.2.mlp", "block.0.mlp")])
def test_what_is_shared_already_is_not_shared_otherwise(sites: tuple[str, ...]) -> None:
    lab = Lab(tiny("llama"), text(2, 9))
    rewrite_of(SHARE).apply(SHARE, lab)
    before = ties(lab.model)
    with pytest.raises(UnsupportedError, match="shares its weights already"):
        REWRITES.make("share").apply(step("share", *sites), lab)
    assert ties(lab.model) == before
    for name in ("merge", "fusegpt"):
        with pytest.raises(UnsupportedError, match="shares its weights with another"):
            REWRITES.make(name).apply(step(name, "block.0", "block.1"), lab)


def test_groups_share_among_themselves_and_a_block_too_many_stays() -> None:
    dense, lab = tiny("llama"), Lab(tiny("llama"), text(2, 9))
    plan = step("share", "block.0.mlp", "block.1.mlp", "block.3.mlp", group=2)
    receipt = rewrite_of(plan).apply(plan, lab)
    ups = [layer.mlp.up_proj.weight for layer in lab.model.model.layers]
    assert ups[0] is ups[1]
    assert ups[2] is not ups[1]
    assert torch.equal(ups[3], dense.model.layers[3].mlp.up_proj.weight)
    maps = sum(p.numel() for p in dense.model.layers[0].mlp.parameters())
    assert receipt.before.parameters - receipt.after.parameters == maps
    both = Lab(tiny("llama"), text(2, 9))
    plan = step("share", "block.0", "block.1", "block.2", "block.3", group=2)
    rewrite_of(plan).apply(plan, both)
    assert len({id(layer.mlp.up_proj.weight) for layer in both.model.model.layers}) == 2


def test_a_rank_beyond_a_maps_own_is_that_maps_own() -> None:
    """Few KV heads have maps of few outputs."""
    lab = Lab(tiny("llama", intermediate_size=256), text(2, 9))
    sites = tuple(f"block.{n}" for n in range(4))
    plan = step("share", *sites, rank=17)
    receipt = rewrite_of(plan).apply(plan, lab)
    assert receipt.after == lab.anatomy.total()
    attention = lab.model.model.layers[1].self_attn
    assert attention.k_proj.up.weight.shape == (16, 16)
    assert attention.q_proj.up.weight.shape == (32, 17)
    dense = tiny("llama", intermediate_size=256).model.layers[1].self_attn.k_proj.weight
    torch.testing.assert_close(attention.k_proj.weight, dense, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_shared_map_is_the_sum_of_its_depths() -> None:
    ids = text(2, 9)
    lab = Lab(tiny("llama"), ids)
    rewrite_of(SHARE).apply(SHARE, lab)
    apart = copy.deepcopy(lab.model)
    for layer in apart.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach().clone())
    for model in (lab.model, apart):
        model(ids).logits.square().sum().backward()
    one = lab.model.model.layers[1].mlp.up_proj.weight.grad
    several = [apart.model.layers[n].mlp.up_proj.weight.grad for n in (1, 2)]
    torch.testing.assert_close(one, several[0] + several[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_scaled_map_is_its_matrix(rank: int, bias: bool) -> None:
    torch.manual_seed(0)
    made, x = Scaled(6, 5, rank, bias), torch.randn(4, 6)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p))
    want = made.gain * (x @ made.base.weight.T)
    if rank:
        want = want + x @ made.down.weight.T @ made.up.weight.T
    want = want + made.bias if bias else want
    torch.testing.assert_close(made(x), want)
    torch.testing.assert_close(nn.functional.linear(x, made.weight, made.bias), want)
    assert sum(p.numel() for p in made.parameters()) == 30 + 1 + rank * 11 + 5 * bias


@pytest.mark.parametrize("options", [{"group": 1}, {"group": -2}])
def test_groups_are_checked(options: dict[str, int]) -> None:
    from lamina.core.errors import InputError

    for name in ("share", "stable-rps", "sret", "foldgpt"):
        with pytest.raises(InputError, match="group"):
            REWRITES.make(name, options)


def test_a_step_names_no_site_twice() -> None:
    with pytest.raises(UnsupportedError, match="twice"):
        REWRITES.make("share").apply(step("share", "block.1", "block.2", "block.1"), Lab(tiny("llama"), text(2, 8)))


def test_what_blocks_hold_in_common_goes_with_the_last_of_them() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    share = Step(rewrite="share", sites=("block.1", "block.2", "block.3"))
    rewrite_of(share).apply(share, lab)
    for sites in (["block.1"], ["block.1.mlp", "block.2.mlp"], ["block.1.mlp", "block.2.mlp", "block.3"], ["block.0"]):
        left = Lab(copy.deepcopy(lab.model), text(2, 8))
        drop = Step(rewrite="drop", sites=tuple(sites))
        receipt = rewrite_of(drop).apply(drop, left)
        assert receipt.after.parameters == sum(p.numel() for p in left.model.parameters()), sites
        assert lab.anatomy.total() - lab.anatomy.freed(sites) == receipt.after
        assert left.anatomy.total() == receipt.after
