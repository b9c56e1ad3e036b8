"""Planners on tiny models with made-up scores: budgets in every unit, minimal and literal choices, ties, refusals."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lamina.anatomy import Anatomy
from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError
from lamina.core.registry import PLANNERS, rewrite_of, row, rows
from lamina.core.scores import Scores
from lamina.core.sites import Kind, depth_key
from lamina.lab import Bench, Lab
from lamina.testing.bench import SyntheticMeasure, synthetic
from lamina.testing.models import text, tiny

MODELS = ("llama", "gpt2", "mixtral")
METRICS = ("parameters", "bytes", "blocks", "sublayers")


@cache
def anatomy(name: str = "llama") -> Anatomy:
    return Anatomy.of(tiny(name))


def scored(values: dict[str, float], spans: dict[str, list[float]] | None = None) -> Scores:
    return Scores(
        measure="made-up",
        values={k: np.array([v]) for k, v in values.items()},
        spans={k: np.array(v) for k, v in (spans or {}).items()},
    )


def lowest(scores: Scores, budget: Budget, name: str = "llama", bench: Any = None, **options: Any) -> list[str]:
    steps = PLANNERS.make("lowest", options).plan(scores, budget, anatomy(name), bench)
    assert all(len(s.sites) == 1 and s.rewrite == "drop" for s in steps)
    assert all(s.why == {scores.measure: scores[s.sites[0]]} for s in steps) or bench
    return [s.sites[0] for s in steps]


def run_of(scores: Scores, budget: Budget, name: str = "llama", **options: Any) -> tuple[str, ...]:
    steps = PLANNERS.make("contiguous", options).plan(scores, budget, anatomy(name))
    assert len(steps) <= 1
    return steps[0].sites if steps else ()


def freed(name: str, metric: str, sites: list[str] | tuple[str, ...]) -> int:
    """Counted from the model: parameters of all removed modules, each once."""
    found = anatomy(name)
    gone = {p.id for s in sites for p in found.parts(s)}
    if metric == "sublayers":
        return len(gone)
    whole = [b for b in found.of_kind(Kind.BLOCK) if {p.id for p in found.parts(b)} <= gone]
    if metric == "blocks":
        return len(whole)
    modules = [found.model.get_submodule(b.path) for b in whole]
    covered = {p.id for b in whole for p in found.parts(b)}
    for site in gone - covered:
        block, branch = found.model.get_submodule(found.block(site).path), found.branch(site)
        modules += [block.get_submodule(path) for path in (branch.core, *branch.own)]
    each = {id(p): p for m in modules for p in m.parameters()}.values()
    return sum(p.numel() * (p.element_size() if metric == "bytes" else 1) for p in each)


def whole(name: str, metric: str) -> int:
    found = anatomy(name)
    if metric in ("blocks", "sublayers"):
        return len(found.of_kind(Kind.BLOCK)) if metric == "blocks" else len(found.sublayers)
    each = {id(p): p for p in found.model.parameters()}.values()
    return sum(p.numel() * (p.element_size() if metric == "bytes" else 1) for p in each)


def met(name: str, budget: Budget, sites: list[str] | tuple[str, ...]) -> bool:
    left = whole(name, budget.metric) - freed(name, budget.metric, sites)
    if budget.drop is not None:
        return freed(name, budget.metric, sites) >= budget.drop
    if budget.limit is not None:
        return left <= budget.limit
    assert budget.keep is not None
    keep = budget.keep * whole(name, budget.metric)
    return left <= keep + (0.5 if budget.metric in ("blocks", "sublayers") else 1e-6 * keep)


UNITS = st.sampled_from([(), (Kind.BLOCK,), (Kind.ATTENTION,), (Kind.ATTENTION, Kind.MLP, Kind.MOE)])
BUDGETS = st.one_of(
    st.builds(lambda m, k: Budget(metric=m, keep=k), st.sampled_from(METRICS), st.floats(0.3, 1.0)),
    st.builds(lambda m, k: Budget(metric=m, drop=k), st.sampled_from(METRICS[2:]), st.integers(0, 8)),
    st.builds(lambda k: Budget(metric="parameters", limit=k), st.integers(3_000, 60_000)),
    st.builds(lambda k: Budget(metric="bytes", limit=k), st.integers(12_000, 240_000)),
)


def possible(found: Anatomy, sites: list[str]) -> bool:
    gone = {p.id for s in sites for p in found.parts(s)}
    attentions = {s.id for s in found.of_kind(Kind.ATTENTION)}
    return not attentions <= gone and len(gone) < len(found.sublayers)


def walked(scores: Scores, budget: Budget, name: str, kinds: tuple[Kind, ...]) -> list[str] | None:
    """The lowest one that may still go, again and again; None where the budget can't be met."""
    found, gone = anatomy(name), list[str]()
    kept = {p.id for s in budget.protect for p in found.parts(s)}
    units = [s.id for s in (found.of_kind(*kinds) if kinds else found.sublayers)]
    units = [u for u in units if not kept & {p.id for p in found.parts(u)}]
    while not met(name, budget, gone):
        left = [u for u in units if u not in gone and possible(found, [*gone, u])]
        if not left:
            return None
        gone.append(min(left, key=lambda u: (scores[u], depth_key(u))))
    return gone


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(MODELS),
    budget=BUDGETS,
    kinds=UNITS,
    protect=st.sets(st.sampled_from(["block.0", "block.3", "block.1.attention"])),
)
def test_lowest_is_the_plain_walk(
    seed: int, name: str, budget: Budget, kinds: tuple[Kind, ...], protect: set[str]
) -> None:
    budget = Budget(
        metric=budget.metric, keep=budget.keep, limit=budget.limit, drop=budget.drop, protect=tuple(sorted(protect))
    )
    scores = synthetic(anatomy(name), seed)
    wanted = walked(scores, budget, name, kinds)
    if wanted is None:
        with pytest.raises(InputError, match="at most") as caught:
            lowest(scores, budget, name, kinds=kinds)
        assert "\n" not in str(caught.value)
        assert caught.value.hint
        return
    got = lowest(scores, budget, name, kinds=kinds)
    assert got == wanted
    assert met(name, budget, got)
    assert not got or not met(name, budget, got[:-1])


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-6, 1e6), budget=BUDGETS)
def test_lowest_depends_on_the_order_of_scores_alone(seed: int, scale: float, budget: Budget) -> None:
    scores = synthetic(anatomy(), seed)
    assume(walked(scores, budget, "llama", ()) is not None)
    warped = scored({k: math.log(float(v[0])) * scale for k, v in scores.values.items()})
    assert lowest(scores, budget) == lowest(warped, budget)


