"""Greedy against double loops: SLEB's (arXiv 2402.09025) by the loss, lamina's own by divergence per parameter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import PLANNERS, row
from lamina.core.scores import Scores
from lamina.core.sites import Kind
from lamina.lab import Bench, Lab
from lamina.testing.bench import synthetic
from lamina.testing.models import text, tiny
from lamina.testing.planted import silence

SUBLAYERS = (Kind.ATTENTION, Kind.MLP, Kind.MOE)
MODELS = ("llama", "gpt2", "gpt_neox", "mixtral")
HEARD: Any = {"metric": "kl", "sequences": 8, "length": 256, "batch_size": 2}
"""The judge that the planner asks for."""


def plan(lab: Lab, budget: Budget, scores: Any = None, **options: Any) -> list[tuple[str, dict[str, float]]]:
    steps = PLANNERS.make("greedy", options).plan(scores, budget, lab.anatomy, Bench(lab))
    return [(s.sites[0], dict(s.why)) for s in steps]


def sleb(lab: Lab, count: int) -> list[tuple[str, float]]:
    """Every block that stands, but for the first and the last, is tried with a whole forward; the least loss goes."""
    blocks = [s.id for s in lab.anatomy.of_kind(Kind.BLOCK)]
    alive, picks, dense = list(blocks), [], lab.loss()
    for _ in range(count):
        gone = [b for b in blocks if b not in alive]
        losses = {b: lab.loss([*gone, b]) for b in alive[1:-1]}
        best = min(losses, key=lambda b: losses[b])
        alive.remove(best)
        picks.append((best, losses[best] - dense))
    return picks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_sleb_is_the_double_loop(name: str, seed: int) -> None:
    model = tiny(name, seed=seed, **({"n_layer": 6} if name == "gpt2" else {"num_hidden_layers": 6}))
    lab = Lab(model, text(3, 8))
    entry = row("sleb")
    wanted = sleb(lab, 3)
    got = plan(lab, Budget(metric="blocks", drop=3), kinds=entry.kinds, **entry.planner_options)
    assert [s for s, _ in got] == [s for s, _ in wanted]
    assert [w["loss"] for _, w in got] == pytest.approx([v for _, v in wanted], abs=3e-6)


def test_sleb_keeps_the_first_and_the_last_block() -> None:
    """Though they add nothing; and a silent block between goes first, at no rise."""
    lab = Lab(tiny("llama"), text(3, 8))
    silence(lab.anatomy, "block.0", "block.2", "block.3")
    entry = row("sleb")
    got = plan(lab, Budget(metric="blocks", drop=2), kinds=entry.kinds, **entry.planner_options)
    assert [s for s, _ in got] == ["block.2", "block.1"]
    assert got[0][1] == {"loss": 0.0, "rise": 0.0}
    with pytest.raises(InputError, match="at most 2"):
        plan(lab, Budget(metric="blocks", drop=3), kinds=entry.kinds, **entry.planner_options)


def kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def by_price(lab: Lab, need: int, kinds: tuple[Kind, ...], *, per_budget: bool) -> list[tuple[str, float]]:
    """All candidates in full: the rise of the KL over what the site frees of what is still to be freed."""
    (ids,) = [b["input_ids"] for b in lab.batches]
    found, units = lab.anatomy, [s.id for s in lab.anatomy.of_kind(*kinds)]
    attentions = {s.id for s in found.of_kind(Kind.ATTENTION)}
    dense, gone, picks, level = lab.model(ids).logits, list[str](), [], 0.0
    while (amount := found.freed(gone).parameters) < need:
        values, prices = {}, {}
        for unit in units:
            more = found.freed([*gone, unit]).parameters - amount
            if unit in gone or attentions <= found.expand([*gone, unit]) or more <= 0:
                continue
            with lab.ablate([*gone, unit]):
                values[unit] = kl(dense, lab.model(ids).logits)
            prices[unit] = (values[unit] - level) / (min(more, need - amount) if per_budget else 1)
        best = min(prices, key=lambda u: prices[u])
        level = values[best]
        gone.append(best)
        picks.append((best, level))
    return picks


@pytest.mark.parametrize("per", ["budget", "site"])
@pytest.mark.parametrize("kinds", [(Kind.BLOCK,), SUBLAYERS], ids=["blocks", "sublayers"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_least_divergence_per_parameter(name: str, kinds: tuple[Kind, ...], per: str) -> None:
    lab = Lab(tiny(name, seed=2), text(3, 8), batch_size=3)
    need = math.ceil(lab.anatomy.total().parameters * 0.4)
    wanted = by_price(lab, need, kinds, per_budget=per == "budget")
    budget = Budget(metric="parameters", limit=lab.anatomy.total().parameters - need)
    got = plan(lab, budget, kinds=kinds, per=per, shortlist=0, margin=None)
    assert [s for s, _ in got] == [s for s, _ in wanted]
    assert [w["kl"] for _, w in got] == pytest.approx([v for _, v in wanted], rel=2e-4, abs=1e-7)
    rises = [b - a for a, b in zip([0.0, *(v for _, v in wanted)], [v for _, v in wanted], strict=False)]
    assert [w["rise"] for _, w in got] == pytest.approx(rises, rel=1e-3, abs=1e-6)


@settings(max_examples=12)
@given(seed=st.integers(0, 999), hints=st.integers(0, 999))
def test_scores_order_the_work_and_not_the_result(seed: int, hints: int) -> None:
    lab = Lab(tiny("llama", seed=seed), text(3, 6, seed=seed))
    budget = Budget(metric="sublayers", drop=3)
    without = plan(lab, budget, kinds=SUBLAYERS, shortlist=0, margin=None)
    hinted = plan(lab, budget, synthetic(lab.anatomy, hints), kinds=SUBLAYERS, shortlist=0, margin=None)
    assert [s for s, _ in hinted] == [s for s, _ in without]
    assert [w["kl"] for _, w in hinted] == pytest.approx([w["kl"] for _, w in without], rel=1e-6)


@pytest.mark.parametrize("metric", ["parameters", "bytes", "blocks", "sublayers"])
def test_protected_and_edges_stay(metric: str) -> None:
    lab = Lab(tiny("llama", num_hidden_layers=6), text(2, 6))
    budget = Budget(metric=metric, keep=0.7, protect=("block.2.mlp",))  # type: ignore[arg-type]
    got = [s for s, _ in plan(lab, budget, edges=1)]
    assert not {"block.0", "block.2", "block.5"} & set(got)


def test_the_shortlist_and_the_neighbours_of_gaps_are_judged() -> None:
    """The first round hears four times the shortlist, by the scores; later ones the cheapest and what lies beside."""
    lab = Lab(tiny("llama", num_hidden_layers=10), text(2, 6))
    scores = Scores(measure="made-up", values={f"block.{n}": np.asarray([1.0 + (n - 7) ** 2]) for n in range(10)})
    bench = Bench(lab)
    planner = PLANNERS.make("greedy", {"shortlist": 1, "batch_size": 2})
    steps = planner.plan(scores, Budget(metric="blocks", drop=2), lab.anatomy, bench)
    first, second = (s.sites[0] for s in steps)
    judged = [{lab.anatomy.collapse(c) for c in bench.judge(**HEARD).estimates if len(c) == 2 * n} for n in (1, 2)]
    assert judged[0] == {("block.5",), ("block.6",), ("block.7",), ("block.8",)}
    assert (first,) in judged[0]
    number = int(first.removeprefix("block."))
    beside = {f"block.{number - 1}", f"block.{number + 1}"}
    partners = {b for pair in judged[1] for b in pair} - {first}
    assert beside <= partners
    assert len(partners - beside) <= 1
    assert second in partners
