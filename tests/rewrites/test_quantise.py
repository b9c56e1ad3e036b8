"""Rounding linear maps to the grids of GGUF types: gguf's own quantiser is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.anatomy.linears import matrix
from lamina.core.documents import Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import REWRITES
from lamina.core.sites import Kind
from lamina.lab import Lab
from lamina.maths.grids import GRIDS
from lamina.rewrites.quantise import Quantise
from lamina.testing.bench import fresh, lab
from lamina.testing.models import text, tiny

BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
"""Of 32 weights."""


def step(sites: Any, types: Any) -> Step:
    return Step(rewrite="round", sites=tuple(sites), options={"type": types})


def oracle(weight: Tensor, name: str) -> Tensor:
    kind = GGMLQuantizationType[name]
    return torch.from_numpy(dequantize(quantize(weight.detach().float().contiguous().numpy(), kind), kind))


def maps(bench: Lab) -> dict[str, nn.Module]:
    return {s.id: bench.model.get_submodule(s.path) for s in bench.anatomy.linears()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", BYTES)
def test_weights_become_what_gguf_makes_of_them(kind: str, name: str) -> None:
    bench = lab(name)
    before = {site: matrix(m).detach().clone() for site, m in maps(bench).items()}
    rest = {k: v.clone() for k, v in bench.model.state_dict().items()}
    sites = list(before)[2:5]
    receipt = REWRITES.make("round").apply(step(sites, kind), bench)
    for site, module in maps(bench).items():
        wanted = oracle(before[site], kind) if site in sites else before[site]
        assert torch.equal(matrix(module), wanted), site
        assert (site in sites) != torch.equal(matrix(module), before[site])
    changed = {f"{bench.anatomy.site(s).path}.weight" for s in sites}
    assert {k for k, v in bench.model.state_dict().items() if not torch.equal(v, rest[k])} == changed
    assert receipt.options == {"type": kind}
    assert receipt.structure == {"steps": []}
    assert receipt.rewrite == "round"


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((k, torch.float32) for k in BYTES), *((k, torch.bfloat16) for k in ("Q4_0", "Q5_0", "Q8_0"))]
)
def test_costs_are_those_of_the_file(kind: str, dtype: torch.dtype) -> None:
    bench = lab(dtype=dtype)
    sites = [s.id for s in bench.anatomy.linears("block.1")]
    weights = sum(bench.anatomy.weight(s).numel() for s in sites)
    receipt = REWRITES.make("round").apply(step(sites, kind), bench)
    saved = weights * dtype.itemsize - weights // 32 * BYTES[kind]
    assert receipt.before.bytes - receipt.after.bytes == saved
    for same in ("parameters", "macs", "kv_bytes"):
        assert getattr(receipt.before, same) == getattr(receipt.after, same)
    assert receipt.before == bench.anatomy.total()


def test_each_site_may_have_its_own_type() -> None:
    bench = lab()
    sites = [s.id for s in bench.anatomy.linears("block.2")]
    types = dict(zip(sites, [*BYTES, *BYTES], strict=False))
    before = {s: bench.anatomy.weight(s).detach().clone() for s in sites}
    receipt = REWRITES.make("round").apply(step(sites, types), bench)
    for site, kind in types.items():
        assert torch.equal(bench.anatomy.weight(site), oracle(before[site], kind)), kind
    assert receipt.options == {"type": types}


def test_twice_is_once() -> None:
    bench = lab()
    sites = [s.id for s in bench.anatomy.linears()]
    REWRITES.make("round").apply(step(sites, "Q5_0"), bench)
    once = {k: v.clone() for k, v in bench.model.state_dict().items()}
    REWRITES.make("round").apply(step(sites, "Q5_0"), bench)
    assert all(torch.equal(v, once[k]) for k, v in bench.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_sixteen_bits_hold_the_grid(kind: str, dtype: torch.dtype) -> None:
    bench = lab(dtype=dtype)
    site = bench.anatomy.linears("block.1.mlp")[0].id
    before = bench.anatomy.weight(site).detach().float()
    REWRITES.make("round").apply(step([site], kind), bench)
    held = bench.anatomy.weight(site).detach()
    assert held.dtype == dtype
    written = GRIDS[kind].written(held)
    assert written is not None
    read = torch.from_numpy(dequantize(written.numpy(), GGMLQuantizationType[kind]))
    assert torch.equal(read, held.float())
    off, least = (float((x - before).square().mean()) for x in (held.float(), oracle(before, kind)))
    assert 0 < off <= (3.5 if kind == "Q8_0" else 1.15) * least


def test_more_bits_are_closer() -> None:
    losses = {}
    for kind in BYTES:
        bench = lab()
        dense = bench.model(text()).logits
        REWRITES.make("round").apply(step([s.id for s in bench.anatomy.linears()], kind), bench)
        losses[kind] = float((bench.model(text()).logits - dense).detach().norm() / dense.detach().norm())
    assert 0 < losses["Q8_0"] < losses["Q5_0"] < losses["Q4_0"] < 0.6
    assert losses["Q8_0"] < losses["Q5_1"] < losses["Q4_1"]


REFUSED: dict[str, tuple[Any, torch.dtype, str]] = {
    "no type": (None, torch.float32, "the step tells no type"),
    "an unknown type": ("Q4_9", torch.float32, "no type is named 'Q4_9'.*Q4_"),
    "not a name": (4, torch.float32, "no type is named '4'"),
    "a number missing": ({"block.0": "Q4_0"}, torch.float32, "the step tells no type"),
    "lowest values in bfloat16": ("Q4_1", torch.bfloat16, "bfloat16 can't hold the numbers of Q4_1.*float32"),
    "two levels on a narrow map": ("Q4_K", torch.float32, "32 inputs are no multiple of 256.*llama.cpp takes Q5_0"),
    "lowest values in float16": ("Q5_1", torch.float16, "float16 can't hold the numbers of Q5_1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_types_are_told_before_anything_is_changed(case: str) -> None:
    given, dtype, reason = REFUSED[case]
    bench = lab(dtype=dtype)
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    site = bench.anatomy.linears()[0].id
    bad = Step(rewrite="round", sites=(site,), options={} if given is None else {"type": given})
    assert REWRITES.make("round").check(bad, bench.anatomy)
    with pytest.raises(UnsupportedError, match=reason):
        REWRITES.make("round").apply(bad, bench)
    assert all(torch.equal(v, before[k]) for k, v in bench.model.state_dict().items())


def test_inputs_must_fill_blocks() -> None:
    model = tiny("llama", intermediate_size=40)
    anatomy = Anatomy.of(model)
    sites = [s.id for s in anatomy.linears("block.0.mlp")]
    (problem,) = REWRITES.make("round").check(step(sites, "Q8_0"), anatomy)
    assert problem.where == "block.0.mlp.down_proj"
    assert problem.what == "its 40 inputs are no multiple of 32"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_weights_that_no_step_fits_are_refused(bad: float) -> None:
    bench = lab()
    sites = [s.id for s in bench.anatomy.linears("block.1.mlp")]
    with torch.no_grad():
        bench.anatomy.weight(sites[1])[0, 0] = bad
    first = bench.anatomy.weight(sites[0]).detach().clone()
    with pytest.raises(UnsupportedError, match=f"{sites[1]}: its weights are not finite, or beyond 65,504"):
        REWRITES.make("round").apply(step(sites, "Q4_0"), bench)
    assert torch.equal(bench.anatomy.weight(sites[0]), first)


def test_maps_that_share_their_weights_are_rounded_as_one() -> None:
    model, anatomy, ids = fresh("llama")
    one, other, third = (s.id for s in anatomy.linears() if s.id.endswith("up_proj") and s.block in (0, 2, 3))
    model.get_submodule(anatomy.site(other).path).weight = model.get_submodule(anatomy.site(one).path).weight
    bench = Lab(model, ids)
    before = bench.anatomy.weight(one).detach().clone()
    rewrite = REWRITES.make("round")
    assert "shares its weights" in rewrite.check(step([one], "Q4_0"), bench.anatomy)[0].what
    assert rewrite.check(step([one, other], {one: "Q4_0", other: "Q8_0"}), bench.anatomy)
    receipt = rewrite.apply(step([one, third, other], "Q4_0"), bench)
    assert torch.equal(bench.anatomy.weight(other), oracle(before, "Q4_0"))
    assert receipt.before.bytes - receipt.after.bytes == 2 * before.numel() // 32 * (128 - 18)


def test_a_rounding_off_the_grid_of_the_dtype_is_refused() -> None:
    class Wrong(Quantise):
        def rounded(self, weight: Tensor, *_: Any) -> Tensor:
            return weight + 1e-9

    bench = lab()
    site = bench.anatomy.linears()[0].id
    with pytest.raises(UnsupportedError, match="can't hold the grid"):
        Wrong().apply(step([site], "Q4_0"), bench)


def test_the_registry_knows_it() -> None:
    assert REWRITES.card("round").on == (Kind.LINEAR,)
    with pytest.raises(InputError, match="no option"):
        REWRITES.make("round", {"type": "Q4_0"})


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_types_with_two_levels(kind: str) -> None:
    bench = Lab(tiny("llama", intermediate_size=512), text(2, 8))
    site = "block.1.mlp.down_proj"
    before, total = bench.anatomy.weight(site).detach().clone(), bench.anatomy.total()
    receipt = REWRITES.make("round").apply(step([site], kind), bench)
    held = bench.anatomy.weight(site).detach()
    written = GRIDS[kind].written(held)
    assert written is not None
    assert torch.equal(torch.from_numpy(dequantize(written.numpy(), GGMLQuantizationType[kind])), held)
    assert 0 < float((held - before).norm() / before.norm()) < 0.4
    assert total.bytes - receipt.after.bytes == 32 * 512 * 4 - written.numel()
    again = held.clone()
    REWRITES.make("round").apply(step([site], kind), bench)
    assert torch.equal(bench.anatomy.weight(site), again)
    half = Lab(tiny("llama", intermediate_size=512).bfloat16(), text(2, 8))
    with pytest.raises(UnsupportedError, match=f"bfloat16 can't hold the numbers of {kind}.*float32"):
        REWRITES.make("round").apply(step([site], kind), half)
    sites = [s.id for s in bench.anatomy.linears("block.2.mlp")][-1:]
    with pytest.raises(UnsupportedError, match="no clip is learnt"):
        REWRITES.make("sliderquant").apply(
            Step(rewrite="sliderquant", sites=tuple(sites), options={"type": kind}), bench
        )
