"""FinerCut (arXiv 2405.18218) against the double loop: all candidates, whole forwards, masks on the projections."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError
from lamina.core.registry import MEASURES, PLANNERS
from lamina.lab import Bench, Judge, Lab
from lamina.maths import divergence
from lamina.testing.models import padded, text, tiny
from lamina.testing.planted import silence, silent_model

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gemma2", "granite", "mixtral", "qwen3", "mistral")
NATS = 2e-4
"""Relative: what float32 logits leave of a divergence's accuracy."""


def run(model: Any, ids: torch.Tensor, count: int, **options: Any) -> tuple[tuple[Step, ...], Lab]:
    lab = Lab(model, ids)
    budget = Budget(metric="sublayers", drop=count)
    return PLANNERS.make("finercut", options).plan(None, budget, lab.anatomy, Bench(lab)), lab


def same(steps: tuple[Step, ...], wanted: list[tuple[str, float]]) -> None:
    """The same sites in the same order, and the same divergence at every step."""
    assert [s.sites for s in steps] == [(site,) for site, _ in wanted]
    assert [s.why["divergence"] for s in steps] == pytest.approx([v for _, v in wanted], rel=NATS, abs=1e-7)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_picks_and_divergences_as_the_double_loop(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name, seed=1), text(3, 8)
    wanted, _ = literal.greedy(model, name, ids, 6)
    same(run(model, ids, 6)[0], wanted)


@settings(max_examples=8)
@given(seed=st.integers(0, 9999), name=st.sampled_from(["llama", "gpt2", "gpt_neox"]), batch_size=st.integers(1, 3))
def test_any_seed_and_batch_size(literal: ModuleType, seed: int, name: str, batch_size: int) -> None:
    model, ids = tiny(name, seed=seed), text(3, 6, seed=seed)
    wanted, _ = literal.greedy(model, name, ids, 4)
    same(run(model, ids, 4, batch_size=batch_size)[0], wanted)


@pytest.mark.parametrize("metric", ["kl", "js", "js-reversed"])
def test_every_metric_is_its_definition(metric: str, literal: ModuleType) -> None:
    model, ids = tiny("llama", seed=2), text(3, 8)
    wanted, _ = literal.greedy(model, "llama", ids, 4, metric)
    same(run(model, ids, 4, metric=metric)[0], wanted)


@pytest.mark.parametrize(("name", "depth", "count"), [("llama", 8, 4), ("gpt_neox", 8, 4), ("mixtral", 6, 4)])
def test_at_most_half_of_the_double_loops_block_evaluations(
    name: str, depth: int, count: int, literal: ModuleType
) -> None:
    model, ids = tiny(name, num_hidden_layers=depth), text(3, 6)
    wanted, forwards = literal.greedy(model, name, ids, count)
    steps, lab = run(model, ids, count)
    same(steps, wanted)
    assert lab.counts.blocks <= 0.5 * forwards * depth * lab.tokens
    assert lab.counts.heads <= forwards * lab.tokens
    assert lab.counts.backwards == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
@pytest.mark.parametrize("metric", ["js-reversed", "js", "kl"])
@pytest.mark.parametrize("place", [0, 1])
def test_silent_sublayer_goes_first_at_divergence_zero(name: str, metric: str, place: int) -> None:
    model = tiny(name)
    lab = Lab(model, text(3, 8))
    site = lab.anatomy.parts("block.2")[place].id
    silence(lab.anatomy, site)
    steps, _ = run(model, text(3, 8), 2, metric=metric)
    assert steps[0].sites == (site,)
    assert steps[0].why["divergence"] == 0.0
    assert steps[1].why["divergence"] > 0.0


def test_zeroed_projection_goes_first_at_divergence_zero(literal: ModuleType) -> None:
    for site in ("block.3.attention", "block.0.mlp"):
        model = literal.zeroed(tiny("llama"), "llama", [site])
        steps, _ = run(model, text(3, 8), 1)
        assert steps[0].sites == (site,)
        assert steps[0].why["divergence"] == 0.0


