"""Types with two levels against searches that are written out, and against what the gguf package reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.maths.grids import GRIDS, compensated
from lamina.maths.kquants import INSTEAD, KGRIDS, SUPER, KGrid

NAMES = sorted(KGRIDS)
F = np.float32


def read(name: str, packed: Tensor) -> Tensor:
    return torch.from_numpy(dequantize(packed.numpy(), GGMLQuantizationType[name]))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def awkward() -> Tensor:
    """Rows of zeros, of one number, of one sign, with few numbers, far from zero, of very different sizes."""
    w = random(16, 512)
    w[0], w[1], w[2], w[3] = 0.0, 0.01, -0.01, w[3].abs()
    w[4] *= 1e-3
    w[5, ::2] = 0.0
    w[6] = 0.0
    w[6, 7] = 0.5
    w[7] = -w[7].abs()
    w[8] = 0.1 + 1e-5 * w[8] / 0.02
    w[9] = -0.1 + 1e-5 * w[9] / 0.02
    w[10] *= torch.logspace(-6, 3, 512)
    w[11, 40:] = 0.0
    w[12] = w[12].sign() * 0.03
    w[13] *= 1e6
    w[14] *= 1e-7
    return w


def bounded(x: float, low: int, high: int) -> int:
    return int(max(low, min(high, np.rint(F(x)))))


def line(x: np.ndarray[Any, Any], most: int, first: float, count: int, bits: int) -> tuple[float, float]:
    """Step and low of one run: the reference's search, number by number."""
    mean = np.sqrt(sum(float(v) ** 2 for v in x) / len(x))
    weight = [abs(float(v)) + (0.0 if bits == 2 else mean) for v in x]
    low, high = min(0.0, float(min(x))), float(max(x))
    if high <= low:
        return 0.0, -low

    def off(step: float, start: float, codes: list[int]) -> float:
        differences = [step * c + start - float(v) for c, v in zip(codes, x, strict=True)]
        return sum(w * (abs(e) if bits == 2 else e * e) for w, e in zip(weight, differences, strict=True))

    step = (high - low) / most
    best = off(step, low, [bounded((float(v) - low) / step, 0, most) for v in x])
    for n in range(count + 1):
        inverse = (first + 0.1 * n + most) / (high - low)
        codes = [bounded(inverse * (float(v) - low), 0, most) for v in x]
        sw, sx = sum(weight), sum(w * float(v) for w, v in zip(weight, x, strict=True))
        sl = sum(w * c for w, c in zip(weight, codes, strict=True))
        sll = sum(w * c * c for w, c in zip(weight, codes, strict=True))
        sxl = sum(w * c * float(v) for w, c, v in zip(weight, codes, x, strict=True))
        if (under := sw * sll - sl * sl) > 0:
            slope, start = (sw * sxl - sx * sl) / under, (sll * sx - sl * sxl) / under
            if start > 0:
                slope, start = sxl / sll, 0.0
            if (now := off(slope, start, codes)) < best:
                best, step, low = now, slope, start
    return step, -low


def even(x: np.ndarray[Any, Any], reach: int) -> float:
    """Step of one run of Q6_K."""
    top = float(x[int(np.argmax(np.abs(x)))])
    if abs(top) < 1e-15:
        return 0.0
    step, best = 0.0, -1.0
    for n in (0, *range(-9, 0), *range(1, 10)):
        codes = [bounded(-(reach + 0.1 * n) / top * float(v), -reach, reach - 1) for v in x]
        up = sum(float(v) ** 3 * c for v, c in zip(x, codes, strict=True))
        down = sum(float(v) ** 2 * c * c for v, c in zip(x, codes, strict=True))
        if down > 0 and up * up > best * down:
            step, best = up / down, up * up / down
    return step


