"""ECoFLaP's zeroth-order importance (arXiv 2310.02998): moved copies of the model, and true gradients."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.lab.probes import noise_of
from lamina.testing.measures import check_errors_are_over_sequences
from lamina.testing.models import padded, text, tiny


def measured(lab: Lab, **options: Any) -> Scores:
    return MEASURES.make("zeroth-order", options).measure(lab)


def direction(site: str, number: int, shape: torch.Size, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=noise_of(f"{site} {number}", "direction", seed))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_is_the_papers_formula(name: str, literal: ModuleType) -> None:
    """Copies of the model with one matrix moved, whole forwards, sequence by sequence."""
    model = tiny(name)
    rows = [text(1, n, seed=n)[0] for n in (9, 5)]
    lab = Lab(model, padded(rows, 2))
    got = measured(lab, noises=2, epsilon=0.02)
    paths = {s.id: s.path for s in lab.anatomy.linears()}
    assert list(got.values) == list(paths)
    for site, path in list(paths.items())[::5]:
        slopes = []
        for number in (0, 1):
            for row in rows:
                losses = []
                for sign in (1, -1):
                    other = copy.deepcopy(model)
                    weight: Any = other.get_submodule(path).weight
                    weight.data += sign * 0.02 * direction(site, number, weight.shape)
                    losses.append(literal.loss(other, row.unsqueeze(0)))
                slopes.append(abs(losses[0] - losses[1]) / 0.04)
        assert got[site] == pytest.approx(np.mean(slopes), rel=2e-3, abs=1e-4), site


def test_small_steps_give_the_gradient_along_the_direction() -> None:
    model, ids = tiny("llama").double(), text(1, 9)
    lab = Lab(model, ids)
    got = measured(lab, epsilon=1e-3)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for site in lab.anatomy.linears():
        weight: Any = model.get_submodule(site.path).weight
        slope = float((weight.grad * direction(site.id, 0, weight.shape)).sum().abs())
        assert got[site.id] == pytest.approx(slope, rel=2e-2, abs=1e-3), site.id  # the logits' type is float32


def test_blocks_before_are_not_run_again() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    measured(lab)
    assert lab.counts.blocks == lab.tokens * (4 + 2 * 7 * (4 + 3 + 2 + 1))


def test_groups_are_sums_over_a_block() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    got = measured(lab)
    grid = got.grids["groups"]
    for n in range(4):
        mine = [s for s in got.values if s.startswith(f"block.{n}.")]
        size = sum(lab.anatomy.weight(s).numel() for s in mine)
        assert grid.values[n] == pytest.approx([sum(got[s] for s in mine), sum(got[s] for s in mine) / size])


def test_weights_are_restored_bit_for_bit_also_after_an_error() -> None:
    model = tiny("llama").bfloat16()
    before = {n: (p.data_ptr(), p.clone()) for n, p in model.named_parameters()}
    lab, calls = Lab(model, text(3, 9)), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("stop")

    handle = model.get_submodule("lm_head").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        measured(lab)
    handle.remove()
    for n, p in model.named_parameters():
        assert p.data_ptr() == before[n][0]
        assert torch.equal(p, before[n][1])


def test_errors_are_over_sequences_where_all_are_run() -> None:
    check_errors_are_over_sequences(MEASURES.make("zeroth-order", {"sequences": None}))


def test_seeds_give_other_directions() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    assert measured(lab, seed=1).values != measured(lab, seed=2).values


@pytest.mark.parametrize("options", [{"noises": 0}, {"sequences": 0}, {"length": 0}, {"epsilon": 0.0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))} is (at least 1|above 0)"):
        MEASURES.make("zeroth-order", options)
