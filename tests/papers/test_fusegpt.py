"""FuseGPT's Macro Influence (arXiv 2411.14507): the last block's outputs with and without a block, token by token."""

from __future__ import annotations

import copy
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import lively, padded, text, tiny
from lamina.testing.planted import silence

FLOAT32 = 2e-6


def ends(model: nn.Module, name: str, ids: torch.Tensor, gone: list[str], literal: ModuleType) -> torch.Tensor:
    """What the last block returns, float64 [tokens, width]."""
    last = f"block.{len(literal.layers(model, name)) - 1}"
    with literal.masked(model, name, gone):
        return literal.pairs(model, name, ids)[last][1].flatten(0, 1)


def turned(dense: torch.Tensor, thinned: torch.Tensor) -> float:
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(dense, thinned, strict=True)]
    return 1 - math.fsum(cosines) / len(cosines)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_is_the_papers_formula(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 10)
    dense = ends(model, name, ids, [], literal)
    got = MEASURES.make("macro-influence").measure(Lab(model, ids, batch_size=2))
    assert list(got.values) == [f"block.{n}" for n in range(4)]
    for block in got.values:
        assert got[block] == pytest.approx(turned(dense, ends(model, name, ids, [block], literal)), abs=FLOAT32)


def test_is_that_of_a_network_without_the_block(literal: ModuleType) -> None:
    """As the paper's code does it: the block leaves the list."""
    model, ids = tiny("llama"), text(3, 10)
    dense = ends(model, "llama", ids, [], literal)
    got = MEASURES.make("macro-influence").measure(Lab(model, ids))
    for n in range(4):
        shorter = copy.deepcopy(model)
        del shorter.model.layers[n]  # type: ignore[union-attr]
        shorter.config.num_hidden_layers = 3  # type: ignore[union-attr]
        assert got[f"block.{n}"] == pytest.approx(turned(dense, ends(shorter, "llama", ids, [], literal)), abs=FLOAT32)


def test_an_identity_block_has_exactly_none() -> None:
    lab = Lab(tiny("llama"), text(3, 10))
    silence(lab.anatomy, "block.1")
    got = MEASURES.make("macro-influence").measure(lab)
    assert got["block.1"] == 0.0
    assert all(got[f"block.{n}"] > 1e-4 for n in (0, 2, 3))


def test_tokens_count_alike_and_errors_are_over_sequences(literal: ModuleType) -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 11, 7)]
    alone = []
    for row in rows:
        dense = ends(model, "llama", row.unsqueeze(0), [], literal)
        alone.append(turned(dense, ends(model, "llama", row.unsqueeze(0), ["block.2"], literal)))
    got = MEASURES.make("macro-influence").measure(Lab(model, padded(rows, 3)))
    sizes = np.array([4, 11, 7])
    mean = float(np.average(alone, weights=sizes))
    assert got["block.2"] == pytest.approx(mean, abs=FLOAT32)
    spread = ((sizes * (np.array(alone) - mean)) ** 2).sum() * 3 / 2  # of a ratio, linearised
    assert got.stderr["block.2"][0] == pytest.approx(np.sqrt(spread) / sizes.sum(), rel=1e-4)


def test_each_stack_has_its_own_last_block() -> None:
    import transformers

    from lamina.anatomy import Anatomy

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    model = lively(transformers.T5Model(transformers.T5Config(**sizes, decoder_start_token_id=0))).eval()
    batch = {"input_ids": text(3, 9), "decoder_input_ids": text(3, 6, seed=1)}
    lab = Lab(model, [batch], anatomy=Anatomy.of(model, batch))
    got = MEASURES.make("macro-influence").measure(lab)
    for stack in ("encoder", "decoder"):
        seen = []
        last = model.get_submodule(lab.anatomy.block(f"{stack}.block.1").path)
        handle = last.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(**batch)
            with lab.ablate([f"{stack}.block.0"]):
                model(**batch)
        handle.remove()
        dense, thinned = ((s if torch.is_tensor(s) else s[0]).double().flatten(0, 1) for s in seen)
        assert got[f"{stack}.block.0"] == pytest.approx(turned(dense, thinned), abs=FLOAT32)
