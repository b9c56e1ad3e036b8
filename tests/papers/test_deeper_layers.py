"""Deeper Layers' angular distance (arXiv 2403.17887) against its formula: last tokens, all runs of blocks."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lamina.core.documents import Budget
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.testing.models import NanoGPT, lively, padded, text, tiny
from lamina.testing.planted import identity_block

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gemma2", "mixtral")
ANGLE = 1e-6
"""What float32 blocks leave of an angle's accuracy."""


def angular(model: nn.Module, ids: torch.Tensor) -> Scores:
    return MEASURES.make("angular").measure(Lab(model, ids, batch_size=2))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_distances_are_the_papers_formula(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 10)
    wanted = literal.angles(model, name, ids)
    got = angular(model, ids)
    assert list(got.spans) == [f"block.{n}" for n in range(4)]
    for first, row in enumerate(wanted):
        spans = got.spans[f"block.{first}"]
        assert len(spans) == len(row) - 1 == 4 - first
        assert list(spans) == pytest.approx(row[1:], abs=ANGLE)
        assert got[f"block.{first}"] == spans[0]


def test_distances_use_the_hidden_states_of_transformers() -> None:
    """For runs that end before the final norm."""
    model, ids = tiny("llama"), text(3, 10)
    with torch.no_grad():
        states = [h[:, -1].double() for h in model(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]]
    got = angular(model, ids)
    for first in range(3):
        for end in range(first + 1, 4):
            cosine = nn.functional.cosine_similarity(states[first], states[end], dim=-1)
            wanted = float((cosine.clamp(-1, 1).arccos() / torch.pi).mean())
            assert got.spans[f"block.{first}"][end - first - 1] == pytest.approx(wanted, abs=ANGLE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_last_token_is_the_last_that_is_no_padding(side: str, literal: ModuleType) -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 11, 7)]
    alone = [literal.angles(model, "llama", r.unsqueeze(0)) for r in rows]
    got = angular(model, padded(rows, 3, side=side))  # type: ignore[arg-type]
    for first in range(4):
        wanted = [sum(a[first][n] for a in alone) / 3 for n in range(1, 5 - first)]
        assert list(got.spans[f"block.{first}"]) == pytest.approx(wanted, abs=5e-6)


def test_no_distance_over_identity_blocks(literal: ModuleType) -> None:
    """d(l, 0) = 0: over a block that passes the stream on, and in the written-out table."""
    model = tiny("llama")
    identity_block(model, 2)
    ids = text(3, 10)
    assert all(row[0] < 1e-7 for row in literal.angles(model, "llama", ids))
    got = angular(model, ids)
    assert got["block.2"] < 1e-7
    assert got.spans["block.1"][1] == pytest.approx(got.spans["block.1"][0], abs=1e-9)


def linear_nano(*factors: float) -> nn.Module:
    """A network whose block n multiplies the stream by 1 + factors[n]."""
    model = lively(NanoGPT(depth=len(factors))).eval()
    with torch.no_grad():
        for block, factor in zip(model.blocks, factors, strict=True):
            block.mixes.out.weight.zero_()
            block.mixes.out.bias.zero_()
            block.between = nn.Identity()
            block.feeds = nn.Linear(32, 32, bias=False)
            block.feeds.weight.copy_(factor * torch.eye(32))
    return model


def test_antipodal_streams_are_at_distance_one() -> None:
    """A sign change is distance 1, two are 0, a positive factor is 0."""
    got = angular(linear_nano(-2.0, 0.5, -3.0), text(3, 10))
    assert list(got.spans["block.0"]) == pytest.approx([1, 1, 0], abs=1e-7)
    assert list(got.spans["block.1"]) == pytest.approx([0, 1], abs=1e-7)
    assert list(got.spans["block.2"]) == pytest.approx([1], abs=1e-7)


@settings(max_examples=15)
@given(seed=st.integers(0, 999), name=st.sampled_from(["llama", "gpt2", "gpt_neox"]))
def test_triangle_inequality(seed: int, name: str) -> None:
    spans = angular(tiny(name, seed=seed), text(2, 6, seed=seed)).spans
    for first in range(4):
        for middle in range(first + 1, 4):
            for end in range(middle + 1, 5):
                whole = spans[f"block.{first}"][end - first - 1]
                assert 0 <= whole <= 1
                assert (
                    whole
                    <= spans[f"block.{first}"][middle - first - 1] + spans[f"block.{middle}"][end - middle - 1] + 1e-9
                )


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_run_of_least_distance_goes(name: str, count: int, literal: ModuleType, rows: SimpleNamespace) -> None:
    """l* = argmin d(l, n), with column n and not the next one, as the paper's eq. 6 has it."""
    chosen, shifted = [], []
    for seed in range(4):
        model, ids = tiny(name, seed=seed), text(3, 8)
        table = literal.angles(model, name, ids)
        first = min(range(5 - count), key=lambda i: table[i][count])
        wrong = min(range(4 - count), key=lambda i: table[i][count + 1]) if count < 4 else first
        (step,) = rows.plan("angular", Lab(model, ids), Budget(metric="blocks", drop=count))
        assert step.sites == tuple(f"block.{n}" for n in range(first, first + count))
        assert step.why["angular"] == pytest.approx(table[first][count], abs=ANGLE)
        chosen.append(first)
        shifted.append(wrong)
    assert chosen != shifted, "no model here tells the right column from the next one"
