"""The effect of skipping a layer on later ones (arXiv 2505.13898, section on causal effects), token by token."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.testing.models import lively, padded, text, tiny
from lamina.testing.planted import silence


def measured(lab: Lab, **options: object) -> Scores:
    return MEASURES.make("skip-effect", options).measure(lab)


def updates(model: nn.Module, name: str, ids: torch.Tensor, gone: list[str], literal: ModuleType) -> list[torch.Tensor]:
    """What each block adds, float64 [sequences, tokens, width]."""
    with literal.masked(model, name, gone):
        pairs = literal.pairs(model, name, ids)
    return [pairs[f"block.{n}"][1] - pairs[f"block.{n}"][0] for n in range(4)]


def effects(
    model: nn.Module, name: str, ids: torch.Tensor, skipped: int, literal: ModuleType, front: int = 1
) -> list[float]:
    """E[s, l] for all later l, and the effect on the output."""
    clean, block = updates(model, name, ids, [], literal), f"block.{skipped}"
    moved = updates(model, name, ids, [block], literal)
    found = []
    for later in range(skipped + 1, 4):
        ratios = [
            float((u - v).norm()) / max(float(u.norm()), 1e-6)
            for a, b in zip(clean[later], moved[later], strict=True)
            for u, v in zip(a[front:], b[front:], strict=True)
        ]
        found.append(max(ratios))
    p = literal.logits(model, ids).double().softmax(-1)
    with literal.masked(model, name, [block]):
        q = literal.logits(model, ids).double().softmax(-1)
    return [*found, float((p - q)[:, front:].norm(dim=-1).max())]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_is_the_papers_formula(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 9)
    got = measured(Lab(model, ids, batch_size=2))
    largest = measured(Lab(model, ids, batch_size=2), reduce="max")
    grid = got.grids["effects"]
    assert grid.columns == ("block.0", "block.1", "block.2", "block.3", "output")
    for s in range(4):
        wanted = effects(model, name, ids, s, literal)
        assert grid.values[s, s + 1 :] == pytest.approx(wanted, rel=2e-4)
        assert not grid.values[s, : s + 1].any(), "nothing before the skipped block moves"
        assert got[f"block.{s}"] == pytest.approx(np.mean(wanted), rel=2e-4)
        assert largest[f"block.{s}"] == pytest.approx(max(wanted), rel=2e-4)


def test_the_first_token_counts_where_it_is_asked_for(literal: ModuleType) -> None:
    model, ids = tiny("llama"), text(3, 9)
    grid = measured(Lab(model, ids), first=True).grids["effects"]
    for s in range(4):
        assert grid.values[s, s + 1 :] == pytest.approx(effects(model, "llama", ids, s, literal, front=0), rel=2e-4)


def test_an_identity_block_has_exactly_none() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    silence(lab.anatomy, "block.1")
    got = measured(lab)
    assert got["block.1"] == 0.0
    assert not got.grids["effects"].values[1].any()


def test_padding_does_not_count_and_errors_are_the_jackknife(literal: ModuleType) -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 11, 7, 9)]
    each = np.array([effects(model, "llama", r.unsqueeze(0), 1, literal) for r in rows])
    got = measured(Lab(model, padded(rows, 4, side="left")))
    assert got["block.1"] == pytest.approx(each.max(0).mean(), rel=2e-4)
    left = np.array([np.delete(each, i, 0).max(0).mean() for i in range(4)])
    assert got.stderr["block.1"][0] == pytest.approx(np.sqrt(3 / 4 * ((left - left.mean()) ** 2).sum()), rel=1e-2)


def test_vectors_are_compared_by_their_norm() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = lively(transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99))).eval()
    ids = text(3, 9)
    lab = Lab(model, ids)
    grid = measured(lab, first=True).grids["effects"]
    with torch.no_grad():
        y = model(ids).last_hidden_state
        with lab.ablate(["block.2"]):
            z = model(ids).last_hidden_state
    assert grid.values[2, 3] == pytest.approx(float(((y - z).norm(dim=-1) / y.norm(dim=-1)).max()), rel=1e-4)


def test_unknown_reductions_are_refused() -> None:
    with pytest.raises(InputError, match="reduce is one of mean, max, not 'sum'"):
        MEASURES.make("skip-effect", {"reduce": "sum"})
