"""GPTQ (arXiv 2210.17323) against OBQ in a fixed order, written out: an inverse for every input."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from torch import Tensor

from lamina.anatomy.linears import matrix
from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.registry import REWRITES
from lamina.lab import Lab
from lamina.maths.grids import BLOCK, SIMPLE, Grid, compensated
from lamina.testing.models import text, tiny

GRIDS = {grid.name: grid for grid in SIMPLE}
NAMES = sorted(GRIDS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(inputs: int, tokens: int, seed: int) -> Tensor:
    """X [inputs, tokens] whose channels differ in size and hang together."""
    mixing = drawn(inputs, inputs, seed=seed) / inputs**0.5 + torch.eye(inputs, dtype=torch.float64)
    return mixing @ (drawn(inputs, tokens, seed=seed + 1) * drawn(inputs, 1, seed=seed + 2).exp())


def literal(weight: Tensor, moment: Tensor, grid: Grid, damping: float = 0.01) -> Tensor:
    """Each row by itself; after each input, the best change of all that remain, from the inverse of what remains."""
    inputs = weight.shape[1]
    hessian = 2 * moment + damping * (2 * moment).diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    out = torch.zeros_like(weight)
    for row in range(len(weight)):
        w = weight[row].clone()
        for j in range(inputs):
            if j % BLOCK == 0:
                scales = grid.scales(w[j : j + BLOCK].unsqueeze(0))
            out[row, j] = grid.nearest(w[j].reshape(1, 1), scales).item()
            inverse = torch.linalg.inv(hessian[j:, j:])
            w[j:] -= (w[j] - out[row, j]) / inverse[0, 0] * inverse[0]
    return out


@pytest.mark.parametrize("name", NAMES)
def test_it_is_obq_in_a_fixed_order(name: str) -> None:
    weight, x = drawn(3, 64) * 0.1, correlated(64, 200, seed=5)
    moment = x @ x.T
    got = compensated(weight, moment, GRIDS[name], torch.float32)
    wanted = literal(weight, moment, GRIDS[name])
    assert torch.allclose(got, wanted, rtol=0, atol=1e-12)
    assert not torch.equal(got, GRIDS[name].rounded(weight).double())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_inputs_that_do_not_hang_together_round_to_nearest(name: str, size: float) -> None:
    weight = drawn(7, 96)
    moment = size * torch.eye(96, dtype=torch.float64)
    assert torch.equal(compensated(weight, moment, GRIDS[name], torch.float32), GRIDS[name].rounded(weight).double())
    nothing = torch.zeros_like(moment)
    assert torch.equal(compensated(weight, nothing, GRIDS[name], torch.float32), GRIDS[name].rounded(weight).double())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_closer_than_rounded_to_nearest(name: str) -> None:
    better, ratios = 0, []
    for seed in range(20):
        weight, x = drawn(16, 96, seed=100 + seed), correlated(96, 60 + 20 * seed, seed=300 + seed)
        errors = [
            float(((weight - made) @ x).norm())
            for made in (compensated(weight, x @ x.T, GRIDS[name], torch.float32), GRIDS[name].rounded(weight).double())
        ]
        better += errors[0] < errors[1]
        ratios.append(errors[0] / errors[1])
    assert better >= 19
    assert sum(ratios) / len(ratios) < 0.75


def test_the_size_of_the_moment_does_not_matter() -> None:
    weight, x = drawn(5, 64), correlated(64, 90, seed=2)
    one, other = (compensated(weight, s * x @ x.T, GRIDS["Q4_0"], torch.float32) for s in (1.0, 2.0**-20))
    assert torch.equal(one, other)


def test_planted_truth() -> None:
    """Of two equal inputs the second takes the first one's error back, so their sum is on a finer grid than either."""
    weight = 0.3 + 0.1 * drawn(200, 32, seed=3).tanh()
    x = torch.zeros(32, 32, dtype=torch.float64)
    x[0, 0] = x[1, 0] = 1.0
    x[2:, 2:] = 1e-3 * torch.eye(30)
    pair = weight[:, :2].sum(1)
    grid = GRIDS["Q4_0"]
    made = compensated(weight, x @ x.T, grid, torch.float32, damping=1e-6)[:, :2].sum(1)
    nearest = grid.rounded(weight).double()[:, :2].sum(1)
    step = grid.scales(weight).step.abs().double().squeeze(1)
    inside = weight[:, :2].amax(1) < 7.4 * step
    assert int(inside.sum()) > 80
    assert float(((made - pair).abs() / step)[inside].max()) <= 0.501
    assert float(((nearest - pair).abs() / step)[inside].max()) > 0.6


@torch.no_grad()
def caught(lab: Lab, path: str, ids: Tensor) -> Tensor:
    """What enters a map [tokens, inputs], float64."""
    seen: list[Tensor] = []
    handle = lab.model.get_submodule(path).register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten(0, -2)))
    lab.model(ids, use_cache=False)
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_maps_are_rounded_for_the_inputs_that_the_text_gives_them(name: str) -> None:
    ids = text(6, 30)
    lab = Lab(tiny(name), ids, batch_size=2)
    sites = lab.anatomy.linears("block.1")
    before = {s.id: lab.anatomy.weight(s).detach().double() for s in sites}
    inputs = {s.id: caught(lab, s.path, ids) for s in sites}
    step = Step(rewrite="gptq", sites=tuple(before), options={"type": "Q4_0"})
    receipt = REWRITES.make("gptq").apply(step, lab)
    assert receipt.rewrite == "gptq"
    for site in sites:
        made = matrix(lab.model.get_submodule(site.path)).detach()
        written = GRIDS["Q4_0"].written(made)
        assert written is not None
        assert torch.equal(torch.from_numpy(dequantize(written.numpy(), GGMLQuantizationType.Q4_0)), made), site.id
        x, weight = inputs[site.id], before[site.id]
        wanted = literal(weight[:3], x.T @ x, GRIDS["Q4_0"])
        assert float((made[:3] == wanted.float()).double().mean()) > 0.97
        nearest = GRIDS["Q4_0"].rounded(weight).double()
        assert ((made - weight) @ x.T).norm() < 0.9 * ((nearest - weight) @ x.T).norm()


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_sixteen_bits(kind: str) -> None:
    lab = Lab(tiny("llama").bfloat16(), text(4, 20))
    site = lab.anatomy.linears("block.2.mlp")[0].id
    REWRITES.make("gptq").apply(Step(rewrite="gptq", sites=(site,), options={"type": kind}), lab)
    held = lab.anatomy.weight(site).detach()
    assert held.dtype == torch.bfloat16
    assert GRIDS[kind].holds(held)


@pytest.mark.parametrize("damping", [0.0, -1.0, 2.0])
def test_bad_damping_is_refused(damping: float) -> None:
    with pytest.raises(InputError, match="damping must lie in"):
        REWRITES.make("gptq", {"damping": damping})
