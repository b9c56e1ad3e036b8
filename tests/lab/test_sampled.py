"""Means over sequences of sampled rows, tables of several stacks, and tokens behind the first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina.core.errors import UnsupportedError
from lamina.core.sites import Kind
from lamina.lab import Lab
from lamina.lab.rows import Rows
from lamina.lab.sample import Sampled
from lamina.lab.sampled import (
    BehindFirst,
    Found,
    PerSample,
    behind,
    curves,
    kept,
    layer_map,
    over_sequences,
    sampled_behind,
    sequences_of,
    table,
)
from lamina.lab.tally import PerToken
from lamina.maths.moments import Mean
from lamina.testing.models import padded, text, tiny


def sample(owner: list[int], position: list[int], name: str = "", ids: bool = True) -> Sampled:
    count = len(owner)
    states = torch.arange(3.0 * count * 2).view(3, count, 2)
    tokens = torch.arange(count) if ids else None
    return Sampled((f"{name}block.0", f"{name}block.1"), states, np.array(owner), np.array(position), tokens, tokens)


def test_a_sequence_that_comes_twice_is_two_sequences() -> None:
    assert sequences_of(sample([0, 0, 1, 2], [1, 4, 1, 1])).tolist() == [0, 0, 1, 2]
    doubled = sample([0, 0, 0, 0, 1, 1], [1, 1, 4, 4, 2, 7])
    found = sequences_of(doubled)
    assert found.tolist() == [0, 1, 0, 1, 2, 2]


def test_over_sequences_is_a_mean_of_rows_with_errors_over_sequences() -> None:
    values, counts = np.array([[1.0, 2.0, 4.0, 8.0], [0.0, 1.0, 0.0, 1.0]]), np.array([1.0, 1.0, 2.0, 1.0])
    sequences = np.array([0, 1, 1, 0])
    value, error = over_sequences(values, counts, sequences)
    assert value.tolist() == pytest.approx([15 / 5, 2 / 5])
    mean = Mean()
    mean.add([9.0, 6.0], [2.0, 3.0])
    assert error[0] == pytest.approx(float(mean.stderr))
    assert np.isnan(over_sequences(values, 1.0, np.zeros(4, dtype=int))[1]).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_behind_the_first(side: str) -> None:
    ids = [torch.arange(3, 3 + n) for n in (5, 1, 2)]
    rows = Rows(padded(ids, 3, side=side)[0])
    assert behind(rows, 1).tolist() == [False, True, True, True, True, True, False, True]
    assert behind(rows, 2).tolist() == [False, False, True, True, True, True, True, True]  # too short to lose any
    assert behind(rows, 0).all()
    assert behind(Rows({"pixel_values": torch.zeros(2, 3, 4, 4)}).on(torch.zeros(2, 7, 8)), 1).all()


def test_sampled_tokens_behind_the_first() -> None:
    some = sample([0, 0, 1], [0, 3, 2])
    found = sampled_behind(some, 1)
    assert found.position.tolist() == [3, 2]
    assert torch.equal(found.states, some.states[:, 1:])
    assert found.ids is not None
    assert found.ids.tolist() == [1, 2]
    assert sampled_behind(some, 0) is some
    only = sample([0, 1], [0, 0])
    assert sampled_behind(only, 1) is only
    images = sample([0, 0], [0, 1], ids=False)
    assert sampled_behind(images, 1) is images
    assert kept(images, np.array([True, False])).ids is None


def test_a_table_of_several_stacks() -> None:
    def find(sampled: Sampled) -> Found:
        if sampled.ids is None:
            raise UnsupportedError("no tokens here")
        grid = curves(sampled.blocks, a=[0, 1, 2])
        return Found(values=[1, 2], stderr=[0.5, np.nan], spans=[[1, 3], [2]], grids={"curve": grid})

    one, other = sample([0], [0], "encoder."), sample([0], [0], "decoder.", ids=False)
    found = table("m", [one, other], find)
    assert {k: v.tolist() for k, v in found.values.items()} == {"encoder.block.0": [1], "encoder.block.1": [2]}
    assert found.values["encoder.block.0"].dtype == np.float64
    assert found.stderr["encoder.block.0"].tolist() == [0.5]
    assert found.spans["encoder.block.0"].tolist() == [1, 3]
    assert found.missing == {"decoder.block.0": "no tokens here", "decoder.block.1": "no tokens here"}
    assert list(found.grids) == ["encoder.curve"]
    assert found.grids["encoder.curve"].rows == ("input", "encoder.block.0", "encoder.block.1")
    with pytest.raises(UnsupportedError, match="no tokens here"):
        table("m", [other], find)


def test_maps_name_their_depths() -> None:
    grid = layer_map(["block.0"], np.eye(2))
    assert grid.rows == grid.columns == ("input", "block.0")


def test_without_a_front_it_is_the_mean_over_all_tokens() -> None:
    lab = Lab(tiny("llama"), text(5, 9), batch_size=2)
    kinds = (Kind.BLOCK, Kind.MLP)
    mine, plain = lab.stream(
        [BehindFirst("m", kinds, lambda t: t.ff, 0), PerToken("m", kinds, lambda t: t.ff)],
    )
    assert set(mine.values) == set(plain.values)
    for site in plain.values:
        assert mine[site] == pytest.approx(plain[site], rel=1e-12)
        assert mine.stderr[site] == pytest.approx(plain.stderr[site], rel=1e-9)


def test_a_sample_tally_merges_and_leaves_its_parts_alone() -> None:
    lab, ids = Lab(tiny("llama"), text(6, 9)), text(6, 9)

    def find(sampled: Sampled) -> Found:
        return Found(values=sampled.states[1:].double().mean((1, 2)).numpy())

    whole, *parts = (PerSample("m", find, 4, 3) for _ in range(3))
    lab.on(ids, batch_size=3).stream([whole])
    for part, some in zip(parts, ids.split(3), strict=True):
        lab.on(some).stream([part])
    before = parts[0].scores()
    both, wanted = parts[1].merge(parts[0]).scores(), whole.scores()
    assert {k: float(v[0]) for k, v in both.values.items()} == {k: float(v[0]) for k, v in wanted.values.items()}
    assert parts[0].scores().values == before.values
