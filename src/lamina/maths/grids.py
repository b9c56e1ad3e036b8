"""Grids of llama.cpp: 32 weights share a step (and a lowest value), and each has a code of four, five or eight bits.

Of the GGUF types, Q4_0, Q5_0 and Q8_0 hold step · code, Q4_1 and Q5_1 low + step · code; step and low are float16.
Rounding to nearest does what ggml's reference quantisers do, in float32 and in their order, and gives their bytes.
`GRIDS` holds those of `kquants` too, whose blocks are longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lamina.maths.kquants import KGRIDS, KGrid

BLOCK = 32
"""Weights that share a step; a run along a map's inputs."""
HELD = 11
"""Significant binary digits of a float16."""
LEAST = 2.0**-24
"""The smallest step that float16 holds."""
LARGEST = 65504.0
"""The largest number that float16 holds."""


@dataclass(frozen=True)
class Scales:
    """Of blocks [..., 32], tensors [..., 1], float32: a code c stands for step · c + low.

    The code of a value is (value - start) · inverse, rounded. As in ggml these are taken before step and low are
    rounded to float16.
    """

    step: Tensor
    low: Tensor
    inverse: Tensor
    start: Tensor

    @classmethod
    def of(cls, step: Tensor, low: Tensor | None = None) -> Self:
        """Rounded to float16, and codes taken with what that leaves."""
        step = step.half().float()
        low = torch.zeros_like(step) if low is None else low.half().float()
        return cls(step, low, _inverse(step), low)


