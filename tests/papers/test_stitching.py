"""Direct matching (arXiv 2412.11299): the affine map of least squares from a block's input to its output."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.lab.sample import Sampled
from lamina.testing.models import text, tiny


def states(literal: ModuleType, name: str, model: torch.nn.Module, ids: Tensor) -> list[Tensor]:
    """At all depths [sequences, tokens behind the first, width]."""
    pairs = literal.pairs(model, name, ids)
    return [s[:, 1:] for s in (pairs["block.0"][0], *(pairs[f"block.{i}"][1] for i in range(4)))]


def pseudo_inverse(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[M; b] = pinv([X 1]) Y, as the code has it."""
    found = torch.linalg.pinv(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)) @ y
    return found[:-1], found[-1]


def matching_loss(x: Tensor, y: Tensor) -> float:
    """‖X M + b - Y‖² / ‖Y‖² of the pseudo-inverse on the rows of the fit; Y is not centred."""
    weight, bias = pseudo_inverse(x, y)
    return float((x @ weight + bias - y).norm() ** 2 / y.norm() ** 2)


def held_out_loss(x: Tensor, y: Tensor) -> float:
    """The same on each sequence, mapped as the others say: x and y [sequences, tokens, width]."""
    errors = []
    for s in range(len(x)):
        rest = [i for i in range(len(x)) if i != s]
        weight, bias = pseudo_inverse(x[rest].flatten(0, 1), y[rest].flatten(0, 1))
        errors.append(float((x[s] @ weight + bias - y[s]).norm() ** 2))
    return sum(errors) / float(y.norm() ** 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_many_rows_and_no_ridge_it_is_the_pseudo_inverse(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(8, 13)
    depths = states(literal, name, model, ids)
    options = {"sequences": 8, "each": 13, "ridge": 1e-10}
    got = MEASURES.make("direct-matching", options).measure(Lab(model, ids))
    for n in range(4):
        x, y = depths[n], depths[n + 1]
        assert got[f"block.{n}"] == pytest.approx(held_out_loss(x, y), rel=1e-3)
        fitted = matching_loss(x.flatten(0, 1), y.flatten(0, 1))
        assert got.grids["matching"].values[n].tolist() == pytest.approx([got[f"block.{n}"], fitted], rel=1e-3)


def test_maps_of_depths_are_the_indices_of_pairs(literal: ModuleType) -> None:
    from lamina.maths.similarity import cca, cka, procrustes

    model, ids = tiny("gpt_neox"), text(5, 7)
    depths = [s.flatten(0, 1) for s in states(literal, "gpt_neox", model, ids)]
    options = {"sequences": 5, "each": 7, "components": 4, "debiased": False}
    got = MEASURES.make("direct-matching", options).measure(Lab(model, ids)).grids
    for i in range(5):
        for j in range(5):
            x, y = depths[i], depths[j]
            assert got["cka"].values[i, j] == pytest.approx(cka(x, y), abs=1e-5)
            assert got["cca"].values[i, j] == pytest.approx(float((cca(x, y, 4) ** 2).mean()), abs=1e-3)
            assert got["procrustes"].values[i, j] == pytest.approx(procrustes(x, y, 4), abs=1e-3)
    assert got["cka"].rows == got["cka"].columns == ("input", "block.0", "block.1", "block.2", "block.3")


def made(*depths: Tensor) -> Sampled:
    count = len(depths[0])
    blocks = tuple(f"block.{i}" for i in range(len(depths) - 1))
    return Sampled(blocks, torch.stack(depths), np.arange(count) // 4, np.arange(count) % 4, None, None)


def test_a_linear_block_is_redundant_and_a_noisy_one_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, noise = (torch.randn(s, generator=generator) for s in ((80, 6), (6, 6), (80, 6)))
    found = MEASURES.make("direct-matching", {"ridge": 1e-8})._found(made(x, x @ weight + 2, noise))
    assert found.values[0] < 1e-8
    assert found.values[1] > 0.9


def test_errors_are_those_of_a_ratio_over_sequences_with_the_maps_known() -> None:
    draws = [torch.randn(48, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    sample = made(draws[0], draws[0] + draws[1])
    found = MEASURES.make("direct-matching", {"ridge": 1e-9})._found(sample)
    rows = [slice(4 * s, 4 * s + 4) for s in range(12)]
    lost, size = [], []
    for mine in rows:
        rest = torch.tensor([i not in range(48)[mine] for i in range(48)])
        x, y = draws[0].double(), (draws[0] + draws[1]).double()
        weight, bias = pseudo_inverse(x[rest], y[rest])
        lost.append(float((x[mine] @ weight + bias - y[mine]).norm() ** 2))
        size.append(float(y[mine].norm() ** 2))
    ratio = sum(lost) / sum(size)
    spread = sum((a - ratio * b) ** 2 for a, b in zip(lost, size, strict=True))
    assert found.stderr == pytest.approx([(spread * 12 / 11) ** 0.5 / sum(size)], rel=1e-4)


def test_an_identity_block_has_loss_zero_however_few_the_rows(literal: ModuleType) -> None:
    model = literal.zeroed(tiny("llama"), "llama", ["block.1"])
    got = MEASURES.make("direct-matching").measure(Lab(model, text(3, 5)))
    assert got["block.1"] == 0.0
    for name, same in (("cka", 1), ("cca", 1), ("procrustes", 0)):
        assert got.grids[name].values[1, 2] == pytest.approx(same, abs=1e-9)


@pytest.mark.parametrize("options", [{"ridge": 0.0}, {"components": 0}], ids=["ridge", "components"])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make("direct-matching", options)
