"""TraceNAS's search (arXiv 2602.02891): the proxy of candidates by adapters attached, and the best of all sets."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import PLANNERS
from lamina.lab import Bench, Lab
from lamina.lab.probes import noise_of
from lamina.papers.sensitivity.tracenas import Proxy
from lamina.planners._evolve import Space
from lamina.testing.models import text, tiny
from lamina.testing.planted import silence

MAPS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def planned(lab: Lab, budget: Budget, **options: Any) -> Any:
    return PLANNERS.make("tracenas", options).plan(None, budget, lab.anatomy, Bench(lab))


def sites(steps: Any) -> frozenset[str]:
    return frozenset(s for step in steps for s in step.sites)


def gradients(model: Any, ids: Tensor, gone: list[str], rank: int, literal: ModuleType) -> dict[str, Tensor]:
    """Of all B of a sublayer, flat, where y = Wx + BAx and B = 0; what is gone is masked."""
    with ExitStack() as held:
        held.enter_context(literal.masked(model, "llama", gone))
        ups: dict[str, list[nn.Parameter]] = {}
        for (n, layer), (part, names) in itertools.product(enumerate(model.model.layers), MAPS.items()):
            for name in names:
                map_: Any = getattr(layer.self_attn if part == "attention" else layer.mlp, name)
                noise = noise_of(f"block.{n}.{part}.{name}", "adapter", 0)
                down = (torch.rand(rank, map_.in_features, generator=noise) * 2 - 1) / map_.in_features**0.5
                up = nn.Parameter(torch.zeros(map_.out_features, rank))
                ups.setdefault(f"block.{n}.{part}", []).append(up)
                hook = lambda _, a, y, up=up, down=down: y + a[0] @ down.T @ up.T  # noqa: E731
                held.callback(map_.register_forward_hook(hook).remove)
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        return {s: torch.cat([u.grad.flatten() for u in mine]).double() for s, mine in ups.items()}


def literal_proxy(whole: dict[str, Tensor], thinned: dict[str, Tensor], gone: frozenset[str]) -> float:
    """Σ over what stays of z(g)·z(g_base)/n, z with the biased standard deviation, so that of equals it is 1."""
    total = 0.0
    for site in (s for s in whole if s not in gone):
        a, b = ((g - g.mean()) / g.std(correction=0) for g in (whole[site], thinned[site]))
        total += float(a @ b) / len(a)
    return total


def test_the_proxy_of_a_candidate_is_the_papers(literal: ModuleType) -> None:
    model, ids = tiny("llama"), text(3, 9)
    lab = Lab(model, ids)
    proxy = Proxy(lab, 5, None, None, 0)
    whole, draw = gradients(model, ids, [], 5, literal), Random(0)
    for count in (1, 2, 3, 5):
        gone = frozenset(draw.sample(sorted(whole), count))
        thinned = gradients(model, ids, sorted(gone), 5, literal)
        assert proxy.of(gone) == pytest.approx(literal_proxy(whole, thinned, gone), abs=1e-3)


def test_the_dense_model_has_correlations_of_one_whatever_the_loss_is_multiplied_by() -> None:
    model, ids = tiny("llama"), text(3, 9)
    once, twice = (Proxy(Lab(model, t), 4, None, None, 0) for t in (ids, ids.repeat(2, 1)))
    assert once.of(()) == pytest.approx(8, abs=1e-5)
    for gone in (["block.1"], ["block.0.mlp", "block.2.attention"]):
        assert once.of(gone) == pytest.approx(twice.of(gone), abs=1e-4)
        assert once.of(gone) < 8 - len(gone)


def test_the_best_of_all_sets_is_found() -> None:
    for name, seed in (("llama", 0), ("llama", 2), ("gpt_neox", 1)):
        lab = Lab(tiny(name, seed=seed), text(3, 8, seed=seed))
        proxy = Proxy(lab, 16, 4, 32, 0)
        every = itertools.combinations([s.id for s in lab.anatomy.sublayers], 3)
        table = {frozenset(c): proxy.of(c) for c in every}
        got = planned(lab, Budget(metric="sublayers", drop=3), generations=20)
        assert sites(got) == max(table, key=lambda g: table[g])
        assert got[0].why == {"proxy": max(table.values()), "whole": 8.0}


@pytest.mark.parametrize("seed", range(2))
def test_what_is_silent_goes_at_the_price_of_its_own_terms(seed: int) -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    quiet = frozenset({"block.1.attention", "block.1.mlp", "block.2.mlp"})
    silence(lab.anatomy, *quiet)
    got = planned(lab, Budget(metric="sublayers", drop=3), seed=seed, generations=20)
    assert sites(got) == quiet
    assert got[0].why["proxy"] == pytest.approx(5.0, abs=1e-6)


def test_no_more_candidates_are_run_than_the_options_promise() -> None:
    lab = Lab(tiny("llama", num_hidden_layers=6), text(3, 9))
    planned(lab, Budget(metric="sublayers", drop=5), population=4, generations=3, first=2)
    runs = lab.counts.backwards / (lab.depth * lab.tokens)
    assert runs == int(runs)
    assert 1 + 2 * 4 < runs <= 1 + 2 * 4 + 3 * 4
    assert lab.counts.blocks == lab.counts.backwards


def test_young_take_the_front_of_one_and_the_rear_of_another() -> None:
    space = Space(["a"] * 8, [1] * 8, met=lambda g: sum(g) >= 4, allowed=lambda _: True)
    draw, one, other = Random(0), (1, 1, 1, 1, 0, 0, 0, 0), (1, 1, 0, 0, 0, 0, 1, 1)
    assert space.crossed(one, other, 8, draw) == one
    assert space.crossed(one, other, 0, draw) == other
    child = space.crossed(one, other, 3, draw)
    assert child is not None
    assert sum(child) == 4
    assert not any(child[4:6])
    flips = [space.flipped(one, draw) for _ in range(50)]
    assert all(f is not None and sum(f) == 4 for f in flips)
    assert {sum(a != b for a, b in zip(f, one, strict=True)) for f in flips if f} == {0, 2}


def test_the_recipe_keeps_the_front(rows: SimpleNamespace) -> None:
    lab = Lab(tiny("llama", num_hidden_layers=5), text(3, 8))
    got = rows.plan("tracenas", lab, Budget(metric="sublayers", drop=3))
    assert len(sites(got)) == 3
    assert all(s.split(".")[1] in "234" for s in sites(got))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InputError, match="lie between 0 and 1"):
        PLANNERS.make("tracenas", {"mutation": 2.0})
    with pytest.raises(InputError, match="population and first are at least 1"):
        PLANNERS.make("tracenas", {"population": 0})
