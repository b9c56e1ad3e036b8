"""EvoPress (arXiv 2410.14649): its mutation and selection in plain loops, and the best of all sets on tiny models."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.core.documents import Budget
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import PLANNERS, rows
from lamina.core.sites import Kind
from lamina.lab import Bench, Lab
from lamina.planners._evolve import Drops, Genome, Space, Stage, brood, evolve
from lamina.planners._target import Target
from lamina.testing.bench import synthetic
from lamina.testing.models import text, tiny
from lamina.testing.planted import silence


def planned(lab: Lab, budget: Budget, scores: Any = None, **options: Any) -> Any:
    return PLANNERS.make("evopress", options).plan(scores, budget, lab.anatomy, Bench(lab))


def sites(steps: Any) -> frozenset[str]:
    return frozenset(s for step in steps for s in step.sites)


def kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def costs(lab: Lab, sets: list[frozenset[str]]) -> dict[frozenset[str], float]:
    (ids,) = [b["input_ids"] for b in lab.batches]
    dense, found = lab.model(ids).logits, {}
    for gone in sets:
        with lab.ablate(gone):
            found[gone] = kl(dense, lab.model(ids).logits)
    return found


# the search finds what is best


@pytest.mark.parametrize(("name", "seed"), [("llama", 0), ("llama", 4), ("gpt_neox", 2)])
def test_the_best_of_all_sets_of_sublayers_is_found(name: str, seed: int) -> None:
    """Four of ten, any; and two attentions and two MLPs, as published."""
    lab = Lab(tiny(name, num_hidden_layers=5, seed=seed), text(3, 6, seed=seed), batch_size=3)
    prices = costs(lab, [frozenset(c) for c in itertools.combinations([s.id for s in lab.anatomy.sublayers], 4)])
    even = {g: v for g, v in prices.items() if sum(s.endswith("attention") for s in g) == 2}
    budget = Budget(metric="sublayers", drop=4)
    for table, switch in ((prices, "any"), (even, "kind")):
        got = planned(lab, budget, switch=switch, generations=40)
        assert sites(got) == min(table, key=lambda g: table[g])
        assert {s.why["kl"] for s in got} == {got[0].why["kl"]}
        assert got[0].why["kl"] == pytest.approx(min(table.values()), rel=1e-3, abs=1e-6)


def test_the_best_of_all_sets_that_meet_a_budget_of_parameters_is_found() -> None:
    """Of those from which no site could stay."""
    lab = Lab(tiny("llama", num_hidden_layers=5, seed=1), text(3, 6), batch_size=3)
    budget = Budget(metric="parameters", keep=0.7)
    target, every = Target(budget, lab.anatomy), [s.id for s in lab.anatomy.sublayers]
    sets = [frozenset(c) for n in range(1, 10) for c in itertools.combinations(every, n)]
    least = [g for g in sets if target.met(g) and target.allowed(g) and not any(target.met(g - {s}) for s in g)]
    prices = costs(lab, least)
    assert len(prices) > 100
    got = planned(lab, budget, switch="any", generations=40)
    assert sites(got) == min(prices, key=lambda g: prices[g])


def test_the_best_set_of_blocks_is_found_with_the_usual_settings() -> None:
    for seed in range(3):
        lab = Lab(tiny("llama", num_hidden_layers=8, seed=seed), text(3, 6, seed=seed), batch_size=3)
        blocks = [s.id for s in lab.anatomy.of_kind(Kind.BLOCK)]
        prices = costs(lab, [frozenset(c) for c in itertools.combinations(blocks, 3)])
        assert sites(planned(lab, Budget(metric="blocks", drop=3))) == min(prices, key=lambda g: prices[g])


@pytest.mark.parametrize("seed", range(3))
def test_what_is_silent_goes(seed: int) -> None:
    lab = Lab(tiny("llama", num_hidden_layers=6), text(3, 8))
    quiet = frozenset({"block.1.attention", "block.4.attention", "block.2.mlp", "block.3.mlp"})
    silence(lab.anatomy, *quiet)
    got = planned(lab, Budget(metric="sublayers", drop=4), seed=seed, generations=40)
    assert sites(got) == quiet
    assert all(s.why == {"kl": 0.0} for s in got)


# mutation


def wide(each: int, gone: int) -> tuple[Space, Genome]:
    """Attentions and MLPs in turn, so many of each gone."""
    space = Space(
        ["attention", "mlp"] * each, [1] * (2 * each), met=lambda g: sum(g) >= 2 * gone, allowed=lambda _: True
    )
    return space, (1,) * (2 * gone) + (0,) * (2 * each - 2 * gone)


def test_a_switch_keeps_how_many_of_each_kind_go() -> None:
    space, parent = wide(each=300, gone=100)
    draw, flips = Random(0), Counter[int]()
    for _ in range(900):
        child = space.switched(parent, draw, 3, across=False)
        assert child is not None
        assert sum(child[::2]) == sum(child[1::2]) == 100
        flips[sum(a != b for a, b in zip(parent, child, strict=True)) // 2] += 1
    wanted = {1: 5 / 9, 2: 3 / 9, 3: 1 / 9}  # the lower of two draws from 1, 2, 3
    assert {n: c / 900 for n, c in flips.items()} == pytest.approx(wanted, abs=0.05)


def test_a_switch_across_kinds_keeps_how_many_go() -> None:
    space, parent = wide(each=40, gone=10)
    draw = Random(0)
    children = [space.switched(parent, draw, 3, across=True) for _ in range(100)]
    assert all(c is not None and sum(c) == 20 for c in children)
    assert len({sum(c[::2]) for c in children if c}) > 1


def test_how_many_plans_are_one_switch_away() -> None:
    space, parent = wide(each=8, gone=3)
    assert space.pairs(parent, across=False) == 2 * 3 * 5
    assert space.pairs(parent, across=True) == 6 * 10


@given(
    tops=st.lists(st.integers(1, 3), min_size=1, max_size=7),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_all_plans_that_are_made_just_meet_the_budget(tops: list[int], share: float, seed: int, data: Any) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(tops), max_size=len(tops)))
    groups = data.draw(st.lists(st.sampled_from("ab"), min_size=len(tops), max_size=len(tops)))

    def amount(genome: Genome) -> int:
        return sum(w * x for w, x in zip(weights, genome, strict=True))

    need = share * amount(tuple(tops))
    space = Space(groups, tops, met=lambda g: amount(g) >= need, allowed=lambda g: g[0] < tops[0] or len(g) < 2)
    draw = Random(seed)
    one = space.drawn(draw)
    if one is None:
        assert amount(space.full()) < need or len(tops) > 1
        return
    other = space.drawn(draw) or one
    made = [
        one,
        other,
        space.switched(one, draw, 3, across=bool(seed % 2)),
        space.crossed(one, other, draw.randrange(len(tops) + 1), draw),
        space.flipped(one, draw),
    ]
    for plan in (m for m in made if m is not None):
        assert all(0 <= x <= top for x, top in zip(plan, tops, strict=True))
        assert space.allowed(plan)
        assert amount(plan) >= need
        for place, level in enumerate(plan):
            lower = (*plan[:place], level - 1, *plan[place + 1 :])
            assert level == 0 or amount(lower) < need or not space.allowed(lower)


def test_first_sets_take_as_many_of_each_kind_and_the_lowest_scores() -> None:
    lab = Lab(tiny("llama", num_hidden_layers=6), text(2, 6))
    space = Drops(Target(Budget(metric="sublayers", drop=4), lab.anatomy))
    scores = synthetic(lab.anatomy, 7)
    guess, *drawn = space.firsts(20, Random(0), scores)
    order = sorted(space.units, key=lambda u: scores[u])
    assert set(space.sites(guess)) == set(order[:4])
    assert len(set(drawn)) == len(drawn) == 20
    assert all(sum(s.endswith("attention") for s in space.sites(g)) == 2 for g in drawn)


# selection


def literal(first: list[int], broods: list[list[int]], tables: list[Any], survivors: list[int]) -> list[list[int]]:
    """The published loop on plans that are numbers: selections one after the other, parents join in the last."""
    population = sorted(first, key=tables[0])[: survivors[-1]]
    history = [population]
    for young in broods:
        left = list(young)
        for stage, (count, table) in enumerate(zip(survivors, tables, strict=True)):
            if stage == len(survivors) - 1:
                left += [p for p in population if p not in left]
            left = sorted(left, key=table)[:count]
        population = left
        history.append(population)
    return history


@given(seed=st.integers(0, 9999), survivors=st.sampled_from([[1], [2, 1], [4, 2], [5, 3, 2]]))
def test_selection_is_the_published_loop(seed: int, survivors: list[int]) -> None:
    draw = Random(seed)
    noise = [{n: draw.random() for n in range(100)} for _ in survivors]
    first = draw.sample(range(100), 8)
    broods = [draw.sample(range(100), 10) for _ in range(6)]
    wanted = literal(first, broods, [t.__getitem__ for t in noise], survivors)
    waiting, history = iter(broods), list[Any]()

    def vary(population: Any) -> list[Genome]:
        return [(n,) for n in next(waiting)]

    stages = [Stage(survivors=n, value=lambda g, t=t: t[g[0]]) for n, t in zip(survivors, noise, strict=True)]
    best, value = evolve(
        [(n,) for n in first], stages, vary, 6, lambda _, population: history.append([g[0] for g in population])
    )
    assert history == wanted
    assert best == (wanted[-1][0],)
    assert value == noise[-1][best[0]]
    last = [noise[-1][h[0]] for h in history]
    assert last[1:] == sorted(last[1:], reverse=True), "the best one is never lost"


def test_of_equals_the_one_of_earlier_places_is_fitter() -> None:
    plans = list(itertools.product((0, 1), repeat=4))
    two = [p for p in plans if sum(p) == 2]
    assert evolve(two, [Stage(survivors=1, value=lambda _: 0.5)], lambda _: (), 3) == ((1, 1, 0, 0), 0.5)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(LaminaError, match="not a number"):
        evolve([(0,)], [Stage(survivors=1, value=lambda _: float("nan"))], lambda _: (), 1)
    values = {(0,): float("nan"), (1,): 2.0}
    assert evolve(list(values), [Stage(survivors=1, value=values.__getitem__)], lambda _: (), 0) == ((1,), 2.0)


def test_a_brood_holds_no_plan_twice_and_ends() -> None:
    draw = Random(0)
    assert sorted(brood(lambda: (draw.randrange(3),), 10, [(1,)])) == [(0,), (2,)]
    assert brood(lambda: None, 5) == []


# what it costs


def test_no_more_is_judged_than_the_options_promise() -> None:
    lab = Lab(tiny("llama", num_hidden_layers=8), text(8, 8))
    bench = Bench(lab)
    options = {"first": 10, "offspring": 6, "generations": 5, "survivors": (3, 1), "tokens": (16, 64), "length": 8}
    PLANNERS.make("evopress", options).plan(None, Budget(metric="sublayers", drop=6), lab.anatomy, bench)
    few, many = (bench.judge("kl", sequences=n, length=8, batch_size=2) for n in (2, 8))
    assert 10 < len(few.known) <= 10 + 5 * 6
    assert 1 < len(many.known) <= 1 + 5 * 3
    heads = len(few.known) * 2 * 8 + len(many.known) * 8 * 8
    assert lab.counts.heads == heads + 10 * 8, "beside the dense pass of each judge"
    assert lab.counts.blocks < lab.depth * heads, "candidates start where they differ from the parent"


def test_a_killed_search_goes_on_and_ends_where_it_would_have(tmp_path: Path) -> None:
    budget, journal = Budget(metric="sublayers", drop=4), tmp_path / "judged.json"

    class KilledError(Exception):
        pass

    def kill(_: str, done: int, __: int) -> None:
        if done == 3:
            raise KilledError

    def fresh(progress: Any = lambda *_: None) -> Lab:
        return Lab(tiny("llama", num_hidden_layers=6, seed=2), text(3, 8), progress=progress)

    planner = PLANNERS.make("evopress", {"generations": 6, "offspring": 5, "first": 8})
    lab, again = fresh(), fresh()
    whole = planner.plan(None, budget, lab.anatomy, Bench(lab))
    with pytest.raises(KilledError):
        planner.plan(None, budget, lab.anatomy, Bench(fresh(kill), journal=journal))
    assert planner.plan(None, budget, again.anatomy, Bench(again, journal=journal)) == whole
    assert again.counts.heads <= lab.counts.heads - 15 * lab.tokens


def test_progress_and_seeds() -> None:
    told = list[Any]()
    lab = Lab(tiny("llama", num_hidden_layers=8), text(3, 6), progress=lambda *x: told.append(x))
    budget, options = Budget(metric="sublayers", drop=6), {"generations": 1, "first": 2, "offspring": 2}
    plans = [planned(lab, budget, seed=seed, **options) for seed in (0, 0, 1, 2)]
    assert plans[0] == plans[1]
    assert len({sites(p) for p in plans}) > 1
    assert told[:2] == [("plan", 0, 1), ("plan", 1, 1)]
    lab.seed = 2
    assert planned(lab, budget, **options) == plans[3]


def test_what_cannot_be_is_refused() -> None:
    for options, said in (
        ({"survivors": (2, 1), "tokens": (512,)}, "its survivors and its tokens"),
        ({"offspring": 0}, "at least 1"),
        ({"switch": "all"}, "kind or any"),
        ({"levels": "bits"}, "drop or menu"),
    ):
        with pytest.raises(InputError, match=said):
            PLANNERS.make("evopress", options)
    lab = Lab(tiny("llama"), text(2, 6))
    with pytest.raises(InputError, match="at most 3 may go this way"):
        planned(lab, Budget(metric="blocks", drop=4))
    with pytest.raises(InputError, match="blocks"):
        planned(lab, Budget(metric="blocks", drop=1), levels="menu")


def test_the_published_number_of_generations() -> None:
    """Two thirds of k(n - k), where k of n blocks' attentions and as many MLPs go."""
    told = list[Any]()
    lab = Lab(tiny("llama", num_hidden_layers=8), text(2, 6), progress=lambda *x: told.append(x))
    for budget in (Budget(metric="sublayers", drop=6), Budget(metric="blocks", drop=3)):
        told.clear()
        planned(lab, budget, first=2, offspring=1)
        assert told[-1] == ("plan", 10, 10)


def test_the_rows_name_the_planner() -> None:
    assert {n for n, r in rows().items() if r.planner == "evopress"} == {"evopress", "evopress-blocks"}
    lab, entry = Lab(tiny("llama"), text(3, 8)), rows()["evopress-blocks"]
    got = planned(lab, Budget(metric="parameters", keep=0.8), kinds=entry.kinds, **entry.planner_options)
    assert sites(got) <= {f"block.{n}" for n in range(4)}