def test_ties_go_in_numeric_depth_order() -> None:
    """All sites are silent: block 2 goes before block 10, an attention before its MLP."""
    model = tiny("llama", num_hidden_layers=11)
    silent_model(model)
    steps, lab = run(model, text(1, 4), 6)
    assert [s.sites[0] for s in steps] == [s.id for s in lab.anatomy.sublayers][:6]


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99),
    hint=st.lists(st.floats(-1, 1), min_size=8, max_size=8),
    metric=st.sampled_from(["kl", "js", "js-reversed"]),
    base=st.sets(st.integers(0, 7), max_size=3),
)
def test_early_stopping_never_changes_the_choice(seed: int, hint: list[float], metric: str, base: set[int]) -> None:
    """Whatever is tried first, and on whatever base, the least full value wins."""
    lab = Lab(tiny("llama", seed=seed), text(4, 6, seed=seed))
    units = [s.id for s in lab.anatomy.sublayers]
    gone = [units[i] for i in base]
    options = [u for u in units if u not in gone]
    full = Judge(lab, metric)
    values = [full.value([*gone, o]) for o in options]
    judge = Judge(lab, metric)
    judge.rebase(gone)
    place, value = judge.least(options, hint=hint[: len(options)])
    assert place == values.index(min(values))
    assert value == pytest.approx(min(values), rel=1e-5)


def test_early_stopping_saves_work() -> None:
    """With a true hint, options are given up before their last sequence."""
    lab = Lab(tiny("llama", seed=1), text(8, 6))
    judge = Judge(lab, "kl")
    judge.rebase(())
    options = [s.id for s in lab.anatomy.sublayers]
    values = [judge.value([o]) for o in options]
    fresh, before = Judge(lab, "kl"), lab.counts.heads
    fresh.rebase(())
    before = lab.counts.heads
    assert fresh.least(options, hint=values)[0] == values.index(min(values))
    assert lab.counts.heads - before < 0.8 * len(options) * lab.tokens


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_divergences_per_weight_pick_the_least_price(seed: int) -> None:
    lab = Lab(tiny("llama", seed=seed), text(3, 6))
    base, weights = ["block.1.mlp"], [1.0, 3.0, 1.0, 5.0, 2.0, 1.0, 2.5]
    judge = Judge(lab, "kl")
    judge.rebase(base)
    options = [s.id for s in lab.anatomy.sublayers if s.id not in base]
    full = Judge(lab, "kl")
    level = full.value(base)
    prices = [(full.value([*base, o]) - level) / w for o, w in zip(options, weights, strict=True)]
    place, value = judge.least(options, weights=weights)
    assert place == prices.index(min(prices))
    assert value == pytest.approx(full.value([*base, options[place]]), rel=1e-5)


def test_padding_is_not_compared() -> None:
    model = tiny("llama", seed=1)
    rows = [text(1, n, seed=n)[0] for n in (4, 11, 7)]
    alone = Lab(model, [{"input_ids": r.unsqueeze(0)} for r in rows])
    budget = Budget(metric="sublayers", drop=4)
    wanted = PLANNERS.make("finercut").plan(None, budget, alone.anatomy, Bench(alone))
    for side in ("left", "right"):
        lab = Lab(model, padded(rows, 3, side=side))
        got = PLANNERS.make("finercut", {"batch_size": 3}).plan(None, budget, lab.anatomy, Bench(lab))
        same(got, [(s.sites[0], s.why["divergence"]) for s in wanted])


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("early", [0.2, 0.3, 0.4])
def test_early_blocks_stay_until_their_share_of_sublayers_has_gone(
    early: float, seed: int, literal: ModuleType
) -> None:
    """Blocks 0 … int(depth·x) wait until int(2·depth·x) + 1 sublayers have gone: here one that would go first."""
    depth, count = 6, 7
    model = literal.zeroed(tiny("llama", seed=seed, num_hidden_layers=depth), "llama", ["block.0.mlp"])
    ids, until = text(2, 6), int(2 * depth * early) + 1
    assert run(model, ids, 1)[0][0].sites == ("block.0.mlp",)
    steps, _ = run(model, ids, count, early=early)
    same(steps, literal.greedy(model, "llama", ids, count, early=early)[0])
    order = [s.sites[0] for s in steps]
    waiting = tuple(f"block.{n}." for n in range(int(depth * early) + 1))
    assert not any(s.startswith(waiting) for s in order[:until])
    assert any(s.startswith(waiting) for s in order[until:])


