"""Find d, dmin, scales and lows from numbers alone: whole multiples of float16's smallest step, in runs of blocks.

Numbers of a block are d · scale · code - dmin · low. Differences within a run are multiples of d · scale, so greatest
common divisors tell d and the scales, by small factors; then the least numbers tell dmin and the lows, where the
largest low is that of the range, as rounding makes it. Guesses are tried on the blocks that none before has served.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTORS = 16
"""By which the common divisor of a block may be more than its d."""
BLOCKS = 1 << 8
"""That are looked at together."""
MANY = 16
"""Blocks of which the usual guess hits some, where they lie on the grid."""
LARGEST = 65504 << 24
"""Of float16's numbers, in its smallest steps."""


@dataclass(frozen=True)
class Form:
    """The ranges of codes and whole scales, and the largest low; 0 where there are none."""

    least: int
    most: int
    least_scale: int
    most_scale: int
    lows: int = 0


Parts = tuple[Tensor, Tensor, Tensor, Tensor]
"""d and dmin [n], scales and lows [n, runs], int64; d and dmin in float16's smallest steps."""


@dataclass(frozen=True)
class Facts:
    """Of blocks' runs [n, runs]: the greatest common divisor of the numbers (with lows: of their differences from the
    least), the least and largest number, and whether these are one.
    """

    divisor: Tensor
    low: Tensor
    high: Tensor
    flat: Tensor

    def __getitem__(self, which: Tensor) -> Facts:
        return Facts(*(x[which] for x in vars(self).values()))

    @classmethod
    def of(cls, numbers: Tensor, form: Form) -> Facts:
        """Of blocks [n, runs, run]. Of a run of equal numbers above 0, a 0 counts as one of them."""
        low, high = numbers.amin(-1), numbers.amax(-1)
        flat = low == high
        if not form.lows:
            return cls(_gcd(numbers), low, high, flat)
        low = torch.where(flat & (low > 0), 0, low)
        return cls(_gcd(torch.cat([numbers - low.unsqueeze(-1), (high - low).unsqueeze(-1)], -1)), low, high, flat)


def found(numbers: Tensor, form: Form) -> Parts | None:
    """What makes blocks [n, runs, run] of whole numbers; None where no guess hits one of them."""
    parts = list[Parts]()
    for some in numbers.split(BLOCKS):
        made = _search(Facts.of(some, form), form)
        if made is None:
            return None
        parts.append(made)
    joined = [torch.cat([p[n] for p in parts]) for n in range(4)]
    return joined[0], joined[1], joined[2], joined[3]


def _search(facts: Facts, form: Form) -> Parts | None:
    """Guesses in turn, each on the blocks that are left; of many the rarer ones only where the usual one hits some."""
    count, runs = facts.low.shape
    blank = facts.low.new_zeros
    held = blank(count), blank(count), blank(count, runs), blank(count, runs)
    left = torch.arange(count, device=facts.low.device)
    told = (facts.high != facts.low).any(-1)
    for deep in (False, True):
        if deep and int(told.sum()) >= MANY and bool(told[left].sum() == told.sum()):
            return None
        for d_guess in range(2 * (FACTORS + runs * (form.most - form.least)) if deep else 2):
            d = _d(facts[left], form, d_guess)
            for low_guess in range(1 + runs * (form.most + 1) if deep and form.lows else 1):
                rows = (d != 0).nonzero().squeeze(1)
                if not len(rows):
                    break
                made = _made(facts[left[rows]], form, d[rows], low_guess - 1, deep)
                hit = made[-1]
                for whole, part in zip(held, (d[rows], *made[:-1]), strict=True):
                    whole[left[rows[hit]]] = part[hit]
                keep = torch.ones_like(left, dtype=torch.bool)
                keep[rows[hit]] = False
                left, d = left[keep], d[keep]
            if not len(left):
                return held
    return None


def _d(facts: Facts, form: Form, guess: int) -> Tensor:
    """A guess [n] of d: a part of the common divisor, or of that of a run which has the largest scale; 0 where it is
    none. Every other guess is below 0, where scales may be. Of blocks without differences any will do.
    """
    sign, guess = 1 - 2 * (guess % 2), guess // 2
    if form.lows and sign < 0:
        return torch.zeros_like(facts.low[:, 0])
    if guess < FACTORS:
        common = _gcd(facts.divisor)
        return sign * torch.where(common == 0, 1, _part(common, guess + 1))
    run, code = (guess - FACTORS) % facts.low.shape[1], (guess - FACTORS) // facts.low.shape[1] + 1
    return sign * _part(facts.divisor[:, run], max(form.most_scale, -form.least_scale) * code)


