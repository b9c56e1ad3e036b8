"""Shortened LLaMA's Taylor criterion (arXiv 2402.02834): weights times gradients, by hand-made lists of parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.testing.models import lively, padded, text, tiny
from lamina.testing.planted import silence

NORMS = {
    "llama": ("model.layers.{}.self_attn.", "model.layers.{}.input_layernorm.", "model.layers.{}."),
    "gpt2": ("transformer.h.{}.attn.", "transformer.h.{}.ln_1.", "transformer.h.{}."),
    "mixtral": ("model.layers.{}.self_attn.", "model.layers.{}.input_layernorm.", "model.layers.{}."),
}
"""Prefixes of the attention's parameters, its norm's, and the block's; the rest of the block is the MLP's."""


def measured(lab: Lab, **options: int) -> Scores:
    return MEASURES.make("taylor", options).measure(lab)


def site_of(parameter: str, name: str) -> str | None:
    attention, norm, block = NORMS[name]
    for n in range(4):
        if parameter.startswith((attention.format(n), norm.format(n))):
            return f"block.{n}.attention"
        if parameter.startswith(block.format(n)):
            return f"block.{n}.{'moe' if name == 'mixtral' else 'mlp'}"
    return None


def literal(model: Any, name: str, rows: list[Tensor]) -> dict[str, float]:
    """The gradient of the mean loss over all tokens, in one backward of each sequence's summed loss."""
    model.zero_grad()
    count = sum(len(r) - 1 for r in rows)
    for row in rows:
        loss = model(row.unsqueeze(0), labels=row.unsqueeze(0), use_cache=False).loss * (len(row) - 1) / count
        loss.backward()
    found: dict[str, float] = {}
    for parameter, weight in model.named_parameters():
        if (site := site_of(parameter, name)) is not None:
            worth = sum(abs(float(x)) for x in (weight.double() * weight.grad.double()).flatten().detach())
            for s in (site, site.rpartition(".")[0]):
                found[s] = found.get(s, 0.0) + worth
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_is_the_papers_formula(name: str) -> None:
    model = tiny(name)
    rows = [text(1, n, seed=n)[0] for n in (9, 4, 12, 7)]
    wanted = literal(model, name, rows)
    got = measured(Lab(model, padded(rows, 2)))
    assert set(got.values) == set(wanted)
    assert got.unit == ""
    for site, worth in wanted.items():
        assert got[site] == pytest.approx(worth, rel=2e-4), site


def test_products_are_summed_before_the_absolute_value() -> None:
    """Else two sequences would give the mean of both."""
    model, ids = tiny("llama"), text(2, 9)
    both = measured(Lab(model, ids))
    apart = [measured(Lab(model, ids[i : i + 1])) for i in range(2)]
    for site in both.values:
        assert both[site] < (apart[0][site] + apart[1][site]) / 2 * 0.999


def test_the_number_of_groups_changes_no_score() -> None:
    lab = Lab(tiny("llama"), text(6, 9))
    got, one = measured(lab), measured(lab, groups=1)
    for site in got.values:
        assert got[site] == pytest.approx(one[site], rel=1e-9)
        assert np.isnan(one.stderr[site][0])
        assert got.stderr[site][0] > 0


def test_errors_are_the_jackknife_over_groups() -> None:
    """With a group for each of two sequences it is that over sequences of equal length."""
    model, ids = tiny("llama"), text(12, 9)
    lab = Lab(model, ids)
    owners = next(Lab(model, ids, batch_size=12).rows()).owners
    pair = [int(np.flatnonzero(owners % np.uint64(4) == g)[0]) for g in (0, 1)]
    got = measured(lab.on(ids[pair]))
    each = [measured(lab.on(ids[i : i + 1])) for i in pair]
    for site in got.values:
        assert got.stderr[site][0] == pytest.approx(abs(each[0][site] - each[1][site]) / 2, rel=1e-6)


def test_a_block_without_outputs_has_no_inner_worth() -> None:
    """Last maps of zero: nothing else of the sublayer has a gradient, and these weights are zero."""
    model = tiny("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.o_proj").weight.zero_()  # type: ignore[operator,union-attr]
    lab = Lab(model, text(3, 9))
    got = measured(lab)
    assert got["block.1.attention"] == 0.0
    silence(lab.anatomy, "block.1")
    assert measured(lab)["block.1"] == 0.0


def test_a_model_that_predicts_no_tokens_is_refused() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    lab = Lab(lively(transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=99))), text(2, 8))
    for name in ("taylor", "adept"):
        with pytest.raises(UnsupportedError, match="predicts no next tokens"):
            MEASURES.make(name).measure(lab)


def test_wrong_groups_are_refused() -> None:
    with pytest.raises(InputError, match="groups is at least 1, not 0"):
        MEASURES.make("taylor", {"groups": 0})