@given(data=st.data(), name=st.sampled_from(MODELS))
def test_lowest_with_ties_goes_in_depth_order(data: st.DataObject, name: str) -> None:
    sites = [s.id for s in anatomy(name).sublayers]
    values = {s: float(data.draw(st.integers(0, 1), label=s)) for s in sites}
    got = lowest(scored(values), Budget(metric="sublayers", drop=3), name)
    assert got == sorted(sites, key=lambda s: values[s])[:3]


def test_ties_go_by_number_not_by_name() -> None:
    deep = Anatomy.of(tiny("llama", num_hidden_layers=12))
    steps = PLANNERS.make("lowest", {"kinds": (Kind.BLOCK,)}).plan(
        scored({s.id: 1.0 for s in reversed(deep.sites)}), Budget(metric="blocks", drop=4), deep
    )
    assert [s.sites[0] for s in steps] == ["block.0", "block.1", "block.2", "block.3"]


def test_lowest_ranks_only_what_is_scored() -> None:
    scores = scored({"block.3.attention": 5.0, "block.1.mlp": 7.0})
    assert lowest(scores, Budget(metric="sublayers", drop=2)) == ["block.3.attention", "block.1.mlp"]
    with pytest.raises(InputError, match="at most 2 may go this way"):
        lowest(scores, Budget(metric="sublayers", drop=3))


def test_a_block_and_its_parts_are_not_both_dropped() -> None:
    """Where blocks and sublayers are ranked together, what is gone already is no choice."""
    values = {s.id: 9.0 for s in anatomy().sites} | {"block.2": 0.0, "block.2.mlp": 0.1, "block.2.attention": 0.2}
    got = lowest(scored(values), Budget(metric="sublayers", drop=3), kinds=(Kind.BLOCK, Kind.ATTENTION, Kind.MLP))
    gone = [p.id for s in got for p in anatomy().parts(s)]
    assert got[0] == "block.2"
    assert len(gone) == len(set(gone))


def test_last_attention_stays() -> None:
    """Three attentions are the lowest; a fourth would leave none, so MLPs follow."""
    values = {s.id: float(s.kind is not Kind.ATTENTION) for s in anatomy().sublayers}
    got = lowest(scored(values), Budget(metric="sublayers", drop=5))
    assert got == ["block.0.attention", "block.1.attention", "block.2.attention", "block.0.mlp", "block.1.mlp"]


