"""Basis Sharing (arXiv 2410.03765) against its formula with a Cholesky factor; a basis is one tensor, on disk too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.anatomy.neighbours import groups
from lamina.core.documents import Receipt, Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import REWRITES
from lamina.exporters.hf import save_checkpoint
from lamina.lab import Lab
from lamina.lab.moments import input_moments
from lamina.testing.models import NAMES, text, tiny


@torch.no_grad()
def caught(model: nn.Module, path: str, ids: Tensor) -> Tensor:
    """What enters a map [tokens, inputs], float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten(0, -2)))
    model(ids)
    handle.remove()
    return torch.cat(seen).double()


def maps(lab: Lab, *names: str) -> tuple[str, ...]:
    """The maps of all blocks whose names end so."""
    return tuple(s.id for s in lab.anatomy.linears() if s.id.endswith(names))


def applied(lab: Lab, sites: tuple[str, ...], rank: Any, **options: Any) -> Receipt:
    step = Step(rewrite="basis-sharing", sites=sites, options={"rank": rank})
    return REWRITES.make("basis-sharing", options).apply(step, lab)


def literal(weights: list[Tensor], inputs: list[Tensor], rank: int) -> list[Tensor]:
    """As the paper writes it, transposed maps side by side: S [W_1ᵀ W_2ᵀ …] = U Σ Vᵀ, the basis S⁻¹ U Σ."""
    gram = torch.zeros(inputs[0].shape[1], inputs[0].shape[1], dtype=torch.float64)
    for x in inputs:
        gram += x.T @ x
    s = torch.linalg.cholesky(gram).T
    u, sigma, v = torch.linalg.svd(s @ torch.cat([w.T for w in weights], 1), full_matrices=False)
    basis = torch.linalg.inv(s) @ u[:, :rank] @ torch.diag(sigma[:rank])
    found, start = [], 0
    for w in weights:
        found.append((basis @ v[:rank, start : start + len(w)]).T)
        start += len(w)
    return found


