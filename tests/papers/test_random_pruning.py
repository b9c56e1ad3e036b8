"""Random pruning (arXiv 2202.02643): exact counts, seeds, and the planners er and erk on linear maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError
from lamina.core.registry import PLANNERS, REWRITES
from lamina.lab import Lab
from lamina.testing.models import text, tiny


def masks(name: str = "llama", share: float = 0.5, lab_seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """Which weights of all maps are zero."""
    lab = Lab(tiny(name), text(2, 6), seed=lab_seed)
    sites = tuple(s.id for s in lab.anatomy.linears())
    REWRITES.make("random", options).apply(Step(rewrite="random", sites=sites, options={"sparsity": share}), lab)
    assert lab.passes == 0
    return {s: lab.anatomy.weight(s) == 0 for s in sites}


@pytest.mark.parametrize("share", [0.1, 0.37, 0.9])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exactly_the_share_goes(name: str, share: float) -> None:
    for mask in masks(name, share).values():
        assert int(mask.sum()) == int(mask.numel() * share)


def test_the_draw_depends_on_the_seed_and_the_map_alone() -> None:
    first, again, other = masks(seed=3), masks(seed=3, lab_seed=9), masks(seed=4)
    assert all(torch.equal(first[s], again[s]) for s in first)
    assert all(not torch.equal(first[s], other[s]) for s in first)
    alike = [first[s] for s in first if first[s].shape == (64, 32)]
    assert len(alike) >= 8
    assert all(not torch.equal(a, b) for n, a in enumerate(alike) for b in alike[:n])
    labs = masks(lab_seed=3)
    assert all(torch.equal(first[s], labs[s]) for s in first)


def test_any_weight_may_go() -> None:
    """Zeros are spread evenly: over outputs, over inputs, and over large and small weights."""
    mask = torch.stack([masks(share=0.25, seed=n)["block.1.mlp.gate_proj"].double() for n in range(40)]).mean(0)
    assert float(mask.mean()) == 0.25
    assert float((mask.mean(0) - 0.25).abs().max()) < 0.05
    assert float((mask.mean(1) - 0.25).abs().max()) < 0.06
    weight = tiny("llama").get_submodule("model.layers.1.mlp.gate_proj").weight.abs()  # type: ignore[union-attr]
    assert isinstance(weight, torch.Tensor)
    assert float(mask[weight > weight.median()].mean()) == pytest.approx(0.25, abs=0.01)


def planned(name: str, lab: Lab, keep: float, protect: tuple[str, ...] = (), **options: Any) -> tuple[Step, ...]:
    budget = Budget(metric="parameters", keep=keep, protect=protect)
    return PLANNERS.make(name, options).plan(None, budget, lab.anatomy)


@pytest.mark.parametrize("planner", ["er", "erk"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "nanogpt"])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_densities_go_with_the_sums_of_dimensions(planner: str, name: str, keep: float) -> None:
    lab = Lab(tiny(name), text(2, 6))
    (step,) = planned(planner, lab, keep)
    found = step.options["sparsity"]
    shapes = {s.id: lab.anatomy.weight(s).shape for s in lab.anatomy.linears()}
    assert list(found) == [s for s in shapes if s in found]
    zeros = sum(found.get(s, 0.0) * a * b for s, (a, b) in shapes.items())
    assert zeros / sum(a * b for a, b in shapes.values()) == pytest.approx(1 - keep, abs=1e-9)
    ratios = [(1 - found[s]) / ((a + b) / (a * b)) for s, (a, b) in shapes.items() if s in found]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-9)
    dense = [(a + b) / (a * b) * ratios[0] for s, (a, b) in shapes.items() if s not in found]
    assert all(d > 1 - 1e-9 for d in dense)
    assert REWRITES.make("wanda").check(step, lab.anatomy) == []
    assert lab.passes == 0


def test_power_zero_is_uniform_and_two_tells_maps_further_apart() -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    spans = []
    for power in (0.0, 1.0, 2.0):
        values = planned("erk", lab, 0.2, power=power, rewrite="random")[0].options["sparsity"].values()
        spans.append(max(values) - min(values))
    assert spans[0] == pytest.approx(0, abs=1e-12)
    assert spans[2] > 1.5 * spans[1] > 0
    assert planned("erk", lab, 0.2) == planned("er", lab, 0.2)


def test_what_is_protected_stays_dense_and_counts() -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    (step,) = planned("er", lab, 0.5, ("block.1", "block.0.attention"), rewrite="magnitude")
    found = step.options["sparsity"]
    sizes = {s.id: lab.anatomy.weight(s).numel() for s in lab.anatomy.linears()}
    assert step.rewrite == "magnitude"
    assert not [s for s in found if s.startswith(("block.1.", "block.0.attention."))]
    assert sum(found[s] * sizes[s] for s in found) / sum(sizes.values()) == pytest.approx(0.5, abs=1e-9)


def test_the_plan_is_what_is_pruned() -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    (step,) = planned("er", lab, 0.5, rewrite="random")
    receipt = REWRITES.make("random").apply(step, lab)
    sizes = {s.id: lab.anatomy.weight(s).numel() for s in lab.anatomy.linears()}
    for site, share in receipt.options["zeros"].items():
        assert share == int(sizes[site] * step.options["sparsity"][site]) / sizes[site]


@pytest.mark.parametrize("planner", ["er", "erk"])
def test_the_same_again_and_through_a_file(planner: str) -> None:
    lab = Lab(tiny("gpt2"), text(2, 6))
    first = planned(planner, lab, 0.3)
    assert first == planned(planner, Lab(tiny("gpt2"), text(2, 6)), 0.3)
    assert [Step.from_data(s.to_data()) for s in first] == list(first)
    assert planned(planner, lab, 1.0) == ()


@pytest.mark.parametrize("planner", ["er", "erk"])
@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(metric="bytes", keep=0.5), "zeros free no bytes"),
        (Budget(metric="sublayers", drop=1), "zeros free no sublayers"),
        (Budget(metric="parameters", keep=0.2, protect=("block.0", "block.1")), "so much that stays whole"),
    ],
)
def test_budgets_that_zeros_can_not_meet(planner: str, budget: Budget, words: str) -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    with pytest.raises(InputError, match=words):
        PLANNERS.make(planner).plan(None, budget, lab.anatomy)
    with pytest.raises(InputError, match="takes no sparsity"):
        planned(planner, lab, 0.5, rewrite="svd")
