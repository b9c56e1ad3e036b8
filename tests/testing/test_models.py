"""Tiny models: the same each time, and as small as they say."""

from __future__ import annotations

import pytest
import torch

from lamina.testing.models import BUILDERS, NAMES, own_text, padded, text, tiny


@pytest.mark.parametrize("name", NAMES)
def test_tiny_models_are_the_same_each_time(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = tiny(name), tiny(name), tiny(name, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert not first.training
    assert torch.equal(own_text(first), own_text(again))
    assert sum(p.numel() for p in first.parameters()) < 300_000


def test_unknown_tiny_models_are_listed() -> None:
    with pytest.raises(KeyError, match="known: llama"):
        tiny("lama")
    assert set(NAMES) == set(BUILDERS)


def test_padded_rows() -> None:
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    right, left = padded(rows, 2)[0], padded(rows, 2, side="left")[0]
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert len(padded(rows, 1)) == 2
    assert text().min() >= 3