@pytest.mark.parametrize(("name", "part"), [("llama", "up_proj"), ("gpt2", "c_attn"), ("nanogpt", "mlp.0")])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_maps_are_those_of_the_formula(name: str, part: str, size: int) -> None:
    ids = text(6, 30)
    lab = Lab(tiny(name), ids, batch_size=2)
    sites = maps(lab, part)
    paths = [lab.anatomy.site(s).path for s in sites]
    dense = [lab.anatomy.weight(s).detach().double() for s in sites]
    inputs = [caught(lab.model, p, ids) for p in paths]
    biases = [getattr(lab.model.get_submodule(p), "bias", None) for p in paths]
    applied(lab, sites, 6, size=size)
    for start in range(0, 4, size):
        run = slice(start, start + size)
        for path, want in zip(paths[run], literal(dense[run], inputs[run], 6), strict=True):
            made: Any = lab.model.get_submodule(path)
            torch.testing.assert_close(made.weight.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    for path, bias in zip(paths, biases, strict=True):
        made = lab.model.get_submodule(path)
        assert made.bias is None if bias is None else torch.equal(made.bias, bias)


def test_the_loss_of_a_group_is_the_tail_of_its_singular_values() -> None:
    lab = Lab(tiny("llama"), text(6, 30))
    sites = maps(lab, "gate_proj")[:2]
    moments = input_moments(lab, sites)
    total = torch.stack([moments.of(s)[0] for s in sites]).sum(0)
    root = torch.linalg.cholesky(total)
    dense = [lab.anatomy.weight(s).detach().double() for s in sites]
    made = REWRITES.make("basis-sharing").weights(
        Step(rewrite="basis-sharing", sites=sites, options={"rank": 9}), lab.anatomy, moments
    )
    off = sum(float(((w - m) @ root).square().sum()) for w, m in zip(dense, made.values(), strict=True))
    tail = torch.linalg.svdvals(torch.cat(dense) @ root)[9:].square().sum()
    assert off == pytest.approx(float(tail), rel=1e-6)


@pytest.mark.parametrize("refit", [False, True])
def test_groups_of_one_are_svd_llm(refit: bool) -> None:
    ids = text(6, 30)
    one, other = Lab(tiny("llama"), ids), Lab(tiny("llama"), ids)
    sites = tuple(s.id for s in one.anatomy.linears("block.1"))
    mine = applied(one, sites, 5, size=1, refit=refit)
    theirs = REWRITES.make("svd-llm").apply(Step(rewrite="svd-llm", sites=sites, options={"rank": 5}), other)
    assert mine.after == theirs.after
    assert [s["kind"] for s in mine.structure["steps"]] == ["swap"]
    for path, module in one.model.named_modules():
        if type(module).__name__ == "Factors":
            want: Any = other.model.get_submodule(path)
            torch.testing.assert_close(module.weight, want.weight, rtol=1e-3, atol=1e-4)


def test_maps_with_a_common_basis_are_kept_as_they_are() -> None:
    ids = text(4, 20)
    model: Any = tiny("llama")
    common = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight[:, :4] @ common * 0.2)
        before = model(ids).logits
        lab = Lab(model, ids)
        applied(lab, maps(lab, "up_proj"), 4, size=4)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_last_maps_keep_a_basis_of_their_own() -> None:
    lab = Lab(tiny("llama"), text(4, 20))
    before = lab.anatomy.total()
    rank = {s.id: 5 for s in lab.anatomy.linears()}
    receipt = applied(lab, tuple(rank), rank)
    layers: Any = lab.model.model.layers
    for part, shared in (
        ("self_attn.q_proj", True), ("self_attn.k_proj", True), ("self_attn.v_proj", True), ("mlp.gate_proj", True),
        ("mlp.up_proj", True), ("self_attn.o_proj", False), ("mlp.down_proj", False),
    ):  # fmt: skip
        bases = [layer.get_submodule(part).down.weight.data_ptr() for layer in layers]
        assert len(set(bases)) == (2 if shared else 4), part
        assert (bases[0] == bases[1]) is shared
    qkv, mlp = 2 * (3 * 32 + 2 * (32 + 16 + 16)), 2 * (2 * 32 + 2 * (64 + 64))
    private = 4 * (32 + 32 + 32 + 64)
    dense = 4 * (32 * 32 * 2 + 2 * 16 * 32 + 3 * 64 * 32)
    assert before.parameters - receipt.after.parameters == dense - 5 * (qkv + mlp + private)
    assert receipt.options == {"size": 2, "refit": False, "rank": rank}


@pytest.mark.parametrize("name", NAMES)
def test_the_last_map_of_a_sublayer_is_told_in_every_model(name: str) -> None:
    """Also where a norm follows it."""
    anatomy = Lab(tiny(name), text(2, 8)).anatomy
    for sublayer in anatomy.sublayers[:2]:
        names = [s.id for s in anatomy.linears(sublayer)]
        found = groups(anatomy, [s.id for s in anatomy.linears()], 4)
        alone = [g[0] for g in found if len(g) == 1 and g[0] in names]
        assert alone == names[-1:], sublayer.id


def test_only_neighbours_share() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    q = maps(lab, "q_proj")
    assert groups(lab.anatomy, q, 2) == [q[:2], q[2:]]
    assert groups(lab.anatomy, q, 3) == [q[:3], q[3:]]
    assert groups(lab.anatomy, (q[0], q[2], q[3]), 2) == [(q[0],), (q[2], q[3])]
    assert groups(lab.anatomy, q[1:], 2) == [q[1:3], q[3:]]
    assert groups(lab.anatomy, (*q[:2], "block.0.attention.k_proj"), 2) == [q[:2], ("block.0.attention.k_proj",)]


