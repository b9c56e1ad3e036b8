"""Widths by brute force: every legal count, the budget, and what is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import PLANNERS, REWRITES
from lamina.core.scores import Scores
from lamina.core.sites import Kind
from lamina.planners._target import Target
from lamina.planners._widths import Shape, best, even, sites_of, steps_of, taken
from lamina.testing.bench import fresh


@pytest.mark.parametrize(
    ("kind", "shape", "step"),
    [
        (Kind.NEURON, Shape(multiple=32), 16),  # 64 neurons: four of 16
        (Kind.NEURON, Shape(multiple=4, parallel=8), 8),
        (Kind.NEURON, Shape(multiple=7), 1),
        (Kind.HEAD, Shape(), 2),  # 4 heads in 2 groups: one of each
        (Kind.KV_GROUP, Shape(parallel=2), 2),
        (Kind.KV_GROUP, Shape(parallel=4), 1),
        (Kind.CHANNEL, Shape(multiple=4, parallel=16), 4),  # the stream is not split over devices
    ],
)
def test_widths_go_in_legal_steps(kind: Kind, shape: Shape, step: int) -> None:
    anatomy = fresh("llama")[1]
    site = anatomy.of_kind(kind)[0]
    assert shape.step(anatomy, site) == step
    counts = {shape.count(anatomy, site, n / 200) for n in range(201)}
    assert counts == set(range(step, site.width + 1, step))


def test_a_token_keeps_its_experts() -> None:
    anatomy = fresh("mixtral")[1]
    site = anatomy.of_kind(Kind.EXPERT)[0]
    assert Shape().count(anatomy, site, 0.0) == 2
    assert Shape(parallel=4).count(anatomy, site, 0.0) == 4


def test_of_each_kv_group_as_many_of_the_best_heads_stay() -> None:
    anatomy = fresh("llama")[1]
    site = anatomy.of_kind(Kind.HEAD)[0]
    assert best(anatomy, site, [9.0, 8.0, 1.0, 2.0], 2) == [0, 3]
    assert best(anatomy, site, [1.0, 1.0, 1.0, 1.0], 2) == [0, 2]


@settings(max_examples=15, deadline=None)
@given(
    keep=st.floats(0.5, 0.99),
    seed=st.integers(0, 9),
    kinds=st.sampled_from(
        [(Kind.NEURON,), (Kind.NEURON, Kind.CHANNEL), (Kind.CHANNEL, Kind.HEAD), (Kind.KV_GROUP, Kind.NEURON)]
    ),
)
def test_the_common_share_is_the_largest_that_the_budget_allows(
    keep: float, seed: int, kinds: tuple[Kind, ...]
) -> None:
    anatomy = fresh("llama")[1]
    target = Target(Budget(keep=keep), anatomy)
    shape, sites = Shape(multiple=8), sites_of(anatomy, kinds, target)
    groups = [[s for s in sites if s.kind is k] for k in kinds]
    whole = anatomy.total().parameters
    try:
        counts = even(anatomy, target, groups, shape)
    except InputError:
        least = {s.id: shape.count(anatomy, s, 0.0) for s in sites}
        assert whole - taken(anatomy, least, "parameters") < target.need
        return
    assert whole - taken(anatomy, counts, "parameters") >= target.need
    for group in groups:  # no kind can have one step more
        more = {s.id: counts[s.id] + shape.step(anatomy, s) for s in group}
        if all(n <= s.width for s, n in zip(group, more.values(), strict=True)):
            assert whole - taken(anatomy, {**counts, **more}, "parameters") < target.need
    draw = np.random.default_rng(seed)
    scores = {s.id: draw.random(s.width) for s in sites}
    for step in steps_of(anatomy, scores, counts):
        for site, gone in step.options["gone"].items():
            stay = [n for n in range(anatomy.site(site).width) if n not in gone]
            assert len(stay) == counts[site]
            if not site.endswith(".head"):
                assert min(scores[site][stay]) >= max(scores[site][gone])


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gpt_neox"])
def test_what_is_taken_is_what_the_narrowed_model_takes(name: str) -> None:
    from lamina.testing.bench import lab

    bench = lab(name)
    anatomy = bench.anatomy
    target = Target(Budget(keep=0.8), anatomy)
    sites = sites_of(anatomy, (Kind.NEURON, Kind.CHANNEL, Kind.KV_GROUP, Kind.EXPERT), target)
    counts = even(anatomy, target, [sites], Shape(multiple=8))
    want = {m: taken(anatomy, counts, m) for m in ("parameters", "bytes", "macs", "kv_bytes")}
    for step in steps_of(anatomy, {s.id: np.arange(s.width, dtype=float) for s in sites}, counts):
        REWRITES.make("narrow").apply(step, bench)
    assert want == {m: getattr(bench.anatomy.total(), m) for m in want}
    assert bench.anatomy.total().parameters <= 0.8 * fresh(name)[1].total().parameters


def test_what_is_protected_keeps_its_width_and_the_stream_with_it() -> None:
    anatomy = fresh("llama")[1]
    target = Target(Budget(keep=0.9, protect=("block.0", "block.2.mlp")), anatomy)
    found = {s.id for s in sites_of(anatomy, (Kind.NEURON, Kind.KV_GROUP, Kind.CHANNEL), target)}
    assert found == {
        "block.1.mlp.neuron", "block.3.mlp.neuron",
        "block.1.attention.kv_group", "block.2.attention.kv_group", "block.3.attention.kv_group",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["minitron", "reap"])
@pytest.mark.parametrize("budget", [Budget(metric="blocks", drop=1), Budget(metric="sublayers", keep=0.5)])
def test_budgets_of_blocks_are_refused(name: str, budget: Budget) -> None:
    anatomy = fresh("mixtral")[1]
    scores: Any = Scores(measure="none", values={})
    with pytest.raises(InputError, match="takes no budget of"):
        PLANNERS.make(name).plan(scores, budget, anatomy)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("recipe", "name", "form"),
    [
        ("minitron", "llama", "plain checkpoint"),
        ("slicegpt", "llama", "plain checkpoint"),
        ("reap", "mixtral", "plain checkpoint"),
        ("mc-smoe", "mixtral", "trust_remote_code"),
        ("hesso", "llama", "checkpoint"),
        ("struct-prune", "gpt2", "checkpoint"),
    ],
)
def test_recipes_run_from_the_model_to_the_proof(
    recipe: str, name: str, form: str, lamina: Any, bench: Path, tmp_path: Path
) -> None:
    from tiny_run import make_model, thin_command

    make_model(bench / name, name)
    out = tmp_path / "run"
    code, said, error = lamina(*thin_command(bench, out, "--recipe", recipe, "--keep", "0.85", model=name))
    assert code == 0, error
    assert form in said
    assert (out / "model" / "config.json").is_file()
