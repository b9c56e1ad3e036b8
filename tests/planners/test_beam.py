"""Beam search against greedy, against a plain beam in loops, and against all sets."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import PLANNERS, row
from lamina.core.sites import Kind
from lamina.lab import Bench, Lab
from lamina.testing.bench import synthetic
from lamina.testing.models import text, tiny
from lamina.testing.planted import silence

SUBLAYERS = (Kind.ATTENTION, Kind.MLP, Kind.MOE)
WHOLE: Any = {"shortlist": 0, "margin": None}
"""Every candidate is judged, in full."""


def steps(name: str, lab: Lab, budget: Budget, scores: Any = None, **options: Any) -> Any:
    return PLANNERS.make(name, options).plan(scores, budget, lab.anatomy, Bench(lab))


def kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def costs(lab: Lab, sets: list[frozenset[str]]) -> dict[frozenset[str], float]:
    """The KL from the dense model of each set, by whole forwards."""
    (ids,) = [b["input_ids"] for b in lab.batches]
    dense, found = lab.model(ids).logits, {}
    for gone in sets:
        with lab.ablate(gone):
            found[gone] = kl(dense, lab.model(ids).logits)
    return found


@pytest.mark.parametrize("per", ["budget", "site"])
@pytest.mark.parametrize("kinds", [(Kind.BLOCK,), SUBLAYERS], ids=["blocks", "sublayers"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_width_one_is_greedy(name: str, kinds: tuple[Kind, ...], per: str) -> None:
    for budget in (Budget(metric="parameters", keep=0.6), Budget(metric="sublayers", drop=3)):
        lab = Lab(tiny(name, seed=3), text(3, 8))
        wanted = steps("greedy", lab, budget, kinds=kinds, per=per, **WHOLE)
        got = steps("beam", lab, budget, kinds=kinds, per=per, width=1, **WHOLE)
        assert [s.sites for s in got] == [s.sites for s in wanted]
        assert [dict(s.why) for s in got] == [pytest.approx(dict(s.why), abs=1e-9) for s in wanted]


def test_width_one_is_greedy_with_a_shortlist_and_scores() -> None:
    for seed in range(3):
        lab = Lab(tiny("llama", num_hidden_layers=8, seed=seed), text(3, 8))
        scores, budget = synthetic(lab.anatomy, seed), Budget(metric="blocks", drop=4)
        wanted = steps("greedy", lab, budget, scores, shortlist=1)
        assert steps("beam", lab, budget, scores, shortlist=1, width=1) == wanted


def plain_beam(lab: Lab, units: list[str], count: int, width: int) -> tuple[frozenset[str], float]:
    """All sets one larger than those kept, each by a whole forward; the best `width` are kept."""
    kept, prices = [frozenset[str]()], {}
    for _ in range(count):
        grown = dict.fromkeys(one | {u} for one in kept for u in units if u not in one)
        prices = costs(lab, list(grown))
        kept = sorted(prices, key=lambda g: prices[g])[:width]
    return kept[0], prices[kept[0]]


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize(("name", "seed"), [("llama", 0), ("llama", 5), ("gpt_neox", 1)])
def test_is_the_plain_beam_where_all_sites_count_the_same(name: str, seed: int, width: int) -> None:
    lab = Lab(tiny(name, num_hidden_layers=6, seed=seed), text(3, 8, seed=seed), batch_size=3)
    gone, value = plain_beam(lab, [s.id for s in lab.anatomy.of_kind(Kind.BLOCK)], 3, width)
    got = steps("beam", lab, Budget(metric="blocks", drop=3), width=width, **WHOLE)
    assert {s for step in got for s in step.sites} == gone
    assert got[-1].why["kl"] == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert sum(s.why["rise"] for s in got) == pytest.approx(got[-1].why["kl"])


@pytest.mark.parametrize("seed", range(3))
def test_a_beam_as_wide_as_all_sets_finds_the_best_one(seed: int) -> None:
    lab = Lab(tiny("llama", seed=seed), text(3, 6, seed=seed), batch_size=3)
    every = [frozenset(c) for c in itertools.combinations([s.id for s in lab.anatomy.sublayers], 3)]
    prices = costs(lab, every)
    got = steps("beam", lab, Budget(metric="sublayers", drop=3), kinds=SUBLAYERS, width=len(every), **WHOLE)
    assert {s.sites[0] for s in got} == min(prices, key=lambda g: prices[g])


def test_two_sites_that_undo_each_other_are_found_by_a_wide_beam_alone() -> None:
    """One MLP adds a constant, the next takes it away, and nothing hears it between: either alone costs much."""
    model: Any = tiny("gpt2")
    lab = Lab(model, text(3, 8), batch_size=3)
    pair = {"block.1.mlp", "block.2.mlp"}
    silence(lab.anatomy, "block.2.attention", *pair)
    with torch.no_grad():
        constant = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
        for number, sign in ((1, 1), (2, -1)):
            model.transformer.h[number].mlp.c_proj.bias.copy_(sign * constant)
    budget = Budget(metric="sublayers", drop=3)
    narrow, broad = (steps("beam", lab, budget, kinds=SUBLAYERS, width=w, **WHOLE) for w in (1, 28))
    assert {s.sites[0] for s in broad} == {"block.2.attention", *pair}
    assert broad[-1].why["kl"] == pytest.approx(0, abs=1e-4)
    assert not pair & {s.sites[0] for s in narrow}
    assert narrow[-1].why["kl"] > 0.01


@pytest.mark.parametrize("width", [1, 3])
def test_what_is_silent_goes_first(width: int) -> None:
    lab = Lab(tiny("llama"), text(3, 8))
    silence(lab.anatomy, "block.1.attention", "block.3.mlp")
    got = steps("beam", lab, Budget(metric="sublayers", drop=3), kinds=SUBLAYERS, width=width)
    assert {s.sites[0] for s in got[:2]} == {"block.1.attention", "block.3.mlp"}
    assert [s.why["kl"] for s in got[:2]] == [0.0, 0.0]
    assert got[2].why["kl"] > 0


def test_what_was_judged_is_not_judged_again(tmp_path: Path) -> None:
    """A search that is killed after its first round goes on from the journal, and ends where it would have."""
    budget, journal = Budget(metric="blocks", drop=3), tmp_path / "judged.json"

    def fresh(progress: Any = lambda *_: None) -> Lab:
        return Lab(tiny("llama", num_hidden_layers=6, seed=1), text(3, 8), progress=progress)

    class KilledError(Exception):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    planner = PLANNERS.make("beam", {"width": 2, "metric": "loss", **WHOLE})  # no candidate is given up half heard
    lab = fresh()
    whole = planner.plan(None, budget, lab.anatomy, Bench(lab))
    with pytest.raises(KilledError):
        planner.plan(None, budget, lab.anatomy, Bench(fresh(kill), journal=journal))
    assert journal.stat().st_size > 100
    again = fresh()
    assert planner.plan(None, budget, again.anatomy, Bench(again, journal=journal)) == whole
    assert again.counts.heads <= lab.counts.heads - 6 * lab.tokens
    last = fresh()
    assert planner.plan(None, budget, last.anatomy, Bench(last, journal=journal)) == whole
    assert last.counts.heads == last.tokens, "all but the dense pass is known"


def test_no_more_is_judged_than_the_width_asks() -> None:
    lab = Lab(tiny("llama", num_hidden_layers=8), text(3, 8))
    bench = Bench(lab)
    PLANNERS.make("beam", {"width": 2, **WHOLE}).plan(None, Budget(metric="blocks", drop=3), lab.anatomy, bench)
    judged = bench.judge("kl", sequences=8, length=256, batch_size=2).estimates
    sizes = [sum(len(g) == 2 * n for g in judged) for n in (1, 2, 3)]
    assert sizes[0] == 8
    assert sizes[1] <= 2 * 7
    assert sizes[2] <= 2 * 6


def test_the_recipe_and_what_is_refused() -> None:
    entry = row("beam")
    assert (entry.measure, entry.planner, entry.refit, entry.kinds) == ("damage", "beam", True, (Kind.BLOCK,))
    with pytest.raises(InputError, match="width is at least 1, not 0"):
        PLANNERS.make("beam", {"width": 0})
    lab = Lab(tiny("llama"), text(2, 6))
    with pytest.raises(InputError, match="at most 3 may go this way"):
        steps("beam", lab, Budget(metric="blocks", drop=4))
