"""EvoPress over a menu: ladders of options, and plans of them against all plans and against what applying gives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import PLANNERS, rewrite_of
from lamina.core.sites import Kind
from lamina.lab import Bench, Lab
from lamina.lab.order import merged
from lamina.planners._levels import Levels, Measured
from lamina.testing.models import lively, text, tiny


def planned(lab: Lab, budget: Budget, **options: Any) -> Any:
    return PLANNERS.make("evopress", {"levels": "menu", **options}).plan(None, budget, lab.anatomy, Bench(lab))


def kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


FEW: Any = {"moves": ("drop", "narrow"), "shares": (0.75, 0.5)}
BYTES = Budget(metric="bytes", keep=0.8)


def eight() -> Lab:
    return Lab(lively(tiny("llama")), text(8, 24), batch_size=2)


def test_the_best_plan_of_a_small_menu_is_found() -> None:
    """All plans of four MLPs, each at any of its levels, each tried as a whole."""
    lab, moves = eight(), {**FEW, "moves": ("drop", "narrow", "bits"), "types": ("Q4_0",)}
    menu = PLANNERS.make("knapsack", {**moves, "kinds": (Kind.MLP,)})
    problem, trials = menu.problem(BYTES, Bench(lab)), menu.trials(lab)
    ladders = list(Levels(problem, BYTES, lab.anatomy).ladders.values())
    assert sum(len(ladder) for ladder in ladders) >= 9
    ids = torch.cat([b["input_ids"] for b in lab.batches])[6:]
    prices = dict[tuple[str, ...], float]()
    with torch.no_grad():
        dense = lab.model(ids).logits
        for plan in itertools.product(*([None, *ladder] for ladder in ladders)):
            options = [o for o in plan if o]
            if sum(o.saves["bytes"] for o in options) >= problem.needs["bytes"]:
                with trials.on(options):
                    prices[tuple(o.name + o.groups[0] for o in options)] = kl(dense, lab.model(ids).logits)
    assert len(prices) > 20
    got = planned(lab, BYTES, kinds=(Kind.MLP,), menu_options=moves, switch="any", generations=40)
    assert got[0].why["kl"] == pytest.approx(min(prices.values()), rel=1e-3)
    assert len({s.why["kl"] for s in got}) == 1


def test_a_plan_of_a_menu_costs_what_it_says_once_it_is_applied() -> None:
    lab = eight()
    options = {"menu_options": {**FEW, "rank_rewrite": "svd"}, "generations": 5, "offspring": 6, "first": 6}
    got = planned(lab, BYTES, **options)
    ids = torch.cat([b["input_ids"] for b in lab.batches])
    rise = lab.on(ids[6:]).loss()
    before = lab.anatomy.total()
    with torch.no_grad():
        dense = lab.model(ids[6:]).logits
        fitted = Lab(lab.model, ids[:6], batch_size=2)
        for step in merged(got, fitted):
            rewrite_of(step).apply(step, fitted)
        value = kl(dense, fitted.model(ids[6:], use_cache=False).logits)
    assert got[0].why["kl"] == pytest.approx(value, rel=2e-2)
    freed = before.bytes - fitted.anatomy.total().bytes
    assert freed >= 0.2 * before.bytes - 1
    assert sum(s.why["bytes"] for s in got) == pytest.approx(freed, rel=0.02)
    rise = fitted.on(ids[6:]).loss() - rise
    assert sum(s.why["damage"] for s in got) == pytest.approx(rise, rel=0.05, abs=1e-4)


def test_a_ladder_frees_and_costs_more_from_level_to_level() -> None:
    lab = eight()
    problem = PLANNERS.make("knapsack", {}).problem(BYTES, Bench(lab))
    space = Levels(problem, BYTES, lab.anatomy)
    assert len(space.ladders) == 8
    assert len(set(space.groups)) == 2
    for ladder in space.ladders.values():
        assert len(ladder) > 2
        pairs = list(itertools.pairwise(ladder))
        assert all(a.saves["bytes"] < b.saves["bytes"] and a.damage < b.damage for a, b in pairs)
        mine = [o for o in problem.options if o.groups == ladder[0].groups]
        for option in mine:
            assert any(p.saves["bytes"] >= option.saves["bytes"] and p.damage <= option.damage for p in ladder)
    assert space.guess is not None
    exact = [problem.options[i] for i in problem.cheapest() or []]
    assert sum(o.damage for o in space.chosen(space.guess)) == pytest.approx(sum(o.damage for o in exact))
    levels = (len(ladder) for ladder in space.ladders.values())
    assert not space.allowed(tuple(levels)), "something is left"


def test_the_text_of_a_stage_is_part_of_what_is_judged_and_metrics_are_their_formulas() -> None:
    lab = eight()
    menu = PLANNERS.make("knapsack", {**FEW, "moves": ("drop",)})
    problem, trials = menu.problem(BYTES, Bench(lab)), menu.trials(lab)
    drop = [o for o in problem.options if o.groups[0] in ("block.1.mlp", "block.2.attention")]
    ids = torch.cat([b["input_ids"] for b in lab.batches])[6:]
    short = Measured(trials, "kl", 1, 10, 2)
    assert sum(b["input_ids"].numel() for b in short.lab.batches) == 10
    loss, whole = (Measured(trials, metric, 9, 256, 2) for metric in ("loss", "kl"))
    with torch.no_grad(), lab.ablate(o.groups[0] for o in drop):
        logits = lab.model(ids).logits
    with torch.no_grad():
        dense = lab.model(ids).logits
    assert whole.value(drop) == pytest.approx(kl(dense, logits), rel=1e-4)
    judged = lab.on(ids)
    gone = [o.groups[0] for o in drop]
    assert loss.value(drop) == pytest.approx(judged.loss(gone) - judged.loss(), abs=1e-6)
    before = lab.counts.heads
    assert whole.value(drop) == whole.known[tuple((o.groups[0], o.name) for o in drop)]
    assert lab.counts.heads == before, "what was tried is remembered"
    with pytest.raises(InputError, match="no metric named 'kll'"):
        Measured(trials, "kll", 1, 10, 2)