def one_by_one(x: np.ndarray[Any, Any]) -> float:
    """Step of one run of Q3_K."""
    top = float(x[int(np.argmax(np.abs(x)))])
    if abs(top) < 1e-15:
        return 0.0
    sign = 1.0 if top < 0 else -1.0
    y = [sign * float(v) for v in x]
    codes = [bounded(4 / abs(top) * v, -4, 3) for v in y]
    for _ in range(5):
        for n, v in enumerate(y):
            rest = [(u, c) for m, (u, c) in enumerate(zip(y, codes, strict=True)) if m != n]
            up, down = sum(u**3 * c for u, c in rest), sum(u * u * c * c for u, c in rest)
            whole = up + v**3 * codes[n], down + v * v * codes[n] ** 2
            if up <= 0:
                continue
            new = bounded(v * down / up, -4, 3)
            made = up + v**3 * new, down + v * v * new * new
            if new != codes[n] and made[1] > 0 and made[0] ** 2 * whole[1] > whole[0] ** 2 * made[1]:
                codes[n] = new
    down = sum(v * v * c * c for v, c in zip(y, codes, strict=True))
    return sign * sum(v**3 * c for v, c in zip(y, codes, strict=True)) / down if down else 0.0


def literal(name: str, block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A block of 256 as the reference rounds it."""
    run = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16}[name]
    runs = block.reshape(-1, run)
    if name in ("Q3_K", "Q6_K"):
        steps = [one_by_one(r) if name == "Q3_K" else even(r, 32) for r in runs]
        low, high, far = {"Q3_K": (-4, 3, 32), "Q6_K": (-32, 31, 128)}[name]
        top = max(steps, key=abs)
        if abs(top) < 1e-15:
            return np.zeros_like(block)
        d = float(np.float16(top / -far))
        made = []
        for r, step in zip(runs, steps, strict=True):
            each = d * bounded(-far / top * step, -far, far - 1)
            made += [each * bounded(float(v) / each, low, high) if each else 0.0 for v in r]
        return np.array(made, F)
    most, (first, count), far = {
        "Q2_K": (3, (-0.5, 15), 15),
        "Q4_K": (15, (-1.0, 20), 63),
        "Q5_K": (31, (-0.5, 15), 63),
    }[name]
    found = [line(r, most, first, count, int(name[1])) for r in runs]
    tops = max(s for s, _ in found), max(n for _, n in found)
    d, dmin = (float(np.float16(t / far)) for t in tops)
    made = []
    for r, (step, low) in zip(runs, found, strict=True):
        each = d * bounded(far / tops[0] * step, 0, far) if tops[0] > 0 else 0.0
        less = dmin * bounded(far / tops[1] * low, 0, far) if tops[1] > 0 else 0.0
        made += [(each * bounded((float(v) + less) / each, 0, most) if each else 0.0) - less for v in r]
    return np.array(made, F)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_format(name: str) -> None:
    assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == (SUPER, KGRIDS[name].size)
    wanted = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
    assert KGRIDS[name].bits_per_weight == wanted[name]
    assert GRIDS[name] is KGRIDS[name]
    assert GRIDS[INSTEAD[name]].bits_per_weight >= wanted[name]


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_that_of_the_search_written_out(name: str) -> None:
    rows = random(12, SUPER)
    rows[3:6] = rows[3:6] ** 3 * 1e3
    rows[6, ::3], rows[7] = 0.0, rows[7].abs()
    mine = KGRIDS[name].rounded(rows).numpy()
    theirs = np.stack([literal(name, row) for row in rows.numpy()])
    same = np.isclose(mine, theirs, rtol=1e-6, atol=1e-9).all(1)
    assert same.sum() >= 10  # where float32 can't tell two errors apart, a search may end elsewhere
    errors = [np.square(m - rows.numpy()).sum(1) for m in (mine, theirs)]
    assert np.all(errors[0] <= 1.15 * errors[1])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_as_what_was_rounded(name: str) -> None:
    grid = KGRIDS[name]
    for rows in (random(40, 1024), awkward(), random(40, 512, seed=1) * (random(40, 512, seed=2) > 0)):
        made, blocks = grid.rounded(rows), rows.unflatten(-1, (-1, SUPER))
        packed = grid.packed(blocks, grid.scales(blocks)).flatten(-2)
        assert torch.equal(read(name, packed), made)
        again = grid.written(made)
        assert again is not None
        assert again.dtype == torch.uint8
        assert torch.equal(read(name, again), made)
        assert torch.equal(grid.rounded(made), made)
        assert grid.holds(made)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 9999), size=st.floats(1e-6, 1e3), spread=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_any_sizes_are_written_as_they_are(name: str, seed: int, size: float, spread: int) -> None:
    rows = random(3, SUPER, seed=seed) * size
    rows = rows * torch.exp(spread * random(3, SUPER, seed=seed + 1) / 0.02)
    grid = KGRIDS[name]
    made = grid.rounded(rows)
    packed = grid.written(made)
    assert packed is not None
    assert torch.equal(read(name, packed), made)


def planted(grid: KGrid, seed: int) -> Tensor:
    """Blocks [8, 256] of numbers that a file could hold, whoever chose them: of any codes, scales and lows."""
    draw = torch.Generator().manual_seed(seed)
    form, runs = grid.form, SUPER // grid.run

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=draw).float()

    d = (0.001 * (1 + torch.rand(8, 1, generator=draw))).half().float()
    scale = whole(1 if grid.offset else form.least_scale, form.most_scale, 8, runs)
    scale[:, 3] = form.least_scale if form.least_scale else form.most_scale
    step = (d * scale).unsqueeze(-1)
    codes = whole(form.least, form.most, 8, runs, grid.run)
    if not grid.offset:
        return (step * codes).flatten(-2)
    dmin = (0.01 * (1 + torch.rand(8, 1, generator=draw))).half().float()
    low = whole(0, form.lows, 8, runs)
    low[:, 5] = form.lows
    return (step * codes - (dmin * low).unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 9999))
@settings(max_examples=20, deadline=None)
def test_planted_numbers_are_found(name: str, seed: int) -> None:
    rows = planted(KGRIDS[name], seed)
    packed = KGRIDS[name].written(rows)
    assert packed is not None
    assert torch.equal(read(name, packed), rows)


@pytest.mark.parametrize("name", NAMES)
def test_other_numbers_are_not_on_the_grid(name: str) -> None:
    grid, rows = KGRIDS[name], random(4, 512)
    assert not grid.holds(rows)
    assert grid.written(rows) is None
    assert not grid.holds(GRIDS["Q8_0"].rounded(rows))
    made = grid.rounded(rows)
    made[2, 300] = torch.nextafter(made[2, 300], torch.tensor(9.0))
    assert grid.written(made) is None
    assert not grid.holds(grid.rounded(rows)[:, :250])


def test_more_bits_and_two_levels_are_closer() -> None:
    rows = random(64, 512)
    off = {n: float((g.rounded(rows) - rows).square().mean()) for n, g in GRIDS.items()}
    assert off["Q2_K"] > off["Q3_K"] > off["Q4_K"] > off["Q5_K"] > off["Q6_K"] > off["Q8_0"]
    assert off["Q4_K"] < off["Q4_0"]
    assert off["Q5_K"] < off["Q5_0"]
    assert off["Q4_K"] < 0.006 * float(rows.square().mean())
    assert list(off) == sorted(off, key=lambda n: GRIDS[n].bits_per_weight)


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_made_up_for_on_these_grids_too(name: str) -> None:
    x = random(600, 512, seed=3).double() @ (torch.eye(512) + random(512, 512, seed=4) * 3).double()
    weight, moment = random(24, 512).double(), x.T @ x
    made = compensated(weight, moment, KGRIDS[name], torch.float32)
    packed = KGRIDS[name].written(made.float())
    assert packed is not None
    assert torch.equal(read(name, packed).double(), made)
    plain = KGRIDS[name].rounded(weight).double()
    errors = [float(((m - weight) @ x.T).square().sum()) for m in (made, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_which_types_hold_these_grids() -> None:
    for grid in KGRIDS.values():
        assert grid.fits(torch.float32)
        assert grid.fits(torch.float64)
        assert not grid.fits(torch.bfloat16)
        assert not grid.fits(torch.float16)
