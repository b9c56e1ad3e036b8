"""Maps of low rank: the error is the tail of the singular values, in the norm that each method asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.core.documents import Step
from lamina.core.errors import LaminaError
from lamina.core.registry import REWRITES
from lamina.lab import Lab
from lamina.lab.moments import InputMoments, input_moments
from lamina.rewrites.factorise import factors_of
from lamina.testing.models import padded, text, tiny


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 99), st.data())
def test_the_error_is_the_tail_of_the_scaled_singular_values(
    out: int, inp: int, seed: int, data: st.DataObject
) -> None:
    weight, x = drawn(out, inp, seed=seed), drawn(inp, 40, seed=seed + 1)
    rank = data.draw(st.integers(1, min(out, inp)))
    values, vectors = torch.linalg.eigh(x @ x.T)
    scale = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    first, second = factors_of(weight, rank, scale)
    assert first.shape == (rank, inp)
    assert second.shape == (out, rank)
    error = (weight - second @ first) @ x
    tail = torch.linalg.svdvals(weight @ x)[rank:].square().sum()
    assert float(error.square().sum()) == pytest.approx(float(tail), rel=1e-6, abs=1e-9)
    plain = torch.linalg.svdvals(weight)[rank:].square().sum()
    got = (weight - torch.matmul(*reversed(factors_of(weight, rank)))).square().sum()
    assert float(got) == pytest.approx(float(plain), rel=1e-6, abs=1e-9)


@torch.no_grad()
def caught(model: nn.Module, path: str, ids: Tensor) -> Tensor:
    """What enters a map [tokens, inputs], float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten(0, -2)))
    model(ids, use_cache=False)
    handle.remove()
    return torch.cat(seen).double()


def literal(name: str, weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """The map of low rank, as the papers write it: SVD of W S, cut, times S⁻¹."""
    if name == "svd":
        scale = torch.eye(weight.shape[1], dtype=torch.float64)
    elif name == "asvd":
        scale = torch.diag(x.abs().mean(0).sqrt())
    else:
        scale = torch.linalg.cholesky(x.T @ x)
    u, s, v = torch.linalg.svd(weight @ scale, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank] @ torch.linalg.inv(scale)


@pytest.mark.parametrize("name", ["svd", "asvd", "svd-llm"])
@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_the_factors_are_those_of_the_formula(name: str, model_name: str) -> None:
    model, ids = tiny(model_name), text(6, 30)
    lab = Lab(model, ids, batch_size=2)
    sites = lab.anatomy.linears("block.1")[-2:]
    wanted = {
        s.path: literal(name, lab.anatomy.weight(s).detach().double(), caught(model, s.path, ids), 5) for s in sites
    }
    biases = {s.path: getattr(model.get_submodule(s.path), "bias", None) for s in sites}
    receipt = REWRITES.make(name).apply(Step(rewrite=name, sites=tuple(s.id for s in sites), options={"rank": 5}), lab)
    for path, want in wanted.items():
        module: Any = lab.model.get_submodule(path)
        torch.testing.assert_close(module.weight.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
        assert torch.linalg.matrix_rank(module.weight.detach(), rtol=1e-4) == 5
        assert biases[path] is None or torch.equal(module.bias, biases[path])
    assert receipt.after.parameters < receipt.before.parameters
    assert receipt.options == {"rank": 5}


def test_a_map_of_low_rank_is_kept_as_it_is() -> None:
    model, ids = tiny("llama"), text(4, 20)
    module: Any = model.model.layers[2].mlp.up_proj
    with torch.no_grad():
        module.weight.copy_(module.weight[:, :4] @ torch.randn(4, module.weight.shape[1]) * 0.1)
        before = model(ids).logits
        for name in ("svd", "asvd", "svd-llm"):
            lab = Lab(tiny("llama"), ids)
            lab.model.load_state_dict(model.state_dict())
            REWRITES.make(name).apply(
                Step(rewrite=name, sites=("block.2.mlp.up_proj",), options={"rank": {"block.2.mlp.up_proj": 4}}), lab
            )
            torch.testing.assert_close(lab.model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_whitened_factors_lose_less_of_the_outputs_than_plain_ones() -> None:
    ids, site = text(8, 40), "block.1.mlp.down_proj"
    errors = {}
    for name in ("svd", "svd-llm"):
        lab = Lab(tiny("llama"), ids)
        weight, x = lab.anatomy.weight(site).detach().double(), caught(lab.model, lab.anatomy.site(site).path, ids)
        REWRITES.make(name).apply(Step(rewrite=name, sites=(site,), options={"rank": 8}), lab)
        made: Any = lab.model.get_submodule("model.layers.1.mlp.down_proj")
        errors[name] = float(((weight - made.weight.detach().double()) @ x.T).square().sum())
    assert errors["svd-llm"] < errors["svd"]


@pytest.mark.parametrize(
    ("sites", "options", "said"),
    [
        (("block.1.mlp.up_proj",), {}, "tells no rank"),
        (("block.1.mlp.up_proj",), {"rank": 22}, "saves nothing"),
        (("block.1.mlp.up_proj",), {"rank": 0}, "saves nothing"),
        (("block.1.mlp",), {"rank": 3}, "no such linear map"),
        (("block.1.mlp.up_proj",), {"rank": {"block.2.mlp.up_proj": 3}}, "tells no rank"),
    ],
)
def test_what_cannot_be_done_is_told(sites: tuple[str, ...], options: dict[str, Any], said: str) -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    with pytest.raises(LaminaError, match=said):
        REWRITES.make("svd").apply(Step(rewrite="svd", sites=sites, options=options), lab)


def test_moments_are_those_of_the_inputs_and_merge() -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (9, 5, 12)]
    lab = Lab(model, padded(rows, 3, side="left"))
    sites = [s.id for s in lab.anatomy.linears("block.2")]
    whole = input_moments(lab, sites)
    parts = [InputMoments(sites) for _ in rows]
    for part, row in zip(parts, rows, strict=True):
        lab.on([{"input_ids": row[None]}]).stream([part], score=False)
    together = parts[2].merge(parts[0]).merge(parts[1])
    for site in sites:
        x = torch.cat([caught(model, lab.anatomy.site(site).path, row[None]) for row in rows])
        for found in (whole, together):
            second, first, tokens = found.of(site)
            torch.testing.assert_close(second, x.T @ x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(first, x.abs().sum(0), rtol=1e-4, atol=1e-4)
            assert tokens == 26
    assert len(whole.second) == 4, "q, k and v see the same, and so do gate and up"
    assert not whole.scores().values
    with pytest.raises(LaminaError, match="no forward"):
        whole.of("block.0.mlp.up_proj")