def test_refitted_coefficients_are_the_least_squares_ones_for_their_own_inputs() -> None:
    ids = text(6, 30)
    lab = Lab(tiny("llama"), ids)
    sites = maps(lab, "up_proj")[:2]
    moments = input_moments(lab, sites)
    step = Step(rewrite="basis-sharing", sites=sites, options={"rank": 6})
    plain = REWRITES.make("basis-sharing").factors(step, lab.anatomy, moments)
    refit = REWRITES.make("basis-sharing", {"refit": True}).factors(step, lab.anatomy, moments)
    for site in sites:
        (path, basis, kept), (_, same, fitted) = plain[site], refit[site]
        x, weight = caught(lab.model, path, ids), lab.anatomy.weight(site).detach().double()
        assert torch.equal(basis, same)
        want = torch.linalg.lstsq(x @ basis.T, x @ weight.T).solution.T
        torch.testing.assert_close(fitted, want, rtol=1e-3, atol=1e-4)
        off = [float(((weight - b @ basis) @ x.T).norm()) for b in (kept, fitted)]
        assert off[1] < off[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bases_are_stored_once_and_loaded_tied(name: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    ids = text(2, 9)
    lab = Lab(tiny(name), ids)
    sites = tuple(s.id for s in lab.anatomy.linears())
    receipt = applied(lab, sites, 4)
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        keys = list(file.keys())
        numbers = sum(file.get_tensor(k).numel() for k in keys)
    assert numbers == receipt.after.parameters
    private = 4 * 2
    assert sum(k.endswith(".down.weight") for k in keys) == private + (len(sites) - private) // 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, lab.model(ids).logits)
    group = groups(Lab(tiny(name), ids).anatomy, sites, 2)[0]
    paths = [Lab(tiny(name), ids).anatomy.site(s).path for s in group]
    one, other = (again.get_submodule(p).down.weight for p in paths)
    assert one.data_ptr() == other.data_ptr()


def test_weights_on_trial_are_those_that_come_of_it() -> None:
    lab = Lab(tiny("llama").bfloat16(), text(4, 20))
    sites = maps(lab, "k_proj", "o_proj")
    step = Step(rewrite="basis-sharing", sites=sites, options={"rank": 4})
    tried = REWRITES.make("basis-sharing").weights(step, lab.anatomy, input_moments(lab, sites))
    applied(lab, sites, 4)
    assert set(tried) == {p for p, m in lab.model.named_modules() if type(m).__name__ == "Factors"}
    for path, weight in tried.items():
        made: Any = lab.model.get_submodule(path)
        assert made.down.weight.dtype == torch.bfloat16
        torch.testing.assert_close(made.weight.double(), weight, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("sites", "options", "said"),
    [
        (("q_proj",), {}, "tells no rank"),
        (("q_proj",), {"rank": 0}, "rank 0 saves nothing: it has ranks from 1 to 21"),
        (("q_proj",), {"rank": 22}, "saves nothing"),
        (("q_proj",), {"rank": {f"block.{n}.attention.q_proj": 4 + n // 3 for n in range(4)}}, "are told ranks 4, 5"),
        (("block.1.mlp.x",), {"rank": 3}, "no such linear map"),
    ],
)
def test_what_cannot_be_done_is_told(sites: tuple[str, ...], options: dict[str, Any], said: str) -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    step = Step(rewrite="basis-sharing", sites=maps(lab, *sites) or sites, options=options)
    with pytest.raises(LaminaError, match=said):
        REWRITES.make("basis-sharing").apply(step, lab)


def test_maps_that_are_one_already_are_refused() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    REWRITES.make("share").apply(Step(rewrite="share", sites=("block.1.mlp", "block.2.mlp")), lab)
    step = Step(rewrite="basis-sharing", sites=maps(lab, "up_proj"), options={"rank": 3})
    assert [p.where for p in REWRITES.make("basis-sharing").check(step, lab.anatomy)] == [
        "block.1.mlp.up_proj",
        "block.2.mlp.up_proj",
    ]


def test_size_is_checked() -> None:
    with pytest.raises(InputError, match="size is at least 1"):
        REWRITES.make("basis-sharing", {"size": 0})
