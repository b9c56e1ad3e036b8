"""Grids of llama.cpp with two levels: 256 weights share a float16, runs of 16 or 32 have whole steps of it.

Of the GGUF types, Q3_K and Q6_K hold d · scale · code; Q2_K, Q4_K and Q5_K d · scale · code - dmin · low, where scale
and low are whole numbers of each run. Scales are searched as ggml's reference does, with its weights. Where d and dmin
are so far apart that float32 could not hold a difference, the smaller one is rounded: every number is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lamina.maths._kfound import MANY, Form, found
from lamina.maths._kpack import PACKS

SUPER = 256
"""Weights that share a float16."""
RUNS = 1 << 12
"""Runs that are searched at once, so that they stay in cache."""
EPS = 1e-15
"""Runs that reach no farther count as zero."""
UNIT = 2.0**-24
"""The smallest step that float16 holds."""


@dataclass(frozen=True)
class KScales:
    """Of blocks [..., 256]: `d` and `dmin` [..., 1], whole `scale` and `low` [..., runs]; all float32."""

    d: Tensor
    dmin: Tensor
    scale: Tensor
    low: Tensor

    @property
    def step(self) -> Tensor:
        """What a code is worth [..., runs]."""
        return self.d * self.scale

    @property
    def least(self) -> Tensor:
        """What is taken off [..., runs]."""
        return self.dmin * self.low


@dataclass(frozen=True)
class KGrid:
    """One type: codes of `bits` bits, runs of `run` weights, and what the search for their scales looks like.

    `form` tells the range of codes and scales. `search`: where inverse steps begin and end around the one that reaches
    over a run, in tenths of a code, for types with lows.
    """

    name: str
    bits: int
    run: int
    size: int
    form: Form
    search: tuple[int, int] = (0, 0)

    block: ClassVar[int] = SUPER

    @property
    def offset(self) -> bool:
        """Whether runs have lows."""
        return self.form.lows > 0

    @property
    def bits_per_weight(self) -> float:
        """Its scales and lows counted in."""
        return self.size * 8 / SUPER

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether tensors of this type hold a grid's numbers exactly: those with the digits of float32 do."""
        return torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps

    def scales(self, blocks: Tensor, dtype: torch.dtype = torch.float32) -> KScales:
        """Those of blocks [..., 256] by the reference's search, each run by itself first."""
        runs = blocks.float().reshape(-1, self.run)
        search = self._with_lows if self.offset else self._thirds if self.bits == 3 else self._even
        parts = [search(part) for part in runs.split(RUNS)]
        shape = (*blocks.shape[:-1], SUPER // self.run)
        step, low = (torch.cat([p[n] for p in parts]).reshape(shape) for n in range(2))
        if self.offset:
            return self._offset_scales(step, low)
        top = step.gather(-1, step.abs().argmax(-1, keepdim=True))
        inverse = torch.where(top.abs() < EPS, 0.0, self.form.least_scale / top)
        d = torch.where(inverse == 0, 0.0, 1 / inverse).half().float()
        scale = (inverse * step).round().clamp(self.form.least_scale, self.form.most_scale)
        return KScales(d, torch.zeros_like(d), scale, torch.zeros_like(scale))

    def _offset_scales(self, step: Tensor, low: Tensor) -> KScales:
        """Steps and lows of runs, on common whole scales; d and dmin so that float32 holds all differences."""
        tops = step.amax(-1, keepdim=True), low.amax(-1, keepdim=True)
        most = self.form.most_scale, self.form.lows
        whole = [
            torch.where(top > 0, n / top * x, 0.0).round().clamp(0, n)
            for x, top, n in zip((step, low), tops, most, strict=True)
        ]
        d, dmin = (x.half() for x in (tops[0] / most[0], tops[1] / most[1]))
        reach = torch.maximum(d.double() * most[0] * self.form.most, dmin.double() * most[1])
        unit = torch.ldexp(torch.ones_like(reach), torch.frexp(reach).exponent - 24).clamp_min(UNIT)
        d, dmin = (((x.double() / unit).round() * unit).float() for x in (d, dmin))
        return KScales(d, dmin, *whole)

    def _with_lows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Step and low (taken off) [n] of runs [n, run]: of several inverse steps, each with the weighted least-squares
        line through its codes, the one of least weighted error. Weights |x|, for more than two bits plus the root of
        the mean of x²; errors of two bits are absolute, of more squared.
        """
        weight = x.abs() if self.bits == 2 else x.abs() + x.square().mean(-1, keepdim=True).sqrt()
        low, high = x.amin(-1, keepdim=True).clamp_max(0.0), x.amax(-1, keepdim=True)
        flat, most = high <= low, self.form.most
        high = torch.where(flat, low + 1, high)
        total, first = weight.sum(-1, keepdim=True), (weight * x).sum(-1, keepdim=True)

        def error(step: Tensor, low: Tensor, codes: Tensor) -> Tensor:
            off = step * codes + low - x
            return (weight * (off.abs() if self.bits == 2 else off.square())).sum(-1, keepdim=True)

        step = (high - low) / most
        codes = ((x - low) / step).round().clamp(0, most)
        best = error(step, low, codes)
        for tenth in range(self.search[0], self.search[1] + 1):
            codes = ((x - low) * ((most + 0.1 * tenth) / (high - low))).round().clamp_(0, most)
            weighted = weight * codes
            ones, squares = weighted.sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
            product = (weighted * x).sum(-1, keepdim=True)
            fixed = total * squares - ones * ones
            slope, start = (total * product - first * ones) / fixed, (squares * first - ones * product) / fixed
            slope = torch.where(start > 0, product / squares, slope)
            start = start.clamp_max(0.0)
            now = error(slope, start, codes)
            better = (fixed > 0) & (now < best)
            step, low, best = (torch.where(better, a, b) for a, b in ((slope, step), (start, low), (now, best)))
        return torch.where(flat, 0.0, step).squeeze(-1), -low.squeeze(-1)

    def _even(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Step [n], with its sign, of runs [n, run]: of inverse steps around the one by which the farthest number gets
        the lowest code, the one of least error weighted by x².
        """
        top = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        weight, none = x.square(), top.abs() < EPS
        top = torch.where(none, 1.0, top)
        step, best = torch.zeros_like(top), torch.full_like(top, -1.0)
        for tenth in (0, *range(-9, 0), *range(1, 10)):
            codes = ((self.form.least - 0.1 * tenth) / top * x).round().clamp_(self.form.least, self.form.most)
            product, squares = _sums(weight, x, codes)
            better = (squares > 0) & (product * product > best * squares)
            now = product / torch.where(squares > 0, squares, 1.0)
            step, best = torch.where(better, now, step), torch.where(better, now * product, best)
        return torch.where(none, 0.0, step).squeeze(-1), torch.zeros_like(step.squeeze(-1))

    def _thirds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Step [n], with its sign, of runs [n, run]: codes change one by one, five times through, where the error
        weighted by x² gets less.
        """
        top = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        none, least, most = top.abs() < EPS, self.form.least, self.form.most
        turned = x * torch.where(top < 0, 1.0, -1.0)
        weight = x.square()
        inverse = -least / torch.where(none, 1.0, top.abs())
        codes = (inverse * turned).round().clamp_(least, most)
        product, squares = _sums(weight, turned, codes)
        for _ in range(5):
            for n in range(self.run):
                w, at, code = weight[:, n : n + 1], turned[:, n : n + 1], codes[:, n : n + 1]
                up, down = product - w * at * code, squares - w * code * code
                new = (at * down / torch.where(up > 0, up, 1.0)).round().clamp_(least, most)
                ups, downs = up + w * at * new, down + w * new * new
                better = (up > 0) & (new != code) & (downs > 0) & (ups * ups * squares > product * product * downs)
                codes[:, n : n + 1] = torch.where(better, new, code)
                product, squares = torch.where(better, ups, product), torch.where(better, downs, squares)
        step = product / torch.where(squares > 0, squares, 1.0) * torch.where(top < 0, 1.0, -1.0)
        return torch.where(none, 0.0, step).squeeze(-1), torch.zeros_like(step.squeeze(-1))

    def codes(self, blocks: Tensor, scales: KScales) -> Tensor:
        """The codes of the grid's nearest numbers [..., 256], whole float32; 0 where a step is 0."""
        x = blocks.float().unflatten(-1, (-1, self.run))
        return self._codes(x, scales.step.unsqueeze(-1), scales.least.unsqueeze(-1)).flatten(-2)

    def _codes(self, x: Tensor, step: Tensor, least: Tensor) -> Tensor:
        found = ((x + least) / torch.where(step == 0, 1.0, step)).round()
        return torch.where(step == 0, 0.0, found.clamp(self.form.least, self.form.most))

    def nearest(self, blocks: Tensor, scales: KScales) -> Tensor:
        """The grid's nearest numbers [..., 256], float32."""
        codes = self.codes(blocks, scales).unflatten(-1, (-1, self.run))
        return (codes * scales.step.unsqueeze(-1) - scales.least.unsqueeze(-1)).flatten(-2)

    def nearest_at(self, values: Tensor, scales: KScales, place: int) -> Tensor:
        """The nearest numbers to values [..., 1] at a place of their blocks, float32."""
        at = slice(place // self.run, place // self.run + 1)
        step, least = scales.step[..., at], scales.least[..., at]
        return self._codes(values.float(), step, least) * step - least

    def rounded(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [..., inputs] rounded, float32; as they are where they lie on the grid."""
        if self.holds(rows):
            return rows.float()
        blocks = rows.unflatten(-1, (-1, SUPER))
        return self.nearest(blocks, self.scales(blocks, dtype)).flatten(-2)

    def packed(self, blocks: Tensor, scales: KScales) -> Tensor:
        """Bytes [..., size] of blocks [..., 256], rounded with these scales."""
        codes = (self.codes(blocks, scales) - self.form.least).to(torch.uint8)
        halves = [x.half().contiguous().view(torch.uint8) for x in (scales.d, scales.dmin)]
        return PACKS[self.name](codes, scales.scale.to(torch.int16), scales.low.to(torch.int16), *halves)

    def written(self, rows: Tensor) -> Tensor | None:
        """Bytes [..., bytes] of rows that lie on the grid; None where a number does not. They read as the rows."""
        blocks = rows.unflatten(-1, (-1, SUPER))
        scales = self.found(blocks)
        return None if scales is None else self.packed(blocks, scales).flatten(-2)

    def holds(self, rows: Tensor) -> bool:
        """Whether rows [n, inputs] lie on the grid."""
        if rows.shape[-1] % SUPER:
            return False
        first = -(-MANY * SUPER // rows.shape[-1])
        return all(self.found(some.unflatten(-1, (-1, SUPER))) is not None for some in (rows[:first], rows))

    def found(self, blocks: Tensor) -> KScales | None:
        """Scales by which blocks [..., 256] lie on the grid, number for number; None where there are none.

        Those of this file's own rounding are found, but for blocks whose numbers tell too little of them.
        """
        whole = blocks.double().reshape(-1, SUPER // self.run, self.run) / UNIT
        if not bool((whole == whole.round()).all()) or not bool((whole.abs() < 2.0**52).all()):
            return None
        parts = found(whole.long(), self.form)
        if parts is None:
            return None
        d, dmin = ((p.double() * UNIT).float().reshape(*blocks.shape[:-1], 1) for p in parts[:2])
        scale, low = (p.float().reshape(*blocks.shape[:-1], -1) for p in parts[2:])
        scales = KScales(d, dmin, scale, low)
        return scales if bool((self.nearest(blocks, scales).double() == blocks.double()).all()) else None


def _sums(weight: Tensor, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w x c and Σ w c² [n, 1]."""
    weighted = weight * codes
    return (weighted * x).sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)


KGRIDS = {
    grid.name: grid
    for grid in (
        KGrid("Q2_K", 2, 16, 84, Form(0, 3, 0, 15, 15), (-5, 10)),
        KGrid("Q3_K", 3, 16, 110, Form(-4, 3, -32, 31)),
        KGrid("Q4_K", 4, 32, 144, Form(0, 15, 0, 63, 63), (-10, 10)),
        KGrid("Q5_K", 5, 32, 176, Form(0, 31, 0, 63, 63), (-5, 10)),
        KGrid("Q6_K", 6, 16, 210, Form(-32, 31, -128, 127)),
    )
}
"""GGUF's name → the grid, the fewest bits first."""
INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""The type that llama.cpp falls back to where inputs are no multiple of 256."""