@dataclass(frozen=True)
class Grid:
    """One type: codes from `least` to `most`, and whether a block has a lowest value of its own."""

    name: str
    bits: int
    offset: bool = False

    block: ClassVar[int] = BLOCK

    @property
    def least(self) -> int:
        """The lowest code."""
        return 0 if self.offset else -127 if self.bits == 8 else -(1 << self.bits - 1)

    @property
    def most(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1 if self.offset else (1 << self.bits - 1) - 1

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return (BLOCK * self.bits + 16 * (1 + self.offset)) // 8

    @property
    def bits_per_weight(self) -> float:
        """Its steps and lowest values counted in."""
        return self.size * 8 / BLOCK

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether tensors of this type hold a grid's numbers exactly, given steps of few enough digits."""
        return not self._coarse(dtype) or (not self.offset and self._digits(dtype) >= 1)

    def _digits(self, dtype: torch.dtype) -> int:
        """Digits that a step may have, so that step · code has no more than the type holds."""
        return digits(dtype) - self.most.bit_length()

    def _coarse(self, dtype: torch.dtype) -> bool:
        return digits(dtype) < 24 if self.offset else self._digits(dtype) < HELD

    def scales(self, blocks: Tensor, dtype: torch.dtype = torch.float32) -> Scales:
        """Those of rounding to nearest, of blocks [..., 32]; ggml's, where tensors of type `dtype` hold all of float32.

        Of a narrower type, step · code must survive: the steps have fewer digits, in bfloat16 five of Q4_0, four of
        Q5_0 and one (powers of two) of Q8_0. Of the two nearest such steps, a block has the one of less squared error,
        and where it lies on a grid already, a step of that grid. Such a type `fits` no grid with lowest values.
        """
        natural = self._natural(blocks.float())
        return self._shortened(blocks, natural, self._digits(dtype)) if self._coarse(dtype) else natural

    def extent(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Step and lowest value [..., 1] that reach over blocks [..., 32], not rounded; can be differentiated."""
        if self.offset:
            low = blocks.amin(-1, keepdim=True)
            return (blocks.amax(-1, keepdim=True) - low) / self.most, low
        if self.bits == 8:
            step = blocks.abs().amax(-1, keepdim=True) / self.most
        else:
            step = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / self.least
        return step, torch.zeros_like(step)

    def _natural(self, x: Tensor) -> Scales:
        step, start = self.extent(x)
        return Scales(step.half().float(), start.half().float(), _inverse(step), start)

    def held(self, step: Tensor, low: Tensor, dtype: torch.dtype = torch.float32) -> Scales:
        """Scales of any step and lowest value, rounded so that tensors of type `dtype` hold what they make."""
        if self._coarse(dtype):
            unit = _unit(step.double(), self._digits(dtype))
            step = ((step / unit).round() * unit).float()
        return Scales.of(step, low if self.offset else None)

    def _shortened(self, blocks: Tensor, natural: Scales, keep: int) -> Scales:
        """Steps of `keep` digits."""
        wanted = torch.where(natural.inverse == 0, 0.0, 1 / natural.inverse.double())
        unit = _unit(wanted, keep)
        shorter = wanted.sign() * (wanted.abs() / unit).floor() * unit
        below, above = (Scales.of(s) for s in (shorter, shorter + wanted.sign() * unit))
        worse = self._squared(blocks, above) < self._squared(blocks, below)
        step = torch.where(worse, above.step, below.step)
        common, _, there = self._common(blocks)
        return Scales.of(torch.where(there, common, step))

    def _squared(self, blocks: Tensor, scales: Scales) -> Tensor:
        return (self.nearest(blocks, scales).double() - blocks.double()).square().sum(-1, keepdim=True)

    def codes(self, values: Tensor, scales: Scales) -> Tensor:
        """The codes of the grid's nearest numbers, whole float32, of values that stand against the scales' shape."""
        x = (values.float() - scales.start) * scales.inverse
        if self.bits == 8:
            size = x.abs()
            down = size.floor()
            return (x.sign() * (down + (2 * (size - down)).floor())).clamp(self.least, self.most)
        return (x + (0.5 - self.least)).trunc().clamp(0, self.most - self.least) + self.least

    def nearest(self, values: Tensor, scales: Scales) -> Tensor:
        """The grid's nearest numbers, float32."""
        return self.codes(values, scales) * scales.step + scales.low

    def nearest_at(self, values: Tensor, scales: Scales, place: int) -> Tensor:
        """The nearest numbers to values [..., 1] at a place of their blocks, float32."""
        return self.nearest(values, scales)

    def rounded(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [..., inputs] rounded to nearest, float32; `dtype` is what is to hold them, see `scales`."""
        blocks = blocks_of(rows)
        return self.nearest(blocks, self.scales(blocks, dtype)).flatten(-2)

    def packed(self, blocks: Tensor, scales: Scales) -> Tensor:
        """Bytes [..., size] of blocks [..., 32], rounded to nearest with these scales."""
        codes = self.codes(blocks, scales)
        parts = [scales.step.half().contiguous().view(torch.uint8)]
        if self.offset:
            parts.append(scales.low.half().contiguous().view(torch.uint8))
        if self.bits == 8:
            return torch.cat([*parts, codes.to(torch.int8).contiguous().view(torch.uint8)], -1)
        whole = (codes - self.least).to(torch.uint8)
        if self.bits == 5:
            places = 1 << torch.arange(8, device=whole.device)
            parts.append(((whole >> 4).unflatten(-1, (-1, 8)) * places).sum(-1).to(torch.uint8))
        low, high = (whole & 15).unflatten(-1, (2, -1)).unbind(-2)
        return torch.cat([*parts, low | high << 4], -1)

    def written(self, rows: Tensor) -> Tensor | None:
        """Bytes [..., bytes] of rows that lie on the grid, whoever chose it; None where a number does not.

        What is read from them is the rows, number for number.
        """
        blocks = blocks_of(rows)
        scales = self.found(blocks)
        return None if scales is None else self.packed(blocks, scales).flatten(-2)

    def holds(self, rows: Tensor) -> bool:
        """Whether rows [n, inputs] lie on the grid."""
        if rows.shape[-1] % BLOCK:
            return False
        return all(self.found(blocks_of(some)) is not None for some in (rows[:1], rows))

    def found(self, blocks: Tensor) -> Scales | None:
        """Scales by which blocks [..., 32] lie on the grid, number for number; None where there are none.

        Those of rounding to nearest where they do, else what the numbers of a block have in common. A block whose
        spread is less than about 1/4000 of its lowest value may not be told.
        """
        natural = self._natural(blocks.float())
        off = (self.nearest(blocks, natural).double() != blocks.double()).any(-1)
        if not bool(off.any()):
            return natural
        step, low, there = self._common(blocks[off], every=True)
        if not bool(there.all()):
            return None
        parts = Scales.of(step, low)
        held = {name: tensor.clone() for name, tensor in vars(natural).items()}
        for name, tensor in held.items():
            tensor[off] = getattr(parts, name)
        return Scales(**held)

    def _common(self, blocks: Tensor, *, every: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Of each block a step and a lowest value by which it lies on the grid, and whether there are any [..., 1].

        On a grid, a block's numbers (from its lowest) are whole multiples of a step of 11 digits: so their greatest
        common divisor is, by a factor that no code exceeds. `every`: give up where one block does not lie on it.
        """
        x = blocks.double()
        low = x.amin(-1, keepdim=True) if self.offset else torch.zeros_like(x[..., :1])
        top = (x - low).abs().amax(-1, keepdim=True)
        unit = torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent - 24).clamp_min(LEAST**2)
        whole = (x - low) / unit
        biggest = _divisors(whole, (top / unit / (self.most - self.least)).squeeze(-1)).unsqueeze(-1) * unit
        alive = (whole == whole.round()).all(-1, keepdim=True) & (top <= biggest * (self.most - self.least))
        step, there = torch.zeros_like(biggest), torch.zeros_like(alive)
        if every and not bool(alive.all()):
            return step, low, there
        lowest = low.clone()
        for share, place in self._guesses():
            rest = (alive & ~there & (top * abs(share) <= biggest * (self.most - self.least))).squeeze(-1)
            if not bool(rest.any()):  # nor is there any for a smaller step
                break
            size = biggest[rest] / share
            guess = Scales.of(size, low[rest] - place * size if self.offset else None)
            same = (self.nearest(x[rest], guess).double() == x[rest]).all(-1, keepdim=True)
            step[rest] = torch.where(same, guess.step.double(), step[rest])
            lowest[rest] = torch.where(same, guess.low.double(), lowest[rest])
            there[rest] = same
        return step, lowest, there

    def _guesses(self) -> list[tuple[int, int]]:
        """How many steps the common divisor is, with its sign, and the code of the lowest value."""
        if self.offset:
            return [(n, a) for n in range(1, self.most + 1) for a in range(self.most)]
        return [(sign * n, 0) for n in range(1, -self.least + 1) for sign in (1, -1)]


AnyGrid = Grid | KGrid


def compensated(weight: Tensor, moment: Tensor, grid: AnyGrid, dtype: torch.dtype, damping: float = 0.01) -> Tensor:
    """A weight [outputs, inputs] on the grid, rounded input by input; those to come make up for each error (GPTQ).

    `moment` Σ x xᵀ [inputs, inputs] of the inputs, raised by `damping` of its mean diagonal; its scale does not matter.
    With moment⁻¹ = Uᵀ U, U upper triangular, an error e of input j takes e U_jk / U_jj from every later input k. A
    block's scales are those of its weights when its turn comes. Float64, [outputs, inputs].
    """
    upper = _inverse_factor(moment, damping)
    left, made = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for start in range(0, weight.shape[1], grid.block):
        stop = start + grid.block
        block, within = left[:, start:stop].clone(), upper[start:stop, start:stop]
        scales: Any = grid.scales(block, dtype)
        errors = torch.empty_like(block)
        for j in range(grid.block):
            rounded = grid.nearest_at(block[:, j : j + 1], scales, j).double()
            made[:, start + j : start + j + 1] = rounded
            errors[:, j : j + 1] = (block[:, j : j + 1] - rounded) / within[j, j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * within[j, j + 1 :]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return made


def _inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with moment⁻¹ = Uᵀ U of the damped moment; of the identity where no input was ever used."""
    level = float(moment.diagonal().mean()) if len(moment) else 0.0
    eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    damped = moment.double() + damping * level * eye if level > 0 else eye
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)


def digits(dtype: torch.dtype) -> int:
    """Significant binary digits of a floating-point type: 24 of float32, 11 of float16, 8 of bfloat16."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def blocks_of(rows: Tensor) -> Tensor:
    """Rows [..., inputs] as blocks [..., inputs / 32, 32]."""
    return rows.unflatten(-1, (-1, BLOCK))


def _unit(numbers: Tensor, keep: int) -> Tensor:
    """What the last of so many digits is worth, in float16 at least its least number."""
    return torch.ldexp(torch.ones_like(numbers), torch.frexp(numbers).exponent - keep).clamp_min(LEAST)


def _divisors(whole: Tensor, least: Tensor) -> Tensor:
    """Greatest common divisors, float64 [...], of whole numbers [..., n]; 0 where they are below `least` [...].

    Few blocks of weights that lie on no grid have more than some numbers in common: the others are soon left out.
    """
    rows, floor = whole.round().long().flatten(0, -2), least.flatten()
    found = torch.zeros_like(floor)
    left = torch.arange(len(rows), device=rows.device)
    divisor = rows[:, 0]
    for place in range(1, rows.shape[-1]):
        divisor = torch.gcd(divisor, rows[left, place])
        if place % 4 == 0:
            alive = (divisor == 0) | (divisor.double() >= floor[left] * (1 - 1e-9))
            left, divisor = left[alive], divisor[alive]
    found[left] = divisor.double()
    return found.reshape(least.shape)


def _inverse(step: Tensor) -> Tensor:
    """1 / step; 0 of a step that is 0, or too small to have an inverse."""
    found = 1 / step
    return torch.where(torch.isfinite(found), found, 0.0)


SIMPLE = (
    Grid("Q4_0", 4),
    Grid("Q4_1", 4, offset=True),
    Grid("Q5_0", 5),
    Grid("Q5_1", 5, offset=True),
    Grid("Q8_0", 8),
)
GRIDS: dict[str, AnyGrid] = {
    grid.name: grid for grid in sorted((*SIMPLE, *KGRIDS.values()), key=lambda grid: grid.bits_per_weight)
}
"""GGUF's name → the grid, the fewest bits first."""
