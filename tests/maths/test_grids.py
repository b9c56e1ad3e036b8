"""Grids against the gguf package, number for number and byte for byte."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import dequantize as read
from gguf import quantize as theirs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.maths.grids import BLOCK, SIMPLE, Grid, Scales, blocks_of, digits

GRIDS = {grid.name: grid for grid in SIMPLE}
NAMES = sorted(GRIDS)
EVEN = sorted(n for n in GRIDS if not GRIDS[n].offset)
NARROW = (torch.bfloat16, torch.float16)
magnitudes = st.floats(2.0**-18, 1e4, width=32)
numbers = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x))
blocks = st.integers(1, 3).flatmap(lambda n: arrays.arrays(np.float32, (n, BLOCK), elements=numbers))


def kind(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name]


def bytes_of(grid: Grid, rows: Tensor) -> np.ndarray[Any, Any]:
    cut = blocks_of(rows)
    return grid.packed(cut, grid.scales(cut)).flatten(-2).numpy()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_format(name: str) -> None:
    assert GGML_QUANT_SIZES[kind(name)] == (BLOCK, GRIDS[name].size)
    wanted = {"Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5}
    assert GRIDS[name].bits_per_weight == wanted[name]


@pytest.mark.parametrize("name", NAMES)
def test_rounding_to_nearest_writes_the_bytes_that_gguf_writes(name: str) -> None:
    rows = random(64, 96)
    rows[0], rows[1, :40], rows[2, 32:64] = 0.0, 0.25, -0.0
    rows[3, ::2] = -rows[3, 1::2]
    rows[4] *= 1e-3
    assert np.array_equal(bytes_of(GRIDS[name], rows), theirs(rows.numpy(), kind(name)))


@pytest.mark.parametrize("name", NAMES)
@given(given_=blocks)
@settings(max_examples=60, deadline=None)
def test_any_numbers_get_the_bytes_that_gguf_gives_them(name: str, given_: np.ndarray[Any, Any]) -> None:
    assert np.array_equal(bytes_of(GRIDS[name], torch.from_numpy(given_)), theirs(given_, kind(name)))


@pytest.mark.parametrize("name", NAMES)
@given(given_=blocks)
@settings(max_examples=60, deadline=None)
def test_the_numbers_are_what_gguf_reads(name: str, given_: np.ndarray[Any, Any]) -> None:
    mine = GRIDS[name].rounded(torch.from_numpy(given_))
    assert np.array_equal(mine.numpy(), read(theirs(given_, kind(name)), kind(name)))


@pytest.mark.parametrize("name", EVEN)
@given(given_=blocks)
@settings(max_examples=60, deadline=None)
def test_what_lies_on_the_grid_stays_there(name: str, given_: np.ndarray[Any, Any]) -> None:
    grid = GRIDS[name]
    once = grid.rounded(torch.from_numpy(given_))
    assert torch.equal(grid.rounded(once), once)
    again = torch.from_numpy(theirs(once.numpy(), kind(name)))
    written = grid.written(once)
    assert written is not None
    assert torch.equal(written, again)
    if bool((blocks_of(once) != 0).any(-1).all()):
        assert torch.equal(again, torch.from_numpy(bytes_of(grid, torch.from_numpy(given_))))


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
@given(given_=blocks, shift=st.floats(-2, 2, width=32))
@settings(max_examples=60, deadline=None)
def test_with_lowest_values_too_where_the_spread_is_no_rounding_error(
    name: str, given_: np.ndarray[Any, Any], shift: float
) -> None:
    grid = GRIDS[name]
    spread = given_.max(-1, keepdims=True) - given_.min(-1, keepdims=True)
    rows = torch.from_numpy(given_ + np.float32(shift) * spread)
    wide = (rows.amax(-1) - rows.amin(-1) > rows.abs().amax(-1) / 500) & (rows.amax(-1) > rows.amin(-1))
    rows = rows[wide]
    once = grid.rounded(rows)
    kept = (blocks_of(once).amax(-1) > blocks_of(once).amin(-1)).all(-1)
    once, rows = once[kept], rows[kept]
    if not len(rows):
        return
    assert torch.equal(grid.rounded(once), once)
    assert np.array_equal(bytes_of(grid, once), bytes_of(grid, rows))


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_nearest(name: str) -> None:
    """Against every code in turn; a step that float16 rounds moves the borders by less than a hundredth."""
    grid, cut = GRIDS[name], blocks_of(random(8, 64))
    natural = grid.scales(cut)
    scales = Scales.of(natural.step, natural.low)
    all_codes = torch.arange(grid.least, grid.most + 1).double()
    every = all_codes * scales.step.double().unsqueeze(-1) + scales.low.double().unsqueeze(-1)
    best = (every - cut.double().unsqueeze(-1)).abs().amin(-1)
    off = (grid.nearest(cut, scales).double() - cut).abs()
    assert torch.all(off <= best + 1e-6 * scales.step.abs())
    assert torch.all((grid.nearest(cut, natural).double() - cut).abs() <= best + 0.07 * scales.step.abs())


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_choice_of_codes_is_written(name: str, data: st.DataObject) -> None:
    """Scales and codes that rounding to nearest would never choose, where float32 holds what they stand for."""
    grid = GRIDS[name]
    step = torch.tensor([[data.draw(st.floats(2**-12, 4.0, width=16))]])
    low = torch.tensor([[data.draw(st.floats(-8.0, 8.0, width=16))]]) if grid.offset else None
    codes = data.draw(st.lists(st.integers(grid.least, grid.most), min_size=BLOCK, max_size=BLOCK))
    if grid.offset and len(set(codes)) == 1:
        codes[0] = grid.most - codes[1]
    scales = Scales.of(step, low)
    row = torch.tensor([codes], dtype=torch.float32) * scales.step + scales.low
    exact = torch.tensor([codes], dtype=torch.float64) * scales.step.double() + scales.low.double()
    assume(torch.equal(row.double(), exact))
    written = grid.written(row)
    assert written is not None
    assert np.array_equal(read(written.numpy(), kind(name)), row.numpy())
    assert grid.holds(row)


@pytest.mark.parametrize("name", NAMES)
def test_many_choices_at_once(name: str) -> None:
    grid = GRIDS[name]
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(grid.least, grid.most + 1, (20, 3, BLOCK), generator=draw)
    codes[5] = codes[5].clamp(0, 2)
    codes[6] = codes[6] // 2 * 2
    low = torch.randn(20, 3, 1, generator=draw) if grid.offset else None
    scales = Scales.of(torch.rand(20, 3, 1, generator=draw), low)
    rows = (codes * scales.step + scales.low).flatten(-2)
    written = grid.written(rows)
    assert written is not None
    assert written.shape == (20, 3 * grid.size)
    assert np.array_equal(read(written.numpy(), kind(name)), rows.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_off_the_grid_is_not_written(name: str) -> None:
    grid, rows = GRIDS[name], random(4, 64)
    assert grid.written(rows) is None
    assert not grid.holds(rows)
    assert not grid.holds(grid.rounded(rows)[:, :40])
    on = grid.rounded(rows)
    assert grid.holds(on)
    on[3, 7] = torch.nextafter(on[3, 7], torch.tensor(9.0))
    assert not grid.holds(on)
    wide = GRIDS["Q8_0"].rounded(rows)
    assert grid.holds(wide) == (name == "Q8_0")


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", EVEN)
@given(given_=blocks)
@settings(max_examples=60, deadline=None)
def test_narrow_types_hold_the_numbers(name: str, dtype: torch.dtype, given_: np.ndarray[Any, Any]) -> None:
    grid = GRIDS[name]
    rows = torch.from_numpy(given_).to(dtype).float()
    once = grid.rounded(rows, dtype)
    assert torch.equal(once.to(dtype).float(), once)
    assert torch.equal(grid.rounded(once, dtype), once)
    written = grid.written(once.to(dtype))
    assert written is not None
    assert np.array_equal(read(written.numpy(), kind(name)), once.numpy())


@pytest.mark.parametrize(("name", "worst"), [("Q4_0", 1.1), ("Q5_0", 1.1), ("Q8_0", 3.5)])
def test_what_short_steps_cost(name: str, worst: float) -> None:
    """Squared errors over those of steps of eleven digits."""
    rows = random(256, 256).bfloat16().float()
    short, full = ((GRIDS[name].rounded(rows, t) - rows).square().mean() for t in (torch.bfloat16, torch.float32))
    assert 0.9 * full <= short <= worst * full


def test_which_types_hold_which_grids() -> None:
    assert [digits(t) for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)] == [53, 24, 11, 8]
    for name, grid in GRIDS.items():
        assert grid.fits(torch.float32)
        assert grid.fits(torch.float64)
        assert grid.fits(torch.bfloat16) == (name in EVEN)
        assert grid.fits(torch.float16) == (name in EVEN)
