"""ADEPT's layer importance (arXiv 2510.10071): |gradient · weight|, sequence by sequence, by hand-made lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import padded, text, tiny
from lamina.testing.planted import silence


def literal(model: Any, row: Tensor) -> dict[str, float]:
    """Σ |g · w| per block of a llama, of one sequence's mean loss."""
    model.zero_grad()
    model(row.unsqueeze(0), labels=row.unsqueeze(0), use_cache=False).loss.backward()
    found: dict[str, float] = {}
    for name, weight in model.named_parameters():
        if not name.startswith("model.layers."):
            continue
        _, _, number, part, *_ = name.split(".")
        part = "attention" if part in ("self_attn", "input_layernorm") else "mlp"
        pull = float((weight.grad.double() * weight.detach().double()).abs().sum())
        for site in (f"block.{number}", f"block.{number}.{part}"):
            found[site] = found.get(site, 0.0) + pull
    model.zero_grad(set_to_none=True)
    return found


def test_is_the_papers_formula() -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (9, 4, 12, 7)]
    each = [literal(model, row) for row in rows]
    got = MEASURES.make("adept").measure(Lab(model, padded(rows, 2, side="left")))
    assert set(got.values) == set(each[0])
    for site in got.values:
        pulls = [e[site] for e in each]
        assert got[site] == pytest.approx(np.mean(pulls), rel=1e-4), site
        assert got.stderr[site][0] == pytest.approx(np.std(pulls, ddof=1) / 2, rel=1e-3), site


def test_absolute_values_are_taken_before_the_mean() -> None:
    model, ids = tiny("llama"), text(2, 9)
    both, apart = Lab(model, ids), [Lab(model, ids[i : i + 1]) for i in range(2)]
    got, (one, other) = MEASURES.make("adept").measure(both), [MEASURES.make("adept").measure(a) for a in apart]
    taylor = MEASURES.make("taylor").measure(both)
    for site in got.values:
        assert got[site] == pytest.approx((one[site] + other[site]) / 2, rel=1e-9)
        assert got[site] > taylor[site]


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2", "mixtral"])
def test_what_adds_nothing_is_pulled_at_by_nothing(name: str) -> None:
    lab = Lab(tiny(name), text(3, 9))
    silence(lab.anatomy, "block.2")
    got = MEASURES.make("adept").measure(lab)
    assert got["block.2"] == 0.0
    assert all(got[f"block.{n}"] > 0 for n in (0, 1, 3))
