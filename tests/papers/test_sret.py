"""Sliced Recursive Transformer (arXiv 2111.05297): factors and projections that are fitted, and planted truths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.core.documents import Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import REWRITES
from lamina.lab import Lab
from lamina.rewrites._passes import solved
from lamina.testing.models import own_text, padded, text, tiny

PAIR = ("block.1", "block.2")


def run(lab: Lab, *sites: str, **options: Any) -> Any:
    return REWRITES.make("sret", options).apply(Step(rewrite="sret", sites=sites, options=options), lab)


def rows(seed: int, *, tokens: int = 30, features: int = 6, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, features, generator=draw) * torch.logspace(0, -1, features)
    f = z @ torch.randn(features, width, generator=draw) + 0.1 * torch.randn(tokens, width, generator=draw)
    r = 0.6 * f + z @ torch.randn(features, width, generator=draw) + torch.randn(tokens, width, generator=draw)
    return r, f, z


def objective(data: tuple[Tensor, Tensor, Tensor], gain: float, p: Tensor, ridge: float) -> float:
    r, f, z = (t.double() for t in data)
    level = ridge * float((z * z).sum()) / z.shape[1]
    return float((r - gain * f - z @ p.T).square().sum() + level * p.square().sum())


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 1.0]), st.integers(1, 4))
def test_no_other_factor_and_no_other_map_of_the_rank_is_better(seed: int, ridge: float, rank: int) -> None:
    data = rows(seed)
    gain, down, up = solved([data], rank, ridge)
    r, f, _ = (t.double() for t in data)
    literal = math.fsum((r * f).flatten().tolist()) / math.fsum((f * f).flatten().tolist())
    assert float(gain) == pytest.approx(literal, rel=1e-5)
    assert down.shape == (rank, 6)
    assert up.shape == (4, rank)
    best = objective(data, float(gain), up @ down, ridge)
    draw = torch.Generator().manual_seed(seed + 1)
    for _ in range(10):
        moved = [t + 1e-2 * torch.randn(t.shape, generator=draw) for t in (up, down)]
        assert best <= objective(data, float(gain), moved[0] @ moved[1], ridge) * (1 + 1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_a_map_of_full_rank_is_ridge_regression(ridge: float) -> None:
    data = rows(3)
    gain, down, up = solved([data], 4, ridge)
    r, f, z = (t.double() for t in data)
    level = math.sqrt(ridge * float((z * z).sum()) / z.shape[1])
    left = torch.cat([z, level * torch.eye(6, dtype=torch.float64)])
    right = torch.cat([r - float(gain) * f, torch.zeros(6, 4, dtype=torch.float64)])
    torch.testing.assert_close(up @ down, torch.linalg.lstsq(left, right).solution.T, rtol=1e-4, atol=1e-5)


def test_batches_add_up_and_silence_keeps_its_factor() -> None:
    r, f, z = rows(5)
    whole, parts = solved([(r, f, z)], 2, 0.1), solved([(r[:7], f[:7], z[:7]), (r[7:], f[7:], z[7:])], 2, 0.1)
    torch.testing.assert_close(whole[1].T @ whole[2].T, parts[1].T @ parts[2].T, rtol=1e-4, atol=1e-6)
    gain, down, up = solved([(r, torch.zeros_like(f), z)], 0, 0.1)
    assert float(gain) == 1.0
    assert down.shape == (0, 6)
    assert up.shape == (4, 0)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("rank", [0, 4])
def test_branches_that_differ_by_a_factor_are_found_again(name: str, rank: int) -> None:
    """One after the other and parallel; in GPT-2, transposed maps. Last maps have no biases here: these stay apart."""
    ids = text(4, 12)
    dense, lab = tiny(name), Lab(tiny(name), ids, batch_size=2)
    factors = {"block.1": (1.0, 1.0), "block.2": (0.5, 1.5)}
    with torch.no_grad():
        for model in (dense, lab.model):
            blocks = [b for b in lab.anatomy.stacks[0].blocks if b.site.id in PAIR]
            twin, other = (model.get_submodule(b.path) for b in blocks)
            other.load_state_dict(twin.state_dict())
            for branch, factor in zip(blocks[1].branches, factors["block.2"], strict=True):
                tail: Any = other.get_submodule(branch.tail)
                tail.weight.mul_(factor)
                for module in (twin.get_submodule(branch.tail), tail):
                    if getattr(module, "bias", None) is not None:
                        module.bias.zero_()
    run(lab, *PAIR, rank=rank)
    for site, given_ in factors.items():
        block = lab.anatomy.block(site)
        names = [x.tail for x in blocks[0].branches]
        for tail, factor, whole in zip(names, given_, (0.75, 1.25), strict=True):
            module: Any = lab.model.get_submodule(f"{block.path}.{tail}")
            assert float(module.gain.detach()) == pytest.approx(factor / whole, rel=1e-4)
    with torch.no_grad():
        got = lab.model(ids).logits
        torch.testing.assert_close(got, dense(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_branchs_factor_is_its_biass_too() -> None:
    dense, lab = tiny("gpt2"), Lab(tiny("gpt2"), text(3, 10))
    run(lab, *PAIR, rank=0)
    for layer in (1, 2):
        made, was = (m.transformer.h[layer].mlp.c_proj for m in (lab.model, dense))
        assert abs(float(made.gain.detach()) - 1) > 1e-3
        torch.testing.assert_close(made.bias, made.gain * was.bias)


def test_the_factors_are_a_loops_over_blocks_and_branches() -> None:
    """Rank 0: whole forwards with hooks, a branch at a time, on a network of mean maps."""
    ids = text(3, 10)
    dense, lab = tiny("llama"), Lab(tiny("llama"), ids)
    shared: Any = tiny("llama")
    pair: list[Any] = [shared.model.layers[n] for n in (1, 2)]
    with torch.no_grad():
        for name, module in pair[0].named_modules():
            if isinstance(module, nn.Linear):
                mean = (module.weight + pair[1].get_submodule(name).weight) / 2
                for layer in pair:
                    layer.get_submodule(name).weight.copy_(mean)
    run(lab, *PAIR, rank=0)

    def seen(model: Any, layer: int, name: str) -> tuple[Tensor, Tensor]:
        """The stream behind a branch of a layer, and what the branch adds."""
        held: dict[str, Tensor] = {}
        block = model.model.layers[layer]
        handles = [
            block.register_forward_pre_hook(lambda _, a: held.update(x=a[0])),
            block.self_attn.register_forward_hook(lambda _, __, out: held.update(attn=out[0])),
            block.mlp.register_forward_hook(lambda _, __, out: held.update(mlp=out)),
        ]
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        stream = held["x"] + held["attn"] + (held["mlp"] if name == "mlp" else 0)
        return stream.double().flatten(0, 1), held[name].double().flatten(0, 1)

    for layer in (1, 2):
        for name, tail in (("attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
            (y, _), (x, f) = seen(dense, layer, name), seen(shared, layer, name)
            above = below = 0.0
            for t in range(len(y)):
                size = float(y[t] @ y[t])
                above += float((y[t] - (x[t] - f[t])) @ f[t]) / size
                below += float(f[t] @ f[t]) / size
            module: Any = lab.model.get_submodule(f"model.layers.{layer}.{tail}")
            assert float(module.gain.detach()) == pytest.approx(above / below, rel=1e-3)
            with torch.no_grad():
                shared.get_submodule(f"model.layers.{layer}.{tail}").weight.mul_(above / below)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_on_other_text_it_is_nearer_than_sharing_alone(name: str) -> None:
    ids = own_text(tiny(name), 96)
    off = {}
    for rewrite, options in (("share", {}), ("sret", {"rank": 4})):
        lab = Lab(tiny(name), ids[:64])
        dense = [lab.on(ids[64:]).forward(b).detach().log_softmax(-1) for b in lab.on(ids[64:]).batches]
        plan = Step(rewrite=rewrite, sites=PAIR, options=options)
        REWRITES.make(rewrite, options).apply(plan, lab)
        made = [lab.forward(b).detach().log_softmax(-1) for b in lab.on(ids[64:]).batches]
        kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(dense, made, strict=True)]
        off[rewrite] = sum(kl) / len(kl)
    assert off["sret"] < 0.9 * off["share"]


def test_padding_is_not_fitted() -> None:
    ids = [text(1, n, seed=n)[0] for n in (9, 5, 7)]
    together, apart = Lab(tiny("llama"), padded(ids, 3)), Lab(tiny("llama"), [{"input_ids": r[None]} for r in ids])
    for lab in (together, apart):
        run(lab, *PAIR, rank=3)
    one, other = (lab.model.model.layers[2].mlp.down_proj.weight for lab in (together, apart))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_done_is_told() -> None:
    with pytest.raises(UnsupportedError, match="not all of its branches end in a linear map"):
        run(Lab(tiny("gemma2"), text(2, 8)), *PAIR)
    with pytest.raises(UnsupportedError, match="no block"):
        run(Lab(tiny("llama"), text(2, 8)), "block.1.mlp", "block.2.mlp")
    for options in ({"rank": -1}, {"ridge": -0.1}):
        with pytest.raises(InputError, match="at least 0"):
            REWRITES.make("sret", options)
