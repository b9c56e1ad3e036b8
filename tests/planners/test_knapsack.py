"""Mixed plans: what is priced is what is applied, budgets hold, and protected sites stay."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.core.documents import Budget
from lamina.core.errors import InputError, LaminaError
from lamina.core.menu import Option
from lamina.core.registry import PLANNERS, rewrite_of
from lamina.lab import Bench, Lab
from lamina.lab.order import merged
from lamina.lab.pricing import Pricing, written
from lamina.planners._trials import Healed, Trials
from lamina.testing.models import lively, text, tiny


def _tokens(lab: Lab) -> int:
    return sum(b["input_ids"].numel() for b in lab.batches)


BUDGETS = (
    Budget(metric="bytes", keep=0.6),
    Budget(metric="bytes", keep=0.4),
    Budget(metric="parameters", keep=0.7),
    Budget(metric="parameters", keep=0.5, protect=("block.1",)),
)


def bench() -> Lab:
    return Lab(lively(tiny("llama")), text(8, 24), batch_size=2)


def planned(lab: Lab, budget: Budget, **options: Any) -> Any:
    return PLANNERS.make("knapsack", options).plan(None, budget, lab.anatomy, Bench(lab))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_plan_meets_the_budget_once_it_is_applied(budget: Budget) -> None:
    lab = bench()
    steps = planned(lab, budget)
    before = lab.anatomy.total()
    after = before
    for step in merged(steps, lab):
        receipt = rewrite_of(step).apply(step, lab)
        after = after - (receipt.before - receipt.after)
    assert budget.keep is not None
    whole, left = asdict(before)[budget.metric], asdict(after)[budget.metric]
    assert left <= budget.keep * whole + 1
    told = sum(s.why.get(budget.metric, 0.0) for s in steps)
    assert whole - left == pytest.approx(told, rel=0.02), "what the steps say that they free is what they free"
    assert not any(site.startswith(p) for s in steps for site in s.sites for p in budget.protect)
    places = {".".join(s.split(".")[:3]) for step in steps for s in step.sites}
    assert len(places) <= 8
    assert all(s.why["damage"] > 0 for s in steps)


def test_a_trial_is_what_applying_gives() -> None:
    lab = bench()
    planner = PLANNERS.make("knapsack", {"rank_rewrite": "svd"})
    options, trials = planner.menu(Bench(lab)).options, planner.trials(lab)
    chosen = [
        next(o for o in options if o.groups == (site,) and word in o.name and "+" not in o.name)
        for site, word in (
            ("block.0.mlp", "narrow to 32"),
            ("block.1.attention", "svd at 50%"),
            ("block.1.mlp", "Q5_0"),
            ("block.2.attention", "drop"),
            ("block.3.attention", "narrow to 1 of 2"),
        )
    ]
    ids = text(2, 9, seed=5)
    with torch.no_grad():
        with trials.on(chosen):
            want = lab.model(ids, use_cache=False).logits
        fitted = Lab(lab.model, torch.cat([b["input_ids"] for b in lab.batches])[:6], batch_size=2)
        for step in merged([s for o in chosen for s in o.steps], fitted):
            rewrite_of(step).apply(step, fitted)
        got = fitted.model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_the_model_is_as_before_whatever_was_priced() -> None:
    lab = bench()
    before = {k: v.clone() for k, v in lab.model.state_dict().items()}
    planned(lab, BUDGETS[0])
    after = lab.model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_prices_of_small_changes_are_the_divergence_that_they_make() -> None:
    """Half the Gauss-Newton form along a small change is the divergence from the model as it was."""
    lab = Lab(lively(tiny("llama")), text(48, 40), batch_size=8)
    site, path = "block.2.mlp", "model.layers.2.mlp.down_proj"
    weight = lab.model.get_submodule(path).weight.detach().clone()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    pricing = Pricing(lab, probes=("fisher",))
    with torch.no_grad():
        dense = [torch.log_softmax(lab.forward(b).double(), -1) for b in lab.batches]
    for size in (0.02, 0.05):
        changed = {path: weight + size * noise}
        trials = {site: [("noise", lambda w=changed: written(lab.model, w))]}
        priced = pricing.price(lambda s, t=trials: t.get(s, []))[site, "noise"]
        slope, curve, _ = priced.mean()
        true = 0.0
        with written(lab.model, changed), torch.no_grad():
            for batch, before in zip(lab.batches, dense, strict=True):
                after = torch.log_softmax(lab.forward(batch).double(), -1)
                true += float((before.exp() * (before - after)).sum(-1)[:, :-1].sum())
        assert slope == 0.0
        assert curve == pytest.approx(true / (48 * 39), rel=0.3)


def test_dropping_costs_what_the_damage_measure_says() -> None:
    from lamina.core.registry import MEASURES

    lab = bench()
    pricing = Pricing(lab)
    scores = MEASURES.make("damage", {"kappa": 1.0}).measure(lab)
    for site in ("block.1.mlp", "block.2.attention"):
        slope, _, damped = pricing.silence(site).mean()
        assert max(slope + damped, 1e-4 + 0.1 * damped) == pytest.approx(scores[site], rel=1e-4)


@pytest.mark.parametrize(
    ("budget", "options", "said"),
    [
        (Budget(metric="blocks", drop=1), {}, "no budget of blocks"),
        (Budget(metric="bytes", keep=0.01), {}, "at most"),
        (Budget(metric="bytes", keep=0.5), {"moves": ("melt",)}, "moves are"),
        (Budget(metric="bytes", keep=0.5), {"shares": (1.5,)}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_planned_is_told(budget: Budget, options: dict[str, Any], said: str) -> None:
    with pytest.raises((InputError, LaminaError), match=said):
        planned(bench(), budget, **options)


def test_options_say_which_rewrites_they_use() -> None:
    options = PLANNERS.make("knapsack", {"types": ("Q4_0",), "shares": (0.5,)}).menu(Bench(bench())).options
    both = [o for o in options if "+" in o.name]
    assert {o.kinds for o in both} == {("narrow", "round")}
    assert all(isinstance(o, Option) and set(o.saves) == {"parameters", "bytes", "macs", "kv_bytes"} for o in options)
    single = {o.name: o for o in options if o.groups == ("block.1.mlp",)}
    joined = single["narrow to 32 of 64 neurons + Q4_0"]
    assert joined.damage == pytest.approx(single["narrow to 32 of 64 neurons"].damage + 0.5 * single["Q4_0"].damage)


def test_a_probe_tells_what_is_left_after_healing() -> None:
    lab = bench()
    before = {k: v.clone() for k, v in lab.model.state_dict().items()}
    planner = PLANNERS.make("knapsack", {"probe": 30, "rank_rewrite": "svd"})
    options = planner.menu(Bench(lab)).options
    assert isinstance(planner.trials(lab), Healed)
    healed, plain = Healed(lab, lab, 30), Trials(lab, lab)
    gone = [next(o for o in options if o.name == "drop" and o.groups == (f"block.{n}.mlp",)) for n in (1, 2)]
    bits = next(o for o in options if o.name == "Q4_0" and o.groups == ("block.3.mlp",))
    assert healed.rise(gone) < plain.rise(gone)
    assert healed.rise([bits]) == pytest.approx(plain.rise([bits])), "bits do not heal"
    both, added = healed.rise([*gone, bits]), plain.rise([*gone, bits]) - plain.rise(gone)
    assert both == pytest.approx(healed.rise(gone) + added, abs=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in lab.model.state_dict().items())


def test_trials_see_the_inputs_of_all_that_may_be_tried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward over the text for fitting, then one over the judged text for each plan; the same rises either way."""
    lab, planner = bench(), PLANNERS.make("knapsack", {"rank_rewrite": "svd"})
    options = [o for o in planner.menu(Bench(lab)).options if o.name == "narrow to 32 of 64 neurons"]
    rises, passes = [], []
    for room in (2**30, 0):
        monkeypatch.setattr("lamina.planners._trials.ROOM", room)
        trials = planner.trials(lab)
        trials.expect(options)
        before = lab.counts.blocks
        trials.rise(options[1:3])
        rises.append([trials.rise([o]) for o in options[:3]])
        run = (lab.counts.blocks - before) / lab.depth
        passes.append((run - 5 * _tokens(trials.lab)) / _tokens(trials.fitting))
    assert passes == [1, 2]
    assert rises[0] == rises[1]


def test_reasons_are_of_the_budget_that_was_planned(tmp_path: Path) -> None:
    lab, planner = bench(), PLANNERS.make("knapsack", {"rounds": 0, "moves": ("drop", "bits")})
    kept = Bench(lab, folder=tmp_path, mark="m")
    planned_one = Budget(metric="bytes", keep=0.6)
    steps = planner.plan(None, planned_one, lab.anatomy, kept)
    assert len(planner.explain(planned_one, kept)) == len(steps)
    with pytest.raises(InputError, match="no plan of this budget"):
        planner.explain(Budget(metric="bytes", keep=0.5), kept)
