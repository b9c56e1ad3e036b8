"""Tests of a difference between two models that answered the same items, and the smallest loss that they can see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lamina.maths.bootstrap import Interval

Array = NDArray[np.float64]
POWER = 0.8
"""Share of runs in which a loss of the size told is found."""
DRAWS = 100_000
"""Random flips where not all can be counted."""
CELLS = 4_000_000
"""Signs held at once."""


def mcnemar(worse: int, better: int) -> float:
    """Two-sided p value that `worse` items lost and `better` items won are draws of a fair coin (exact McNemar).

    Items that both models got, or that neither did, tell nothing of the difference and don't enter.
    """
    from scipy.stats import binom

    if worse < 0 or better < 0:
        raise ValueError(f"counts are not negative: {worse} and {better}")
    return float(min(1.0, 2 * binom.cdf(min(worse, better), worse + better, 0.5)))


def flipped(sums: ArrayLike, *, seed: int, draws: int = DRAWS) -> float:
    """Two-sided p value of Σ `sums` [units] if each unit's sign is a fair coin: the models may change places in it.

    A unit is an item, or the sum over items that share a text. Whole numbers are counted exactly; for others `draws`
    random flips give at least 1 / (1 + draws). With sums of -1, 0 and 1 this is the exact McNemar test.
    """
    found = np.asarray(sums, dtype=np.float64)
    sizes, total = np.abs(found[found != 0]), abs(found.sum())
    if not len(sizes):
        return 1.0
    if np.array_equal(sizes, np.rint(sizes)) and sizes.sum() <= 100_000:
        return _counted(sizes.astype(int), int(total))
    generator, beyond = np.random.default_rng(seed), 0
    part = max(1, CELLS // len(sizes))
    edge = total - 1e-9 * sizes.sum()
    for start in range(0, draws, part):
        signs = generator.integers(0, 2, (min(part, draws - start), len(sizes)), dtype=np.int8)
        beyond += int((np.abs((2.0 * signs - 1) @ sizes) >= edge).sum())
    return (1 + beyond) / (1 + draws)


def _counted(sizes: NDArray[np.int64], total: int) -> float:
    """The same, by the exact distribution of Σ ±size: its place p stands for the sum 2p - Σ sizes."""
    shares = np.ones(1)
    for size in sizes:
        shares = (np.pad(shares, (0, size)) + np.pad(shares, (size, 0))) / 2
    values = np.abs(2 * np.arange(len(shares)) - int(sizes.sum()))
    return float(min(1.0, shares[values >= total].sum()))


def holm(values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm): the chance of even one false finding stays below the level."""
    corrected, most = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        most = max(most, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = most
    return corrected


def wilson(hits: float, count: int, *, level: float = 0.95) -> Interval:
    """Wilson's interval of a share of `count` items, of which `hits` were right."""
    from scipy.special import ndtri

    if count < 1 or not 0 <= hits <= count:
        raise ValueError(f"{hits} of {count} is no share")
    z = float(ndtri((1 + level) / 2))
    share = hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, min(share, float(middle - half))), min(1.0, max(share, float(middle + half)))


def error(sums: ArrayLike, counts: ArrayLike) -> float:
    """Standard error of Σ sums / Σ counts over independent units [units]; infinite for a single unit."""
    s, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if len(s) < 2:
        return float("inf")
    left = s - n * (s.sum() / n.sum())
    return float(np.sqrt(np.sum(left**2) * len(s) / (len(s) - 1)) / n.sum())


def power(count: int, discordance: float, loss: float, *, alpha: float) -> float:
    """How often the exact McNemar test at `alpha` finds a loss of the share `loss` of `count` items.

    `discordance` is the share of items on which the models differ; of a greater loss, all differ that way.
    """
    from scipy.stats import binom

    differ = max(discordance, loss)
    if differ <= 0:
        return 0.0
    lean = (1 + loss / differ) / 2
    pairs = np.arange(count + 1)
    chance = binom.pmf(pairs, count, min(differ, 1.0))
    pairs, chance = pairs[chance > 1e-12], chance[chance > 1e-12]
    most = binom.ppf(alpha / 2, pairs, 0.5)  # the smallest k with P(better <= k) >= alpha / 2
    most = np.where(2 * binom.cdf(most, pairs, 0.5) <= alpha, most, most - 1)
    return float(np.sum(chance * binom.cdf(most, pairs, 1 - lean)))


def visible(count: int, discordance: float, *, alpha: float) -> float | None:
    """The smallest loss that McNemar's test at `alpha` finds with 80 % power; None where there is no such loss."""
    if power(count, discordance, 1.0, alpha=alpha) < POWER:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if power(count, discordance, middle, alpha=alpha) >= POWER else (middle, high)
    return high


def visible_mean(standard_error: float, *, alpha: float) -> float | None:
    """The smallest change of a mean that a two-sided test at `alpha` finds with 80 % power; None where none is."""
    from scipy.special import ndtri

    if not np.isfinite(standard_error):
        return None
    return float(ndtri(1 - alpha / 2) + ndtri(POWER)) * standard_error


def lower(mean: float, own: float, rest: float, others: float) -> float:
    """One-sided p value that `mean` lies no lower than `rest`, of their standard errors `own` and `others` (normal)."""
    from scipy.special import ndtr

    spread = float(np.hypot(own, others))
    if not np.isfinite(spread):
        return 1.0
    if spread == 0:
        return 0.0 if mean < rest else 1.0
    return float(ndtr((mean - rest) / spread))
