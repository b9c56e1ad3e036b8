"""The tally of trials: sums over positions, by hand, and its merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina.core.errors import UnsupportedError
from lamina.core.sites import Kind
from lamina.lab import Lab
from lamina.lab.per_trial import OutputKL, PerTrial, over_outputs, over_states, rise, turned
from lamina.maths.divergence import KLFrom
from lamina.testing.models import lively, padded, text, tiny


def test_turned_is_exact_where_it_matters() -> None:
    a = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    assert not turned(a, a).any()
    assert turned(a, 3 * a) == pytest.approx(0.0, abs=1e-6)
    assert turned(a, -a) == pytest.approx(2.0)
    zero = torch.zeros(20, 7)
    assert not turned(zero, zero).any()
    assert bool((turned(a, zero) == 1).all())


def test_the_unit_is_that_of_the_trials() -> None:
    kinds = (Kind.BLOCK,)
    lab = Lab(tiny("llama"), text(3, 9))
    assert lab.sweep([PerTrial("x", kinds, rise, unit="damage")])[0].unit == "nats"
    assert lab.sweep([PerTrial("x", kinds, lambda t: over_outputs(t, lambda a, b: (a - b).sum(-1)))])[0].unit == ""
    assert PerTrial("x", kinds, rise, unit="damage").scores().unit == ""
    filled = PerTrial("x", kinds, rise, unit="damage")
    lab.sweep([filled])
    empty = PerTrial("x", kinds, rise, unit="damage")
    assert empty.merge(filled).scores().unit == filled.merge(empty).scores().unit == "nats"


def test_other_kinds_are_not_tried() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    tally = PerTrial("x", (Kind.MLP,), rise)
    assert list(lab.sweep([tally])[0].values) == [f"block.{n}.mlp" for n in range(4)]


def test_outputs_and_states_are_compared_at_real_positions_alone() -> None:
    rows = [text(1, n, seed=n)[0] for n in (4, 9)]
    counted = {}
    for side in ("left", "right"):
        lab = Lab(tiny("llama"), padded(rows, 2, side=side))
        ones = [
            PerTrial("x", (Kind.BLOCK,), lambda t: over_outputs(t, lambda a, _: torch.ones(len(a)))),
            PerTrial("x", (Kind.BLOCK,), lambda t: over_states(t, "block.3", lambda a, _: torch.ones(len(a)))),
        ]
        lab.sweep(ones)
        counted[side] = [float(t.means["block.0"].total) for t in ones]
    assert counted == {"left": [13.0, 13.0], "right": [13.0, 13.0]}


def test_the_dense_softmax_is_computed_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counting(KLFrom):
        def __init__(self, reference: torch.Tensor) -> None:
            made.append(len(reference))
            super().__init__(reference)

    monkeypatch.setattr("lamina.lab.per_trial.KLFrom", Counting)
    lab = Lab(tiny("llama"), text(4, 9), batch_size=2)
    scores = lab.sweep([PerTrial("x", (Kind.BLOCK,), OutputKL())])[0]
    assert made == [18, 18]
    assert all(np.isfinite(v).all() for v in scores.values.values())


def test_vectors_have_no_divergence() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    lab = Lab(lively(transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99))), text(2, 8))
    with pytest.raises(UnsupportedError, match="outputs are no distributions"):
        lab.sweep([PerTrial("x", (Kind.BLOCK,), OutputKL())])
