"""Do Language Models Use Their Depth Efficiently? (arXiv 2505.13898) against its formulas, token by token."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import padded, text, tiny

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gemma2", "mixtral")


def contribution(x: Tensor, f: Tensor) -> float:
    return float(f.norm()) / max(float(x.norm()), 1e-6)


def cosine(x: Tensor, f: Tensor) -> float:
    sizes = float(x.norm()) * float(f.norm())
    return float(x @ f) / sizes if sizes else 0.0


def means(pairs: dict[str, tuple[Tensor, Tensor]], formula: Any, front: int) -> dict[str, float]:
    """Sum over tokens / number of tokens, as in the code, so that long prompts weigh more."""
    found = {}
    for site, (x, y) in pairs.items():
        values = [
            formula(a, b - a)
            for row_x, row_y in zip(x, y, strict=True)
            for a, b in zip(row_x[front:], row_y[front:], strict=True)
        ]
        found[site] = math.fsum(values) / len(values)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("front", [0, 1, 3])
def test_contribution_is_the_papers_formula(name: str, front: int, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 8)
    wanted = means(literal.pairs(model, name, ids), contribution, front)
    got = MEASURES.make("relative-contribution", {"front": front}).measure(Lab(model, ids, batch_size=2))
    assert set(got.values) == set(wanted)
    for site, value in wanted.items():
        assert got[site] == pytest.approx(value, rel=1e-5), site


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("front", [0, 1])
def test_cosine_is_minus_the_papers(name: str, front: int, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 8)
    wanted = means(literal.pairs(model, name, ids), cosine, front)
    got = MEASURES.make("contribution-cosine", {"front": front}).measure(Lab(model, ids, batch_size=2))
    for site, value in wanted.items():
        assert got[site] == pytest.approx(-value, abs=1e-6), site


def test_long_sequences_weigh_more(literal: ModuleType) -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 11)]
    alone = [means(literal.pairs(model, "llama", r.unsqueeze(0)), contribution, 1) for r in rows]
    got = MEASURES.make("relative-contribution").measure(Lab(model, padded(rows, 2)))
    for site in alone[0]:
        assert got[site] == pytest.approx((3 * alone[0][site] + 10 * alone[1][site]) / 13, rel=1e-5)


def test_a_silent_sublayer_adds_nothing_and_has_cosine_zero(literal: ModuleType) -> None:
    model = literal.zeroed(tiny("llama"), "llama", ["block.2.mlp"])
    lab = Lab(model, text(2, 8))
    assert MEASURES.make("relative-contribution").measure(lab)["block.2.mlp"] == 0.0
    assert MEASURES.make("contribution-cosine").measure(lab)["block.2.mlp"] == 0.0


def test_what_doubles_its_input_only_amplifies() -> None:
    from lamina.lab.taps import Taps
    from lamina.papers.depth.effective_depth import _against, _contribution

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, -0.5):
        taps = Taps(x, factor * x, torch.zeros(4, dtype=torch.long), 1)
        torch.testing.assert_close(_against(taps), torch.full((4,), -math.copysign(1, factor)).double())
        torch.testing.assert_close(_contribution(taps), torch.full((4,), abs(factor)).double())


def lenses(model: Any, name: str, ids: Tensor, literal: ModuleType) -> tuple[np.ndarray, np.ndarray]:
    """KL(final ‖ lens) [depths] and the overlap of the top 5, of all tokens, with the model's own norm and head."""
    pairs = literal.pairs(model, name, ids)
    states = [pairs["block.0"][0], *(pairs[f"block.{i}"][1] for i in range(4))]
    norm = {"llama": "model.norm", "gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}[name]
    head = model.get_output_embeddings()
    final = literal.logits(model, ids).double().flatten(0, 1)
    kl, overlap = [], []
    for state in states:
        lens = head(model.get_submodule(norm)(state.float())).double().flatten(0, 1)
        p, q = final.softmax(-1), lens.softmax(-1)
        kl.append(float((p * (p / q).log()).sum(-1).mean()))
        best = zip(final.topk(5).indices.tolist(), lens.topk(5).indices.tolist(), strict=True)
        overlap.append(float(np.mean([len(set(a) & set(b)) / 5 for a, b in best])))
    return np.array(kl), np.array(overlap)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_lens_is_norm_and_head_at_every_depth(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(4, 6)
    with torch.no_grad():
        kl, overlap = lenses(model, name, ids, literal)
    got = MEASURES.make("logit-lens", {"sequences": 4, "each": 6}).measure(Lab(model, ids, batch_size=3))
    grid = got.grids["lens"]
    assert grid.columns == ("kl", "overlap")
    assert grid.rows == ("input", "block.0", "block.1", "block.2", "block.3")
    np.testing.assert_allclose(grid.values[:, 0], kl, atol=2e-5)
    np.testing.assert_allclose(grid.values[:, 1], overlap, atol=1e-9)
    assert grid.values[-1].tolist() == [0.0, 1.0]
    for i in range(4):
        assert got[f"block.{i}"] == pytest.approx(abs(kl[i] - kl[i + 1]), abs=4e-5)


def test_lens_of_an_identity_block_stands_still(literal: ModuleType) -> None:
    model = literal.zeroed(tiny("llama"), "llama", ["block.1"])
    got = MEASURES.make("logit-lens").measure(Lab(model, text(4, 6)))
    assert got["block.1"] == 0.0
    assert got.stderr["block.1"] == 0.0
    assert np.array_equal(got.grids["lens"].values[1], got.grids["lens"].values[2])


def test_lens_wants_a_head() -> None:
    from transformers import LlamaModel

    from lamina.testing.models import config

    bench = Lab(LlamaModel(config("llama")), text(2, 6))
    with pytest.raises(UnsupportedError, match="no head"):
        MEASURES.make("logit-lens").measure(bench)


@pytest.mark.parametrize(
    ("name", "options"),
    [("relative-contribution", {"front": -1}), ("contribution-cosine", {"front": -1}), ("logit-lens", {"top": 0})],
)
def test_options_are_checked(name: str, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make(name, options)
