"""N2N (arXiv 1709.06030): the reward, the policy's gradient by literal sums, and the best student of all."""

from __future__ import annotations

import itertools
import math
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import PLANNERS
from lamina.core.sites import Kind
from lamina.lab import Bench, Lab
from lamina.papers.depth.n2n import Policy, features, reward
from lamina.testing.models import text, tiny
from lamina.testing.planted import silence


def planned(lab: Lab, budget: Budget, **options: Any) -> Any:
    return PLANNERS.make("n2n", options).plan(None, budget, lab.anatomy, Bench(lab))


def sites(steps: Any) -> frozenset[str]:
    return frozenset(s for step in steps for s in step.sites)


def test_the_ends_of_the_reward() -> None:
    assert reward(1.0, 0.0) == 0.0
    assert reward(1.0, 1.0) == 1.0
    assert reward(0.5, 1.0) == 0.5


@given(low=st.floats(0, 1), high=st.floats(0, 1), accuracy=st.floats(0.01, 1))
def test_the_reward_rises_with_the_compression(low: float, high: float, accuracy: float) -> None:
    low, high = sorted((low, high))
    assert reward(accuracy, low) <= reward(accuracy, high)
    if high - low > 1e-3 and high < 1 - 1e-3:
        assert reward(accuracy, low) < reward(accuracy, high)


def one(arms: int) -> Any:
    """One layer goes, any."""
    return lambda order: [] if order else list(range(arms))


def test_a_bandit_converges_to_its_best_arm() -> None:
    policy, draw, worth = Policy(torch.eye(4).tolist(), 30, 0.02, 0), Random(0), [0.1, 0.3, 0.9, 0.5]
    before = policy.odds().detach().softmax(0)
    for _ in range(120):
        policy.learn(lambda: policy.drawn(one(4), draw), lambda order: worth[order[0]], 5)
    assert float(before.max()) < 0.4
    assert float(policy.odds().softmax(0)[2].detach()) > 0.9


def test_an_order_is_drawn_by_the_odds_of_what_is_left() -> None:
    policy = Policy([[1.0, 0.1 * n] for n in range(5)], 8, 0.01, 3)
    odds, draw, firsts = policy.odds().detach().double().tolist(), Random(1), [0] * 5
    for _ in range(40):
        order, said = policy.drawn(lambda done: [] if len(done) == 3 else [n for n in range(5) if n not in done], draw)
        left, wanted = list(range(5)), 0.0
        for layer in order:
            wanted += odds[layer] - math.log(sum(math.exp(odds[n]) for n in left))
            left.remove(layer)
        assert len(set(order)) == 3
        assert float(said.detach()) == pytest.approx(wanted, abs=1e-5)
        firsts[order[0]] += 1
    assert sum(n > 0 for n in firsts) >= 4


def test_a_step_goes_up_the_literal_gradient() -> None:
    """Of Σ (R - b) log p / N, with b the mean of all rewards before; of the first rollouts their own."""
    policy, draw = Policy([[1.0, 0.1 * n] for n in range(4)], 6, 0.01, 0), Random(0)
    parameters = [*policy.reads.parameters(), *policy.says.parameters()]
    earlier = list[float]()
    for _ in range(3):
        drawn, worth = [], {}
        for _ in range(5):
            order, said = policy.drawn(one(4), draw)
            drawn.append((order, said))
            worth[order[0]] = draw.random()
        rewards = [worth[o[0]] for o, _ in drawn]
        base = sum(earlier or rewards) / len(earlier or rewards)
        odds = policy.odds()
        goal = sum((r - base) * (odds[o[0]] - odds.exp().sum().log()) for r, (o, _) in zip(rewards, drawn, strict=True))
        assert isinstance(goal, torch.Tensor)
        wanted = torch.autograd.grad(goal / 5, parameters)
        waiting = iter(drawn)
        policy.learn(lambda waiting=waiting: next(waiting), lambda order, worth=worth: worth[order[0]], 5)
        for parameter, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, -gradient, rtol=1e-3, atol=1e-6)
        earlier += rewards


