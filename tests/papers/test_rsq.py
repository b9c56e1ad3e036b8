"""RSQ (arXiv 2503.01820): the moment of weighted tokens, written out from eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.registry import REWRITES
from lamina.core.sites import Kind
from lamina.lab import Lab
from lamina.lab.moments import input_moments
from lamina.maths.grids import GRIDS, compensated
from lamina.papers.bits.rsq import Concentrated, importance
from lamina.testing.bench import rows
from lamina.testing.models import padded, text, tiny


@torch.no_grad()
def attended(model: Any, ids: Tensor) -> list[Tensor]:
    """Of each block, what heads and queries give each token of one sequence: weights of the slow path."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(ids.unsqueeze(0), output_attentions=True, use_cache=False)
    model.set_attn_implementation(usual)
    return [a[0].double().sum((0, 1)) for a in out.attentions]


@torch.no_grad()
def caught(model: Any, path: str, ids: Tensor) -> Tensor:
    """What enters a map [tokens, inputs] in one sequence."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, a: seen.append(a[0][0]))
    model(ids.unsqueeze(0), use_cache=False)
    handle.remove()
    return seen[0].double()


def literal_weights(given_: Tensor, least: float) -> list[float]:
    values = given_.tolist()
    scaled = [least + (1 - least) * (v - min(values)) / (max(values) - min(values)) for v in values]
    return [w * len(scaled) / sum(scaled) for w in scaled]


def literal(model: Any, path: str, block: int, sequences: list[Tensor], least: float) -> Tensor:
    """Σ w x xᵀ, token by token."""
    total: Any = 0.0
    for ids in sequences:
        weights = literal_weights(attended(model, ids)[block], least)
        for weight, x in zip(weights, caught(model, path, ids), strict=True):
            total = total + weight * torch.outer(x, x)
    return total


@pytest.mark.parametrize("least", [0.005, 0.3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_moments_are_those_of_weighted_tokens(name: str, least: float) -> None:
    model, ids = tiny(name), text(5, 14)
    lab = Lab(model, ids, batch_size=2)
    sites = [s for b in (1, 3) for s in lab.anatomy.linears(f"block.{b}")]
    moments = REWRITES.make("rsq", {"least": least}).moments(lab, [s.id for s in sites])
    for site in sites:
        assert site.block is not None
        wanted = literal(model, site.path, site.block, list(ids), least)
        got = moments.of(site.id)[0]
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())), site.id
        plain = input_moments(lab, [site.id]).of(site.id)[0]
        assert not torch.allclose(plain, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


def test_padding_counts_nothing() -> None:
    model = tiny("llama")
    batches = padded(rows(), 6, side="left")
    lab = Lab(model, batches)
    site = lab.anatomy.linears("block.2.mlp")[0]
    got = REWRITES.make("rsq").moments(lab, [site.id]).of(site.id)[0]
    wanted = literal(model, site.path, 2, rows(), 0.005)
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1"])
def test_maps_are_rounded_by_that_moment(kind: str) -> None:
    model, ids = tiny("llama"), text(4, 30)
    lab = Lab(model, ids)
    sites = [s.id for s in lab.anatomy.linears("block.1")]
    before = {s: lab.anatomy.weight(s).detach().double() for s in sites}
    moments = REWRITES.make("rsq").moments(lab, sites)
    step = Step(rewrite="rsq", sites=tuple(sites), options={"type": kind})
    assert REWRITES.make("rsq").apply(step, lab).rewrite == "rsq"
    differs = 0
    for site in sites:
        held = lab.anatomy.weight(site).detach()
        wanted = compensated(before[site], moments.of(site)[0], GRIDS[kind], torch.float32)
        assert torch.equal(held.double(), wanted)
        plain = compensated(before[site], input_moments(lab, [site]).of(site)[0], GRIDS[kind], torch.float32)
        differs += not torch.equal(plain, wanted)
    assert differs == len(sites)


def test_tokens_that_count_alike_give_gptq() -> None:
    """`least` = 1 leaves no difference."""
    made = []
    for name, options in (("rsq", {"least": 1.0}), ("gptq", {})):
        lab = Lab(tiny("llama"), text(4, 20))
        sites = tuple(s.id for s in lab.anatomy.linears())
        REWRITES.make(name, options).apply(Step(rewrite=name, sites=sites, options={"type": "Q4_0"}), lab)
        made.append(lab.model.state_dict())
    assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])


def test_important_tokens_are_kept_better() -> None:
    """Outputs of the tokens of most attention, against plain GPTQ, over blocks and seeds."""
    better = 0
    for seed in range(4):
        model, ids = tiny("llama", seed=seed), text(3, 40, seed=seed)
        lab = Lab(model, ids)
        for block in range(4):
            site = lab.anatomy.linears(f"block.{block}.mlp")[0]
            weight = lab.anatomy.weight(site.id).detach().double()
            moments = REWRITES.make("rsq").moments(lab, [site.id]), input_moments(lab, [site.id])
            made = [compensated(weight, m.of(site.id)[0], GRIDS["Q4_0"], torch.float32) for m in moments]
            off = [0.0, 0.0]
            for row in ids:
                weights, x = importance(attended(model, row)[block], 0.005), caught(model, site.path, row)
                for i, w in enumerate(made):
                    off[i] += float((((w - weight) @ x.T).square().sum(0) * weights).sum())
            better += off[0] < off[1]
    assert better >= 13


@given(st.lists(st.floats(0, 50), min_size=2, max_size=9), st.floats(0.001, 1.0))
@settings(max_examples=50, deadline=None)
def test_weights_lie_between_the_least_and_one_and_are_then_of_mean_one(given_: list[float], least: float) -> None:
    got = importance(torch.tensor(given_, dtype=torch.float64), least)
    assert float(got.mean()) == pytest.approx(1.0)
    assert float(got.min() / got.max()) >= least * (1 - 1e-9)
    if max(given_) > min(given_) + 1e-3:
        assert got.tolist() == pytest.approx(literal_weights(torch.tensor(given_, dtype=torch.float64), least))
        assert float(got.min() / got.max()) == pytest.approx(least)


def test_a_block_without_attention_counts_all_tokens_alike() -> None:
    lab = Lab(tiny("llama"), text(4, 20))
    REWRITES.make("drop").apply(Step(rewrite="drop", sites=("block.2.attention",)), lab)
    sites = [s.id for s in lab.anatomy.linears() if s.block == 2]
    assert sites
    got, plain = REWRITES.make("rsq").moments(lab, sites), input_moments(lab, sites)
    assert all(torch.allclose(got.of(s)[0], plain.of(s)[0]) for s in sites)


def test_parts_of_a_text_add_up() -> None:
    ids = text(4, 12)
    whole = Lab(tiny("llama"), ids)
    sites = [s.id for s in whole.anatomy.linears("block.0")]
    parts = []
    for half in ids.split(2):
        tally = Concentrated(sites, 0.005)
        whole.on(half).stream([tally], score=False)
        parts.append(tally)
    both = parts[0].merge(parts[1]).moments
    together = REWRITES.make("rsq").moments(whole, sites)
    assert all(torch.allclose(both.of(s)[0], together.of(s)[0], rtol=1e-4, atol=1e-4) for s in sites)
    assert both.of(sites[0])[2] == together.of(sites[0])[2] == ids.numel()


@pytest.mark.parametrize("options", [{"least": 0.0}, {"least": 1.5}, {"damping": 0.0}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must lie in"):
        REWRITES.make("rsq", options)


def test_the_card() -> None:
    card = REWRITES.card("rsq")
    assert card.on == (Kind.LINEAR,)
    assert card.paper is not None
    assert card.paper.arxiv == "2503.01820"
    assert any("rotated" in d for d in card.deviations)
