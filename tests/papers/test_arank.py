"""γ-MoD (arXiv 2410.13859): ranks of attention maps, one by one, from maps that transformers itself returns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.lab.attention import Attention
from lamina.lab.rows import Rows
from lamina.papers.heads.arank import Ranks, _map, mean_ranks
from lamina.testing.models import padded, text, tiny


def literal_rank(matrix: Tensor) -> int:
    """Singular values above σ_max · size · eps, counted."""
    values = torch.linalg.svd(matrix.float()).S.tolist()
    return sum(v > values[0] * len(matrix) * torch.finfo(torch.float32).eps for v in values)


@torch.no_grad()
def literal(model: Any, ids: Tensor) -> list[float]:
    """As the code does it, head by head: [layers]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    found = []
    for a in maps:
        ranks = []
        for head in a[0]:
            one = torch.tril(head.clone())
            one.fill_diagonal_(0)
            ranks.append(literal_rank(one))
        found.append(sum(ranks) / len(ranks))
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mistral", "phi", "falcon"])
@pytest.mark.parametrize("length", [8, 20])
def test_ranks_are_those_of_the_models_own_maps(name: str, length: int) -> None:
    model, ids = tiny(name), text(3, 14)
    got = MEASURES.make("arank", {"length": length}).measure(Lab(model, ids, batch_size=2))
    wanted = np.array([literal(model, row[None, :length]) for row in ids])
    for n in range(4):
        # one of twelve maps may have a singular value at the very edge
        assert got[f"block.{n}.attention"] == pytest.approx(wanted[:, n].mean(), abs=0.09)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_unequal_lengths(side: str) -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (5, 12, 3, 9)]
    got = MEASURES.make("arank", {"length": 9}).measure(Lab(model, padded(rows, 4, side=side)))
    wanted = np.array([literal(model, r[None, :9]) for r in rows])
    for n in range(4):
        assert got[f"block.{n}.attention"] == pytest.approx(wanted[:, n].mean())
        assert got.stderr[f"block.{n}.attention"][0] == pytest.approx(wanted[:, n].std(ddof=1) / 4**0.5)


def test_maps_by_hand() -> None:
    size = 10
    alone = torch.eye(size).expand(2, -1, -1).clone()  # every token sees itself
    uniform = torch.ones(size, size).tril() / torch.arange(1, size + 1).unsqueeze(1)
    first = torch.zeros(size, size)
    first[:, 0] = 1  # all see the first
    assert mean_ranks([alone]) == [0.0]
    assert mean_ranks([uniform.unsqueeze(0)]) == [size - 1]
    assert mean_ranks([torch.stack([uniform, first])]) == [(size - 1 + 1) / 2]
    assert literal_rank(torch.eye(size)) == size  # the diagonal is what counts there


def test_a_cut_of_causal_attention_is_its_corner_and_of_others_is_not() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    ids = torch.ones(2, 12, dtype=torch.long)
    band = torch.ones(12, 12).tril().bool() & ~torch.ones(12, 12).tril(-4).bool()
    for mask, causal in ((None, True), (None, False), (band[None, None], False), (torch.zeros(2, 1, 1, 12), False)):
        attention = Attention(q, k, k, mask, None, causal)
        taps: Any = SimpleNamespace(attention=attention, rows=Rows({"input_ids": ids}))
        whole = attention.weights(1)[:, :5, :5]
        torch.testing.assert_close(_map(taps, 1, 5), whole)


def test_sequences_are_chosen_by_what_they_hold() -> None:
    model, ids = tiny("llama"), text(12, 9)
    measure = MEASURES.make("arank", {"sequences": 5})
    whole = measure.measure(Lab(model, ids))
    turned = measure.measure(Lab(model, ids.flip(0), batch_size=5))
    assert whole.values.keys() == turned.values.keys()
    for site in whole.values:
        assert whole.values[site] == pytest.approx(turned.values[site])
        assert whole.stderr[site] == pytest.approx(turned.stderr[site])
    tallies = []
    for part in ids.split(4):
        tally = measure.tally(Lab(model, ids).anatomy)
        Lab(model, part).stream([tally])
        tallies.append(tally)
    merged = tallies[2].merge(tallies[0]).merge(tallies[1])
    assert all(len(r) == 5 for r in merged.ranks.values())
    for site in whole.values:
        assert merged.scores().values[site] == pytest.approx(whole.values[site])


def test_attention_that_was_not_seen_is_told() -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    tally = Ranks("arank", 8, 4)
    tally.wants = frozenset()
    found = lab.stream([tally])[0]
    assert not found.values
    assert found.missing["block.0.attention"] == "its attention weights were not seen"


@pytest.mark.parametrize("options", [{"length": 1}, {"sequences": 0}])
def test_options(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make("arank", options)
