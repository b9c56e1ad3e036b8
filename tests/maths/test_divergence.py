"""Divergences against literal sums in float64, their laws, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.maths.divergence import js, js_reversed, kl, nll

LOGITS = st.integers(0, 10_000).map(lambda s: torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(s)) * 3)


def literal_kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def probabilities(logits: torch.Tensor) -> list[float]:
    return logits.double().softmax(-1).tolist()


@settings(max_examples=20)
@given(LOGITS, LOGITS)
def test_literal_sums(a: torch.Tensor, b: torch.Tensor) -> None:
    for i in range(2):
        for t in range(5):
            p, q = probabilities(a[i, t]), probabilities(b[i, t])
            m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
            close = {"rel": 1e-4, "abs": 1e-6}
            assert float(kl(a, b)[i, t]) == pytest.approx(literal_kl(p, q), **close)
            assert float(js(a, b)[i, t]) == pytest.approx((literal_kl(p, m) + literal_kl(q, m)) / 2, **close)
            assert float(js_reversed(a, b)[i, t]) == pytest.approx((literal_kl(m, p) + literal_kl(m, q)) / 2, **close)


def test_the_order_of_arguments() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert float(kl(sure, unsure)) == pytest.approx(math.log(3), rel=1e-2)
    assert float(kl(unsure, sure)) > 4


@settings(max_examples=20)
@given(LOGITS, LOGITS, st.floats(-20, 20))
def test_laws(a: torch.Tensor, b: torch.Tensor, shift: float) -> None:
    for one in (kl, js, js_reversed):
        assert one(a, b).shape == (2, 5)
        assert bool((one(a, b) >= 0).all())
        assert float(one(a, a).max()) < 1e-6
        torch.testing.assert_close(one(a + shift, b - shift), one(a, b), rtol=1e-3, atol=1e-4)
    for one in (js, js_reversed):
        torch.testing.assert_close(one(a, b), one(b, a), rtol=1e-4, atol=1e-6)
    assert float(js(a, b).max()) <= math.log(2) + 1e-6


def test_extreme_logits_stay_finite() -> None:
    a = torch.tensor([[1e4, 0.0, -1e4]])
    for one in (kl, js, js_reversed):
        assert bool(torch.isfinite(one(a, -a)).all()), one.__name__
    assert float(js(a, -a)) == pytest.approx(math.log(2))


def test_half_precision_is_lifted() -> None:
    a = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    b = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert kl(a, b).dtype == torch.float32
    torch.testing.assert_close(kl(a, b), kl(a.double().float(), b.double().float()))


def test_nll_picks_the_label() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 6, 3], [1, 1, 2]])
    found = nll(logits, labels)
    for i in range(2):
        for t in range(3):
            want = -math.log(probabilities(logits[i, t])[int(labels[i, t])])
            assert float(found[i, t]) == pytest.approx(want, rel=1e-5)