class Recording(SyntheticMeasure):
    """Other scores at every call; notes which sites were silent."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def measure(self, lab: Lab) -> Scores:
        self.calls += 1
        return synthetic(lab.anatomy, self.calls)


@pytest.mark.parametrize(("every", "calls"), [(0, 0), (1, 4), (2, 2), (3, 1), (9, 0)])
def test_rescore_every_n_sites(every: int, calls: int) -> None:
    lab = Lab(anatomy().model, text(1, 4), anatomy=anatomy())
    measure = Recording()
    first = synthetic(anatomy(), 0)
    got = lowest(first, Budget(metric="sublayers", drop=5), bench=Bench(lab, measure), rescore=every)  # type: ignore[arg-type]
    assert measure.calls == calls
    gone: list[str] = []
    for n in range(5):
        table = synthetic(anatomy(), n // every) if every else first
        left = [s.id for s in anatomy().sublayers if s.id not in gone and possible(anatomy(), [*gone, s.id])]
        gone.append(min(left, key=lambda s: table[s]))
    assert got == gone


# contiguous


def literal_run(scores: Scores, budget: Budget, name: str) -> tuple[str, ...] | None:
    """All runs of blocks by length, then by the span's column n - 1."""
    found = anatomy(name)
    kept = {p.id for s in budget.protect for p in found.parts(s)}
    for n in range(1, 5):
        runs = [tuple(f"block.{i}" for i in range(first, first + n)) for first in range(5 - n)]
        runs = [r for r in runs if possible(found, list(r)) and met(name, budget, r)]
        runs = [r for r in runs if not kept & {p.id for b in r for p in found.parts(b)}]
        if runs:
            return min(runs, key=lambda r: (scores.spans[r[0]][n - 1], depth_key(r[0])))
    return None


@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(MODELS),
    budget=BUDGETS,
    protect=st.sets(st.sampled_from(["block.0", "block.3", "block.1.attention"])),
)
def test_contiguous_is_the_literal_search(seed: int, name: str, budget: Budget, protect: set[str]) -> None:
    budget = Budget(
        metric=budget.metric, keep=budget.keep, limit=budget.limit, drop=budget.drop, protect=tuple(sorted(protect))
    )
    scores = synthetic(anatomy(name), seed)
    if met(name, budget, ()):
        assert run_of(scores, budget, name) == ()
        return
    wanted = literal_run(scores, budget, name)
    if wanted is None:
        with pytest.raises(InputError, match="at most") as caught:
            run_of(scores, budget, name)
        assert "\n" not in str(caught.value)
        return
    assert run_of(scores, budget, name) == wanted


def test_contiguous_reads_column_n_minus_1() -> None:
    """The official block dropping of LLM-Drop reads column n, the gap n + 1: the least there is another run."""
    spans = {"block.0": [9, 5, 1, 9], "block.1": [9, 2, 9], "block.2": [9, 6], "block.3": [9]}
    scores = scored({}, spans)
    assert run_of(scores, Budget(metric="blocks", drop=2)) == ("block.1", "block.2")
    assert run_of(scores, Budget(metric="blocks", drop=3)) == ("block.0", "block.1", "block.2")


def test_contiguous_ties_go_to_the_front() -> None:
    assert run_of(synthetic(anatomy(), constant=True), Budget(metric="blocks", drop=2)) == ("block.0", "block.1")


def test_contiguous_refusal_names_what_can_go() -> None:
    scores = synthetic(anatomy())
    with pytest.raises(InputError, match="at most 3 may go this way"):
        run_of(scores, Budget(metric="blocks", drop=4))
    with pytest.raises(InputError, match="at most 2 may go this way"):
        run_of(scores, Budget(metric="blocks", drop=3, protect=("block.1",)))


def test_contiguous_needs_spans() -> None:
    with pytest.raises(InputError, match=r"scores no runs of blocks .*use angular"):
        run_of(scored({"block.0": 1.0}), Budget(metric="blocks", drop=1))


# budgets


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("keep", [1.0, 0.9, 0.75, 0.6])
def test_keep_is_a_fraction_of_the_whole_dense_model(metric: str, keep: float) -> None:
    """Embeddings, head and final norm count in the whole, though they can't go."""
    budget = Budget(metric=metric, keep=keep)  # type: ignore[arg-type]
    for name in MODELS:
        got = lowest(synthetic(anatomy(name)), budget, name)
        assert met(name, budget, got)
        assert not got or not met(name, budget, got[:-1])


def test_a_limit_that_holds_exactly_drops_no_more() -> None:
    total, scores = anatomy().total(), synthetic(anatomy())
    first = scores_order(scores)[0]
    exact = total.parameters - anatomy().cost(first).parameters
    assert lowest(scores, Budget(metric="parameters", limit=total.parameters)) == []
    assert lowest(scores, Budget(metric="parameters", limit=total.parameters - 1)) == [first]
    assert lowest(scores, Budget(metric="parameters", limit=exact)) == [first]
    assert len(lowest(scores, Budget(metric="parameters", limit=exact - 1))) == 2


