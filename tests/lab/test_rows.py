"""Rows and samples: which tokens there are, and which of them a sample takes, whatever their batch and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina.core.errors import InputError, LaminaError, UnsupportedError
from lamina.core.sites import Site
from lamina.lab import Lab, Taps
from lamina.lab.rows import Rows, sequence_keys
from lamina.lab.sample import Sampled, TokenSample
from lamina.testing.models import padded, text, tiny

LENGTHS = (10, 4, 7, 12, 1, 5)


def sequences() -> list[torch.Tensor]:
    return [text(1, n, seed=n)[0] for n in LENGTHS]


class Sampling:
    def __init__(self, sequences: int, each: int) -> None:
        self.sample = TokenSample(sequences, each)

    def add(self, site: Site, taps: Taps) -> None:
        self.sample.add(site, taps)

    def scores(self) -> Sampled:
        return self.sample.stacks()[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_those_that_are_no_padding(side: str) -> None:
    (batch,) = padded(sequences(), 6, side=side)
    rows = Rows(batch)
    own = torch.cat(sequences())
    assert rows.ids is not None
    assert rows.next_ids is not None
    assert rows.ids.tolist() == own.tolist()
    assert rows.sequence.tolist() == [i for i, n in enumerate(LENGTHS) for _ in range(n)]
    assert rows.position.tolist() == [p for n in LENGTHS for p in range(n)]
    ends = np.cumsum(LENGTHS) - 1
    assert [rows.next_ids[i].item() for i in ends] == [-1] * len(LENGTHS)
    assert rows.next_ids[0] == own[1]
    states = torch.arange(float(batch["input_ids"].numel())).view(*batch["input_ids"].shape, 1)
    assert rows.strip(states).shape == (sum(LENGTHS), 1)
    for row, ids in enumerate(sequences()):
        alone = rows.only(row)
        assert alone.ids is not None
        assert alone.ids.tolist() == ids.tolist()
        assert alone.offset == row


def test_keys_depend_on_what_a_sequence_holds_alone() -> None:
    alone = np.concatenate([sequence_keys({"input_ids": s.unsqueeze(0)}) for s in sequences()])
    for side in ("left", "right"):
        (batch,) = padded(sequences(), 6, side=side)
        assert (sequence_keys(batch) == alone).all()
    tokens = np.concatenate([Rows({"input_ids": s.unsqueeze(0)}).keys for s in sequences()])
    assert (Rows(batch).keys == tokens).all()
    assert len(set(tokens.tolist())) == len(tokens)
    pictures = {"pixel_values": torch.randn(3, 3, 4, 4)}
    swapped = {"pixel_values": pictures["pixel_values"].flip(0)}
    assert (sequence_keys(pictures) == sequence_keys(swapped)[::-1]).all()


def test_streams_of_other_positions_than_the_ids_are_all_real() -> None:
    rows = Rows({"pixel_values": torch.zeros(2, 3, 8, 8)})
    patches = rows.on(torch.zeros(2, 5, 7))
    assert (patches.sequences, patches.ids, patches.strip(torch.zeros(2, 5, 7)).shape) == (2, None, (10, 7))
    grid = rows.on(torch.zeros(2, 3, 4, 7))
    assert grid.strip(torch.zeros(2, 3, 4, 7)).shape == (24, 7)
    assert grid.sequence.tolist() == [0] * 12 + [1] * 12


def test_a_sample_is_that_of_the_whole_text_in_any_order_and_split() -> None:
    model = tiny("llama")
    whole = Lab(model, padded(sequences(), 6)).stream([Sampling(4, 3)])[0]  # type: ignore[list-item]
    assert whole.states.shape == (5, len(whole.owner), 32)
    assert set(np.bincount(whole.owner)) <= {1, 3}
    parts = []
    for order in ([3, 0], [5, 4, 1], [2]):
        part = Sampling(4, 3)
        Lab(model, padded([sequences()[i] for i in order], 2, side="left")).stream([part])  # type: ignore[list-item]
        parts.append(part.sample)
    for a, b, c in ((0, 1, 2), (2, 0, 1)):
        merged = parts[a].merge(parts[b]).merge(parts[c]).stacks()[0]
        assert (merged.owner == whole.owner).all()
        assert (merged.position == whole.position).all()
        assert torch.equal(merged.ids, whole.ids)  # type: ignore[arg-type]
        torch.testing.assert_close(merged.states, whole.states, rtol=1e-4, atol=1e-5)


def test_sampled_states_are_the_streams() -> None:
    model, ids = tiny("llama"), text(3, 9)
    found = Lab(model, ids, batch_size=2).stream([Sampling(3, 9)])[0]  # type: ignore[list-item]
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    rows = [next(r for r in range(3) if torch.equal(ids[r], found.ids[found.owner == n])) for n in range(3)]  # type: ignore[index]
    for depth in range(4):
        want = torch.cat([hidden[depth][r] for r in rows])
        torch.testing.assert_close(found.states[depth], want, rtol=1e-5, atol=1e-5)


def test_a_sequence_of_padding_alone_is_refused() -> None:
    batch = {"input_ids": text(2, 5), "attention_mask": torch.tensor([[1] * 5, [0] * 5])}
    with pytest.raises(InputError, match=r"row 1 of batch 0.*nothing but padding"):
        Lab(tiny("llama"), [batch])


def test_numbers_that_are_none_are_named_with_block_and_batch() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("inf")
    ids = text(4, 6).clamp_min(8)
    ids[3, 2] = 7
    with pytest.raises(LaminaError, match=r"block\.0: .*NaN or Inf.*batch 1 \(sequence 3 of the text\)"):
        Lab(model, ids, batch_size=2).stream([Sampling(1, 1)])  # type: ignore[list-item]


def test_no_token_no_sample() -> None:
    with pytest.raises(UnsupportedError, match="no token was sampled"):
        TokenSample().stacks()
    with pytest.raises(ValueError, match="at least one token"):
        TokenSample(0, 3)
