"""ShortGPT's block influence (arXiv 2403.03853) against its formula on transformers' own hidden states."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from lamina.core.documents import Budget
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import text, tiny

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gemma2", "mixtral")
FLOAT32 = 3e-7


def influence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """1 - cos per token, float64."""
    return 1 - torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1, eps=0.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_influence_is_the_papers_formula(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 10)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    got = MEASURES.make("block-influence").measure(Lab(model, ids, batch_size=2))
    depth = len(states) - 1
    assert list(got.values) == [f"block.{n}" for n in range(depth)]
    for n in range(depth - 1):
        assert got[f"block.{n}"] == pytest.approx(float(influence(states[n], states[n + 1]).mean()), abs=FLOAT32)
    x, y = literal.pairs(model, name, ids)[f"block.{depth - 1}"]
    assert got[f"block.{depth - 1}"] == pytest.approx(float(influence(x, y).mean()), abs=FLOAT32)


def test_last_block_is_taken_before_the_final_norm() -> None:
    """hidden_states[-1] of transformers is behind the final norm, whose weights would distort the angle."""
    model, ids = tiny("llama"), text(3, 10)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    got = MEASURES.make("block-influence").measure(Lab(model, ids))
    assert abs(got["block.3"] - float(influence(states[3], states[4]).mean())) > 1e-4


def test_same_numbers_as_llm_drop_on_blocks() -> None:
    lab = Lab(tiny("gpt_neox"), text(3, 10))
    mine, others = (MEASURES.make(n).measure(lab) for n in ("block-influence", "cosine"))
    assert all(mine[b] == others[b] for b in mine.values)


def test_opposite_streams_are_not_clamped(literal: ModuleType) -> None:
    """A block that turns the stream round has influence above 1."""
    model, ids = tiny("gpt2"), text(2, 10)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(0.01)
        model.transformer.wpe.weight.mul_(0.01)
        model.transformer.h[0].mlp.c_proj.bias.copy_(-50 * model.transformer.wte.weight.mean(0))
    x, y = literal.pairs(model, "gpt2", ids)["block.0"]
    got = MEASURES.make("block-influence").measure(Lab(model, ids))
    assert got["block.0"] == pytest.approx(float(influence(x, y).mean()), abs=FLOAT32)
    assert float(influence(x, y).max()) > 1


def test_standard_error_is_over_sequences(literal: ModuleType) -> None:
    """Sequences of equal length: the sample deviation of their means over √n."""
    model, ids = tiny("llama"), text(6, 10)
    got = MEASURES.make("block-influence").measure(Lab(model, ids))
    for block, (x, y) in literal.pairs(model, "llama", ids).items():
        if block in got.values:
            means = influence(x, y).mean(1).numpy()
            assert got.stderr[block] == pytest.approx(np.std(means, ddof=1) / np.sqrt(len(means)), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lowest_influence_goes(seed: int, literal: ModuleType, rows: SimpleNamespace) -> None:
    model, ids = tiny("llama", seed=seed), text(3, 10)
    states = literal.pairs(model, "llama", ids)
    values = {f"block.{n}": float(influence(*states[f"block.{n}"]).mean()) for n in range(4)}
    steps = rows.plan("shortgpt", Lab(model, ids), Budget(metric="blocks", drop=3))
    assert [s.sites for s in steps] == [(b,) for b in sorted(values, key=lambda b: values[b])[:3]]