def scores_order(scores: Scores) -> list[str]:
    return [s for s in scores.ranked() if s.count(".") == 2]


def test_keep_of_parameters_never_leaves_one_too_many() -> None:
    """keep = left/whole, as exactly as floats can say it, asks for no further site."""
    found = anatomy()
    scores = synthetic(found)
    order = scores_order(scores)
    for count in range(1, 6):
        left = found.total().parameters - freed("llama", "parameters", order[:count])
        assert lowest(scores, Budget(metric="parameters", keep=left / found.total().parameters)) == order[:count]


@pytest.mark.parametrize(
    "budget",
    [
        Budget(metric="parameters", limit=1),
        Budget(metric="bytes", keep=1e-9),
        Budget(metric="blocks", drop=4),
        Budget(metric="sublayers", drop=8),
        Budget(metric="sublayers", drop=99),
        Budget(metric="blocks", drop=1, protect=("block.0", "block.1", "block.2.mlp", "block.3.attention")),
    ],
)
@pytest.mark.parametrize("planner", ["lowest", "contiguous", "finercut"])
def test_what_is_infeasible_is_one_line(planner: str, budget: Budget) -> None:
    lab = Lab(anatomy().model, text(1, 4), anatomy=anatomy())
    with pytest.raises(InputError) as caught:
        PLANNERS.make(planner).plan(synthetic(anatomy()), budget, anatomy(), Bench(lab, SyntheticMeasure()))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert budget.metric in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("metric", METRICS)
def test_finercut_meets_each_unit_and_stops_there(metric: str) -> None:
    budget = Budget(metric=metric, keep=0.75, protect=("block.0", "block.2.attention"))  # type: ignore[arg-type]
    lab = Lab(anatomy().model, text(2, 6), anatomy=anatomy())
    steps: tuple[Step, ...] = PLANNERS.make("finercut").plan(None, budget, anatomy(), Bench(lab))
    got = [s.sites[0] for s in steps]
    assert met("llama", budget, got)
    assert not met("llama", budget, got[:-1])
    assert not {"block.0.attention", "block.0.mlp", "block.2.attention"} & set(got)


def test_finercut_takes_only_the_kinds_asked_for() -> None:
    lab = Lab(anatomy().model, text(2, 6), anatomy=anatomy())
    planner = PLANNERS.make("finercut", {"kinds": (Kind.ATTENTION,)})
    steps = planner.plan(None, Budget(metric="sublayers", drop=3), anatomy(), Bench(lab))
    assert all(s.sites[0].endswith(".attention") for s in steps)


def test_unknown_protected_site_is_refused_with_a_hint() -> None:
    with pytest.raises(InputError, match=r"block\.11.*no such site"):
        lowest(synthetic(anatomy()), Budget(metric="blocks", drop=1, protect=("block.11",)))


@pytest.mark.parametrize("name", sorted(rows()))
def test_every_recipe_row_can_be_put_together(name: str) -> None:
    """A row's measure scores what its planner ranks, and the options exist."""
    from lamina.core.registry import MEASURES

    entry = row(name)
    options = {**entry.planner_options, **({"kinds": entry.kinds} if entry.kinds else {})}
    planner = PLANNERS.make(entry.planner, options)
    measure = MEASURES.make(entry.measure, entry.measure_options) if entry.measure else None
    if measure is not None and entry.kinds:
        assert set(measure.card.on) & set(entry.kinds)
    torch.manual_seed(0)
    experts = planner.card.on == (Kind.EXPERT,)
    lab = Lab(tiny("mixtral" if experts else "llama"), text(4, 8))
    scores = measure.measure(lab) if measure else None
    metric = "bytes" if entry.planner == "layerwise-bits" else "parameters"
    steps = planner.plan(scores, Budget(metric=metric, keep=0.8), lab.anatomy, Bench(lab, measure))
    if any(s.rewrite not in ("drop", "refit") for s in steps):
        whole = asdict(lab.anatomy.total())[metric]
        told = all(metric in s.why for s in steps)
        left = [0 if told else asdict(rewrite_of(s).forecast(s, lab.anatomy))[metric] for s in steps]
        freed = [s.why[metric] if told else whole - n for s, n in zip(steps, left, strict=True)]
        assert sum(freed) >= 0.2 * whole * (1 - 0.02)
        return
    assert met(
        "llama", Budget(metric="parameters", keep=0.8), [s for x in steps if x.rewrite == "drop" for s in x.sites]
    )