def test_protection_that_leaves_too_little_is_one_line() -> None:
    """Four of six blocks wait for seven sublayers, of which there are four."""
    with pytest.raises(InputError, match="at most 4 may go") as caught:
        run(tiny("llama", num_hidden_layers=6), text(2, 6), 6, early=0.5)
    assert "\n" not in str(caught.value)


def test_unknown_metric_is_refused_with_a_hint() -> None:
    with pytest.raises(InputError, match="js-reversed"):
        run(tiny("llama"), text(2, 6), 1, metric="js-reverse")


def distributions(*shape: int) -> torch.Tensor:
    return 4 * torch.randn(*shape, 40, generator=torch.Generator().manual_seed(0))


def test_textbook_and_reversed_formulas() -> None:
    """½[KL(p‖m) + KL(q‖m)] and ½[KL(m‖p) + KL(m‖q)], with torch's kl_div as the paper's code calls it."""
    a, b = distributions(2, 5, 7).double()
    p, q = a.softmax(-1), b.softmax(-1)
    m = (p + q) / 2
    kl_div = torch.nn.functional.kl_div
    code = 0.5 * (kl_div(p.log(), m, reduction="none") + kl_div(q.log(), m, reduction="none")).sum(-1)
    textbook = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(-1)
    torch.testing.assert_close(divergence.js_reversed(a, b).double(), code, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(divergence.js(a, b).double(), textbook, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(divergence.kl(a, b).double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert (code - textbook).abs().max() > 0.1
    assert divergence.js(a, b).max() <= math.log(2) + 1e-6


@pytest.mark.parametrize("function", [divergence.js, divergence.js_reversed, divergence.kl])
def test_divergence_from_oneself_is_exactly_zero(function: Any) -> None:
    a = distributions(50)
    assert function(a, a.clone()).eq(0).all()
    assert function(a, distributions(2, 50)[1]).gt(0).all()


@pytest.mark.parametrize("function", [divergence.js, divergence.js_reversed, divergence.kl])
def test_vanishing_probabilities_give_numbers(function: Any) -> None:
    """Words whose probability underflows in float32 under both models."""
    a = torch.tensor([[0.0, 1.0, -300.0], [0.0, -500.0, 500.0]])
    b = torch.tensor([[1.0, 0.0, -300.0], [500.0, -500.0, 0.0]])
    assert function(a, b).isfinite().all()
    assert function(a, b).gt(0).all()


@pytest.mark.parametrize("metric", ["js-reversed", "js", "kl"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_the_one_shot_measure_is_the_loops_first_step(name: str, metric: str, literal: ModuleType) -> None:
    model, ids = tiny(name, seed=1), text(3, 8)
    dense = literal.logits(model, ids)
    got = MEASURES.make("output-divergence", {"metric": metric}).measure(Lab(model, ids, batch_size=2))
    assert set(got.values) == {s for n in range(4) for s in (f"block.{n}", *literal.parts(name, f"block.{n}"))}
    for site in got.values:
        with literal.masked(model, name, [site]):
            wanted = literal.divergence(metric, dense, literal.logits(model, ids))
        assert got[site] == pytest.approx(wanted, rel=1e-3, abs=1e-6), site
    first = run(model, ids, 1, metric=metric)[0][0]
    best = min((s for s in got.values if s.count(".") == 2), key=lambda s: got[s])
    assert first.sites == (best,)
    assert first.why["divergence"] == pytest.approx(got[best], rel=NATS, abs=1e-7)


def test_a_silent_site_diverges_by_nothing() -> None:
    lab = Lab(tiny("llama"), text(3, 8))
    silence(lab.anatomy, "block.2")
    got = MEASURES.make("output-divergence").measure(lab)
    assert got["block.2"] == got["block.2.attention"] == got["block.2.mlp"] == 0.0


def test_the_one_shot_measure_refuses_an_unknown_metric() -> None:
    with pytest.raises(InputError, match="metric is one of js-reversed, js, kl, not 'angular'"):
        MEASURES.make("output-divergence", {"metric": "angular"})
