"""Quality against literal second versions, with padding and uneven batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lamina.core.documents import Evidence, Step
from lamina.core.errors import InputError
from lamina.core.registry import EVALUATORS
from lamina.evaluators.quality import Quality, score, tally
from lamina.lab import Lab
from lamina.rewrites.drop import Drop
from lamina.testing.models import tiny


def text(sequences: int = 5, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 90, (sequences, length), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    dense, thinned = tiny("llama"), tiny("llama")
    Drop().apply(Step(rewrite="drop", sites=("block.1", "block.2.mlp")), Lab(thinned, text()))
    return dense, thinned


def literal(model: Any, dense: Any, rows: list[list[int]]) -> tuple[list[float], list[float]]:
    """Loss and KL sums per sequence, token by token, in float64."""
    losses, kls = [], []
    for row in rows:
        with torch.no_grad():
            q = torch.log_softmax(model(torch.tensor([row])).logits[0].double(), -1)
            p = torch.log_softmax(dense(torch.tensor([row])).logits[0].double(), -1)
        losses.append(sum(-float(q[t, row[t + 1]]) for t in range(len(row) - 1)))
        kls.append(sum(float((p[t].exp() * (p[t] - q[t])).sum()) for t in range(len(row) - 1)))
    return losses, kls


def named(rows: tuple[Evidence, ...]) -> dict[tuple[str, str], Evidence]:
    found = {(e.name, e.of): e for e in rows}
    assert len(found) == len(rows)
    return found


def test_sums_are_those_of_the_literal_version(models: tuple[Any, Any]) -> None:
    dense, thinned = models
    found = tally(Lab(thinned, text(), batch_size=2), dense)
    losses, kls = literal(thinned, dense, text().tolist())
    assert found.thinned == pytest.approx(losses, rel=1e-5)
    assert found.kl == pytest.approx(kls, rel=1e-4)
    assert found.dense == pytest.approx(literal(dense, dense, text().tolist())[0], rel=1e-5)
    assert found.tokens.tolist() == [11.0] * 5


def test_padding_neither_predicts_nor_counts(models: tuple[Any, Any]) -> None:
    dense, thinned = models
    ids, mask = text(3), torch.ones(3, 12, dtype=torch.long)
    rows = [ids[0].tolist(), ids[1, :7].tolist(), ids[2, :3].tolist()]
    mask[1, 7:] = mask[2, 3:] = 0
    found = tally(Lab(thinned, [{"input_ids": ids, "attention_mask": mask}]), dense)
    losses, kls = literal(thinned, dense, rows)
    assert found.tokens.tolist() == [11.0, 6.0, 2.0]
    assert found.thinned == pytest.approx(losses, rel=1e-5)
    assert found.kl == pytest.approx(kls, rel=1e-4)


def test_the_evidence_is_a_ratio_of_sums_whatever_the_batches(models: tuple[Any, Any]) -> None:
    """The mean of batch means would weigh the last, smaller batch too much."""
    dense, thinned = models
    whole = named(Quality().evaluate(Lab(thinned, text(), batch_size=5), reference=dense))
    parts = named(Quality().evaluate(Lab(thinned, text(), batch_size=4), reference=dense))
    assert whole.keys() == parts.keys()
    for key, e in whole.items():
        assert parts[key].value == pytest.approx(e.value, rel=1e-5)
        assert parts[key].low == pytest.approx(e.low, rel=1e-4)
    losses, kls = literal(thinned, dense, text().tolist())
    assert whole["loss", "thinned"].value == pytest.approx(sum(losses) / 55, rel=1e-5)
    assert whole["kl", "thinned"].value == pytest.approx(sum(kls) / 55, rel=1e-4)


def test_perplexity_ratio_and_interval_are_those_of_the_loss(models: tuple[Any, Any]) -> None:
    dense, thinned = models
    found = named(Quality(seed=3).evaluate(Lab(thinned, text()), reference=dense))
    assert set(found) == {
        ("loss", "dense"), ("loss", "thinned"), ("loss", "difference"), ("kl", "thinned"),
        ("perplexity", "dense"), ("perplexity", "thinned"), ("perplexity", "ratio"),
    }  # fmt: skip
    rise, times = found["loss", "difference"], found["perplexity", "ratio"]
    assert rise.low is not None
    assert rise.high is not None
    assert rise.low < rise.value < rise.high
    assert times.value == pytest.approx(math.exp(rise.value))
    assert (times.low, times.high) == pytest.approx((math.exp(rise.low), math.exp(rise.high)))
    ratio = found["perplexity", "thinned"].value / found["perplexity", "dense"].value
    assert times.value == pytest.approx(ratio)
    assert {e.seed for e in found.values()} == {3}
    assert {e.n for e in found.values()} == {5}


def test_a_model_against_itself_differs_by_nothing(models: tuple[Any, Any]) -> None:
    dense, _ = models
    found = named(Quality().evaluate(Lab(dense, text()), reference=dense))
    for key in (("loss", "difference"), ("kl", "thinned")):
        assert (found[key].value, found[key].low, found[key].high) == (0.0, 0.0, 0.0)


def test_without_a_reference_only_its_own_numbers(models: tuple[Any, Any]) -> None:
    found = named(Quality().evaluate(Lab(models[1], text()), reference=None))
    assert set(found) == {("loss", "thinned"), ("perplexity", "thinned")}


def test_scoring_tokens_without_a_lab(models: tuple[Any, Any]) -> None:
    dense, thinned = models
    found, want = score(thinned, text(), reference=dense, batch_size=3), tally(Lab(thinned, text()), dense)
    assert found.thinned == pytest.approx(want.thinned)
    assert found.loss == pytest.approx(float(np.sum(want.thinned) / np.sum(want.tokens)))
    assert score(tiny("nanogpt"), text()).kl is None
    with pytest.raises(InputError, match="token ids"):
        score(thinned, text()[0])


def test_another_vocabulary_is_refused(models: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="different logits"):
        Quality().evaluate(Lab(models[1], text()), reference=tiny("llama", vocab_size=120))


def test_options_are_checked() -> None:
    assert EVALUATORS.make("quality", {"seed": 1}).seed == 1
    with pytest.raises(InputError, match="at least 100 resamples"):
        EVALUATORS.make("quality", {"resamples": 3})
