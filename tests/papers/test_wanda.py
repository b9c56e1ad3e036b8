"""Wanda (arXiv 2306.11695) against loops over hooked inputs, dense and block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.core.documents import Step
from lamina.core.registry import REWRITES
from lamina.lab import Lab
from lamina.rewrites.sparsify import Given
from lamina.testing.models import padded, text, tiny

MODELS = ("llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "nanogpt")


@torch.no_grad()
def caught(model: nn.Module, paths: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What enters maps, padding left out: [tokens, inputs], float64."""
    seen: dict[str, list[Tensor]] = {p: [] for p in paths}
    handles = [
        model.get_submodule(p).register_forward_pre_hook(lambda _, a, p=p: seen[p].append(a[0].double())) for p in paths
    ]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])).bool() for b in batches]
    return {
        p: torch.cat([x.reshape(*m.shape, -1)[m] for x, m in zip(xs, masks, strict=True)]) for p, xs in seen.items()
    }


def literal(weight: Tensor, x: Tensor, share: float) -> Tensor:
    """Row by row: sort by |w| ‖x‖, zero the first int(inputs · share)."""
    out, norms = weight.clone(), [float(x[:, j].norm()) for j in range(x.shape[1])]
    for row in out:
        scores = [abs(float(row[j])) * norms[j] for j in range(len(row))]
        for j in sorted(range(len(row)), key=lambda j, s=scores: s[j])[: int(len(row) * share)]:
            row[j] = 0
    return out


def sites_of(lab: Lab, *blocks: str) -> dict[str, str]:
    return {s.id: s.path for b in blocks for s in lab.anatomy.linears(b)}


@pytest.mark.parametrize("name", MODELS)
def test_each_output_loses_its_lowest_scores(name: str) -> None:
    model, ids = tiny(name), text(5, 9)
    lab = Lab(model, ids, batch_size=2)
    sites = sites_of(lab, "block.1", "block.3")
    x = caught(model, list(sites.values()), [{"input_ids": ids}])
    wanted = {s: literal(lab.anatomy.weight(s).detach(), x[p], 0.4) for s, p in sites.items()}
    receipt = REWRITES.make("wanda").apply(Step(rewrite="wanda", sites=tuple(sites), options={"sparsity": 0.4}), lab)
    for site, weight in wanted.items():
        got = lab.anatomy.weight(site)
        assert torch.equal(got, weight), site
        assert {int(n) for n in (got == 0).sum(1)} == {int(got.shape[1] * 0.4)}
        assert receipt.options["zeros"][site] == int(got.shape[1] * 0.4) / got.shape[1]
    assert lab.passes == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    model = tiny("llama")
    batches = padded([text(1, n, seed=n)[0] for n in (9, 4, 7, 12)], 2, side=side)
    lab = Lab(model, batches)
    sites = sites_of(lab, "block.2")
    x = caught(model, list(sites.values()), batches)
    wanted = {s: literal(lab.anatomy.weight(s).detach(), x[p], 0.5) for s, p in sites.items()}
    REWRITES.make("wanda").apply(Step(rewrite="wanda", sites=tuple(sites), options={"sparsity": 0.5}), lab)
    assert all(torch.equal(lab.anatomy.weight(s), w) for s, w in wanted.items())


@pytest.mark.parametrize("name", MODELS)
def test_in_turn_sees_the_inputs_of_the_pruned_network(name: str) -> None:
    """Blocks one after the other, each by whole forwards of the network as it is by then; two passes."""
    model, dense, ids = tiny(name), tiny(name), text(5, 9)
    lab = Lab(model, ids, batch_size=2)
    wanted, blocks = {}, [b.site.id for b in lab.anatomy.stacks[0].blocks]
    where = sites_of(lab, *blocks)
    for block in blocks:
        sites = sites_of(lab, block)
        x = caught(dense, list(sites.values()), [{"input_ids": ids}])
        for site, path in sites.items():
            module: Any = dense.get_submodule(path)
            stored = module.weight if isinstance(module, nn.Linear) else module.weight.T
            wanted[site] = literal(stored.detach(), x[path], 0.5)
            with torch.no_grad():
                stored.copy_(wanted[site])
    step = Step(rewrite="wanda", sites=tuple(where), options={"sparsity": 0.5, "in_turn": True})
    REWRITES.make("wanda").apply(step, lab)
    for site, weight in wanted.items():
        same = (lab.anatomy.weight(site) == weight).double().mean()
        assert same > 0.995, site  # near ties of scores fall either way
    assert lab.passes == pytest.approx(2 - 1 / 4)  # the last block's outputs are nobody's inputs
    at_once = Lab(tiny(name), ids, batch_size=2)
    REWRITES.make("wanda").apply(Step(rewrite="wanda", sites=tuple(where), options={"sparsity": 0.5}), at_once)
    first, last = sites_of(lab, blocks[0]), sites_of(lab, blocks[-1])
    assert all(torch.equal(at_once.anatomy.weight(s), lab.anatomy.weight(s)) for s in first)
    assert not all(torch.equal(at_once.anatomy.weight(s), lab.anatomy.weight(s)) for s in last)