def _made(facts: Facts, form: Form, d: Tensor, guess: int, deep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dmin [n], scales and lows [n, runs], and of which blocks they make all numbers [n]."""
    if not form.lows:
        scale, fits = _even(facts, form, d)
        return torch.zeros_like(d), scale, torch.zeros_like(scale), fits
    dmin = _dmin(facts, form, guess)
    scale, low, fits = _lowered(facts, form, d, dmin.clamp_min(0), deep)
    return dmin, scale, low, fits & (dmin >= 0)


def _dmin(facts: Facts, form: Form, guess: int) -> Tensor:
    """A guess [n] of dmin: a run (first the one with the least number) has the largest low, and a least code; -1 where
    it is none. 0 where no number is below 0.
    """
    if guess < 0:
        low, step, code = facts.low.amin(-1), 0, 0
    else:
        run, code = guess // (form.most + 1), guess % (form.most + 1)
        low, step = facts.low[:, run], facts.divisor[:, run]
    found = _part(code * step - low, form.lows)
    found = torch.where(found == 0, -1, found)
    return torch.where(facts.low.amin(-1) >= 0, 0, found) if guess < 0 else found


def _even(facts: Facts, form: Form, d: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [n, runs], and of which blocks they make all numbers [n]."""
    factor = torch.arange(1, 1 - form.least, device=d.device)
    scale, whole = _scales(facts, d.abs(), factor)
    reach, low, high = d.abs()[:, None, None] * scale, facts.low.unsqueeze(-1), facts.high.unsqueeze(-1)
    turned = d[:, None, None] < 0
    up = whole & (high <= form.most * reach) & (low >= form.least * reach)
    up &= scale <= torch.where(turned, -form.least_scale, form.most_scale)
    down = whole & (high <= -form.least * reach) & (low >= -form.most * reach)
    down &= scale <= torch.where(turned, form.most_scale, -form.least_scale)
    picked, fits = _first(up | down, torch.where(up == turned, -scale, scale))
    return picked, fits.all(-1)


def _lowered(facts: Facts, form: Form, d: Tensor, dmin: Tensor, deep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and lows [n, runs], and of which blocks they make all numbers [n]; `deep`: scales may be parts too."""
    factor = torch.arange(1, form.most + 1 if deep else 2, device=d.device)
    code = torch.arange(form.most + 1, device=d.device)
    scale, whole = (x.unsqueeze(-1) for x in _scales(facts, d, factor))
    reach, low, high = d[:, None, None, None] * scale, facts.low[..., None, None], facts.high[..., None, None]
    least, each = code * reach - low, dmin[:, None, None, None]
    made = torch.where(each > 0, least // each.clamp_min(1), 0)
    fits = whole & (scale <= form.most_scale) & (high - low + code * reach <= form.most * reach)
    fits = fits & (made >= 0) & (made <= form.lows) & (made * each == least)
    scale, low, good = _both(fits, scale, made)
    if deep and not bool(good.all()):
        others = _flat(facts, form, d, dmin)
        use = facts.flat & others[2] & ~good
        scale, low = (torch.where(use, b, a) for a, b in zip((scale, low), others[:2], strict=True))
        good = good | use
    return scale, low, good.all(-1)


def _flat(facts: Facts, form: Form, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and lows [n, runs] of runs of one number, whatever its code, and whether there are any."""
    code = torch.arange(1, form.most + 1, device=d.device).unsqueeze(-1)
    low = torch.arange(form.lows + 1, device=d.device)
    above = facts.high[..., None, None] + dmin[:, None, None, None] * low
    unit = d[:, None, None, None] * code
    scale = above // unit
    return _both((above >= 0) & (above % unit == 0) & (scale <= form.most_scale), scale, low)


def _both(fits: Tensor, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first scale and low that fit [n, runs] of [n, runs, m, l], and whether there are any."""
    shape = fits.shape
    picked, good = _first(fits.flatten(2), scale.expand(shape).flatten(2))
    return picked, _first(fits.flatten(2), low.expand(shape).flatten(2))[0], good


def _scales(facts: Facts, d: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Of each run [n, runs, factors] its divisor over d and a factor, and whether that is whole."""
    unit = d[:, None, None] * factor
    divisor = facts.divisor.unsqueeze(-1)
    return divisor // unit, divisor % unit == 0


def _first(fits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The first value that fits [n, runs] of [n, runs, m], and whether there is one."""
    place = fits.to(torch.uint8).argmax(-1, keepdim=True)
    return values.gather(-1, place).squeeze(-1), fits.any(-1)


def _part(numbers: Tensor, share: int) -> Tensor:
    """A share of whole numbers; 0 where it is not whole, or no number of float16 above 0."""
    part = numbers // share
    odd = part // (part & -part).clamp_min(1)
    return torch.where((numbers % share == 0) & (part > 0) & (odd < 1 << 11) & (part <= LARGEST), part, 0)


def _gcd(numbers: Tensor) -> Tensor:
    """Greatest common divisors along the last dimension; 0 of zeros."""
    numbers = numbers.abs()
    while (count := numbers.shape[-1]) > 1:
        half = count // 2
        paired = torch.gcd(numbers[..., :half], numbers[..., half : 2 * half])
        numbers = torch.cat([paired, numbers[..., 2 * half :]], -1)
    return numbers.squeeze(-1)