def rewards(lab: Lab, count: int) -> dict[frozenset[str], float]:
    """Of all sets of blocks, by whole forwards and transformers' own loss."""
    model: Any = lab.model
    (ids,) = [b["input_ids"] for b in lab.batches]
    whole, found = sum(p.numel() for p in model.parameters()), {}
    blocks = [s.id for s in lab.anatomy.of_kind(Kind.BLOCK)]
    with torch.no_grad():
        dense = float(model(ids, labels=ids).loss)
        for gone in itertools.combinations(blocks, count):
            with lab.ablate(gone):
                accuracy = math.exp(dense - float(model(ids, labels=ids).loss))
            size = sum(p.numel() for b in gone for p in model.get_submodule(lab.anatomy.site(b).path).parameters())
            share = size / whole
            found[frozenset(gone)] = accuracy * share * (2 - share)
    return found


@pytest.mark.parametrize(("name", "seed"), [("llama", 0), ("llama", 3), ("gpt_neox", 1)])
def test_the_best_student_of_all_is_found(name: str, seed: int) -> None:
    lab = Lab(tiny(name, num_hidden_layers=6, seed=seed), text(4, 8, seed=seed), batch_size=4)
    table = rewards(lab, 2)
    got = planned(lab, Budget(metric="blocks", drop=2))
    assert sites(got) == max(table, key=lambda g: table[g])
    assert got[0].why["reward"] == pytest.approx(max(table.values()), rel=1e-4)
    assert got[0].why["reward"] == pytest.approx(
        reward(math.exp(-got[0].why["loss"]), 1 - (lab.anatomy.total() - lab.anatomy.freed(sites(got))).parameters
               / lab.anatomy.total().parameters)
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_what_is_silent_goes(seed: int) -> None:
    """All of one size: the reward would have it that larger layers go before those that are as silent."""
    lab = Lab(tiny("llama"), text(4, 8))
    silence(lab.anatomy, "block.0.mlp", "block.1.mlp", "block.3.mlp")
    got = planned(lab, Budget(metric="sublayers", drop=3), metric="kl", seed=seed)
    assert sites(got) == {"block.0.mlp", "block.1.mlp", "block.3.mlp"}
    assert all(s.why["kl"] == 0 for s in got)


def test_no_more_students_are_judged_than_drawn() -> None:
    lab = Lab(tiny("llama", num_hidden_layers=8), text(4, 8))
    bench = Bench(lab)
    planner = PLANNERS.make("n2n", {"epochs": 4, "rollouts": 3})
    got = planner.plan(None, Budget(metric="sublayers", drop=5), lab.anatomy, bench)
    judged = bench.judge("loss", sequences=8, length=256, batch_size=2).known
    assert 4 < len(judged) <= 4 * 3
    assert sites(got) in judged
    assert lab.counts.heads == (len(judged) + 1) * lab.tokens
    assert lab.counts.backwards == 0


def test_layers_are_told_by_kind_place_and_costs() -> None:
    anatomy = Lab(tiny("llama"), text(2, 4)).anatomy
    rows = features(anatomy, [s.id for s in anatomy.sublayers])
    assert [r[:2] for r in rows[:2]] == [[1, 0], [0, 1]]
    assert [r[2] for r in rows] == pytest.approx([n / 7 for n in range(8)])
    assert rows[0][3] == pytest.approx(3072 / 6144, abs=0.01)
    assert rows[1][3] == 1.0
    assert [r[5] for r in rows[:2]] == [1.0, 0.0]


def test_the_recipe_plans_blocks(rows: SimpleNamespace) -> None:
    lab = Lab(tiny("llama"), text(3, 8))
    got = rows.plan("n2n", lab, Budget(metric="parameters", keep=0.8))
    assert sites(got) <= {f"block.{n}" for n in range(4)}
    with pytest.raises(InputError, match="rate is above 0"):
        PLANNERS.make("n2n", {"rate": 0.0})