def test_in_turn_runs_no_more_than_it_needs() -> None:
    """Blocks without maps of the step are run once, those behind the last not at all."""
    lab = Lab(tiny("llama"), text(4, 8))
    maps = (*sites_of(lab, "block.0"), *sites_of(lab, "block.2"))
    REWRITES.make("wanda", {"in_turn": True}).apply(Step(rewrite="wanda", sites=maps, options={"sparsity": 0.5}), lab)
    assert lab.passes == pytest.approx((2 + 1 + 1) / 4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pruned(weight: Tensor, powers: Tensor, share: float, **options: Any) -> Tensor:
    given = Given(site="a", weight=weight.clone(), share=share, second=powers, tokens=10)
    return REWRITES.make("wanda", options).sparse(given)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(0.05, 0.95), st.floats(0.1, 10))
def test_inputs_of_one_size_leave_the_size_of_weights(seed: int, share: float, power: float) -> None:
    weight = drawn(4, 12, seed=seed)
    got = pruned(weight, torch.full((12,), power, dtype=torch.float64), share)
    for old, new in zip(weight, got, strict=True):
        gone = sorted(range(12), key=lambda j, o=old: abs(float(o[j])))[: int(12 * share)]
        assert [j for j in range(12) if new[j] == 0] == sorted(gone)
        assert all(new[j] == old[j] for j in range(12) if j not in gone)


def test_small_weights_on_large_inputs_stay_and_unused_inputs_go_first() -> None:
    weight = drawn(6, 8).abs() + 1
    powers = torch.ones(8, dtype=torch.float64)
    powers[2], powers[5] = 1e4, 0.0
    weight[:, 2], weight[:, 5] = 0.1, 9.0
    got = pruned(weight, powers, 0.25)
    assert bool((got[:, 2] == 0.1).all())
    assert bool((got[:, 5] == 0).all())
    assert bool((pruned(weight, torch.ones(8, dtype=torch.float64), 0.25)[:, 2] == 0).all())


def by_share(scores: Tensor, alpha: float) -> Tensor:
    """The variant's mask for one α, in loops: of each row the lowest scores that are no more than α of its sum."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores):
        total = 0.0
        for j in sorted(range(len(row)), key=lambda j, r=row: float(r[j])):
            total += float(row[j])
            if total <= alpha * float(row.sum()):
                mask[i, j] = True
    return mask


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(0.05, 0.95))
def test_the_variant_takes_the_same_share_of_each_rows_sum(seed: int, share: float) -> None:
    """A bisection of α comes to the same mask, as near as it comes to the count."""
    weight, powers = drawn(9, 16, seed=seed), drawn(16, seed=seed + 1).square() * 10
    scores = weight.abs() * (powers / 10).sqrt()
    got = pruned(weight, powers, share, variant=True) == 0
    assert int(got.sum()) == int(9 * 16 * share)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if int(by_share(scores, middle).sum()) <= int(9 * 16 * share) else (low, middle)
    assert torch.equal(by_share(scores, low), got)


def test_the_variant_lets_rows_differ() -> None:
    """A row of one large weight can lose more of the others than a row of equal ones."""
    weight = torch.ones(2, 10, dtype=torch.float64)
    weight[0, 0] = 100.0
    gone = pruned(weight, torch.ones(10, dtype=torch.float64), 0.5, variant=True) == 0
    assert gone.sum(1).tolist() == [9, 1]
    zeros = pruned(torch.zeros(2, 10, dtype=torch.float64), torch.ones(10, dtype=torch.float64), 0.5, variant=True)
    assert torch.equal(zeros, torch.zeros(2, 10, dtype=torch.float64))


def test_it_spoils_the_outputs_less_than_magnitude() -> None:
    """Inputs of very uneven size."""
    x = drawn(500, 32) * torch.logspace(-1, 1, 32, dtype=torch.float64)
    weight = drawn(16, 32, seed=1)
    ours = pruned(weight, x.square().sum(0), 0.5)
    plain = REWRITES.make("magnitude", {"rows": True}).sparse(Given(site="a", weight=weight.clone(), share=0.5))
    assert float(((weight - ours) @ x.T).norm()) < 0.7 * float(((weight - plain) @ x.T).norm())
