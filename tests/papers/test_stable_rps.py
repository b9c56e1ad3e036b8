"""STABLE-RPS (arXiv 2310.11611): scales and the shared array, number by number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lamina.core.documents import Step
from lamina.core.registry import REWRITES
from lamina.lab import Lab
from lamina.papers.depth.stable_rps import StableRps, scales
from lamina.rewrites.lamina_parts import Scaled
from lamina.testing.models import text, tiny

STEP = Step(rewrite="stable-rps", sites=("block.1", "block.2", "block.3"))


def literal(maps: list[list[list[float]]]) -> tuple[list[float], list[list[float]]]:
    """λ of each map, and ψ: slot by slot, Σ λ w / Σ λ² over the weights that fall into it."""
    sizes = []
    for rows in maps:
        flat = [w for row in rows for w in row]
        sizes.append(math.sqrt(math.fsum(w * w for w in flat) / len(flat)))
    outputs, inputs = len(maps[0]), len(maps[0][0])
    array = [[0.0] * inputs for _ in range(outputs)]
    for o in range(outputs):
        for i in range(inputs):
            array[o][i] = math.fsum(s * m[o][i] for s, m in zip(sizes, maps, strict=True))
            array[o][i] /= math.fsum(s * s for s in sizes)
    return sizes, array


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_maps_are_one_array_times_their_scales(name: str) -> None:
    dense, lab = Lab(tiny(name), text(2, 9)), Lab(tiny(name), text(2, 9))
    REWRITES.make("stable-rps").apply(STEP, lab)
    for site in dense.anatomy.linears("block.1"):
        paths = [dense.anatomy.site(site.id.replace("block.1", s, 1)).path for s in STEP.sites]
        weights = [dense.anatomy.weight(site.id.replace("block.1", s, 1)).detach().tolist() for s in STEP.sites]
        sizes, array = literal(weights)
        made: list[Any] = [lab.model.get_submodule(p) for p in paths]
        assert len({m.base.weight.data_ptr() for m in made}) == 1
        assert made[0].base.weight.tolist() == [pytest.approx(row, rel=1e-5, abs=1e-7) for row in array]
        for module, size in zip(made, sizes, strict=True):
            assert float(module.gain.detach()) == pytest.approx(size, rel=1e-5)


def test_depths_that_differ_by_a_factor_are_kept_as_they_are() -> None:
    ids = text(3, 9)
    dense, lab = tiny("llama"), Lab(tiny("llama"), ids)
    with torch.no_grad():
        for model in (dense, lab.model):
            layers: Any = model.model.layers
            for factor, n in ((0.5, 2), (3.0, 3)):
                for name, module in layers[n].named_modules():
                    if isinstance(module, nn.Linear):
                        module.weight.copy_(factor * layers[1].get_submodule(name).weight)
        REWRITES.make("stable-rps").apply(STEP, lab)
        torch.testing.assert_close(lab.model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_each_depth_costs_one_number_for_a_map() -> None:
    lab = Lab(tiny("llama"), text(2, 9))
    maps = [lab.anatomy.weight(s).numel() for s in lab.anatomy.linears("block.1")]
    receipt = REWRITES.make("stable-rps").apply(STEP, lab)
    assert receipt.before.parameters - receipt.after.parameters == 2 * sum(maps) - 3 * len(maps)
    assert receipt.after.macs == receipt.before.macs


def test_the_arrays_gradient_is_the_sum_of_scaled_ones() -> None:
    """∂L/∂ψ_j = Σ λ ∂L/∂W over the weights that come from ψ_j."""
    torch.manual_seed(0)
    first, second, x = Scaled(6, 5), Scaled(6, 5), torch.randn(4, 6)
    second.base.weight = first.base.weight
    with torch.no_grad():
        first.gain.fill_(0.7)
        second.gain.fill_(-1.9)
    (first(x).square().sum() + second(x).sin().sum()).backward()
    maps = [(m.gain * m.base.weight).detach().requires_grad_() for m in (first, second)]
    ((x @ maps[0].T).square().sum() + (x @ maps[1].T).sin().sum()).backward()
    assert maps[0].grad is not None
    assert maps[1].grad is not None
    torch.testing.assert_close(first.base.weight.grad, 0.7 * maps[0].grad - 1.9 * maps[1].grad)


@given(st.integers(2, 5), st.integers(0, 10_000))
def test_no_other_array_is_nearer(count: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    maps = [torch.randn(3, 4, generator=draw) * (n + 1) for n in range(count)]
    array, sizes = StableRps().common(maps), scales(maps)

    def off(psi: torch.Tensor) -> float:
        return sum(float((w.double() - s * psi).square().sum()) for w, s in zip(maps, sizes, strict=True))

    for _ in range(5):
        assert off(array) <= off(array + 0.01 * torch.randn(3, 4, generator=draw).double())


def test_maps_of_zeros_stay_zero() -> None:
    maps = [torch.zeros(3, 4), torch.zeros(3, 4)]
    assert torch.equal(StableRps().common(maps), torch.zeros(3, 4).double())
    assert scales(maps) == [0.0, 0.0]
