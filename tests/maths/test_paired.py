"""Paired tests against sums over all cases in plain Python, and the power that is told against simulated runs."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.maths.paired import (
    error,
    flipped,
    holm,
    lower,
    mcnemar,
    power,
    visible,
    visible_mean,
    wilson,
)


def literal_mcnemar(worse: int, better: int) -> float:
    """All outcomes of fair coins that are as far from even as this one."""
    n, far = worse + better, abs(worse - better)
    hits = sum(math.comb(n, k) for k in range(n + 1) if abs(n - 2 * k) >= far)
    return float(Fraction(hits, 2**n))


@pytest.mark.parametrize("worse", range(0, 24, 3))
@pytest.mark.parametrize("better", range(0, 24, 4))
def test_mcnemar_is_the_binomial_sum(worse: int, better: int) -> None:
    assert mcnemar(worse, better) == pytest.approx(literal_mcnemar(worse, better), rel=1e-12)


def test_mcnemar_of_nothing_and_of_nonsense() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(6, 0) == 2 / 64
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 2)


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_flips_of_whole_numbers_are_counted(sums: list[int]) -> None:
    every = [
        sum(s * v for s, v in zip(signs, sums, strict=True)) for signs in itertools.product((1, -1), repeat=len(sums))
    ]
    share = sum(abs(total) >= abs(sum(sums)) for total in every) / len(every)
    assert flipped(sums, seed=0) == pytest.approx(share, rel=1e-12)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_flips_of_single_items_are_mcnemars_test(worse: int, better: int, ties: int) -> None:
    assert flipped([-1] * worse + [1] * better + [0] * ties, seed=0) == pytest.approx(mcnemar(worse, better), rel=1e-9)


def test_flips_of_real_numbers_are_drawn() -> None:
    values = np.random.default_rng(3).normal(0.35, 1, 12)
    every = np.array(list(itertools.product((1, -1), repeat=12))) @ values
    share = float(np.mean(np.abs(every) >= abs(values.sum()) - 1e-12))
    assert 0.01 < share < 0.9
    assert flipped(values, seed=1) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 100_000))
    assert flipped(values, seed=1) == flipped(values, seed=1) == flipped(-values, seed=1)
    assert flipped(np.full(40, 0.5) + 1e-3 * np.arange(40), seed=0) == 1 / 100_001
    assert flipped([0.0, 0.0], seed=0) == flipped([], seed=0) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_step_by_step(values: list[float], level: float) -> None:
    """The definition: from the smallest p value on, reject while it is at most level / (number left)."""
    rejected: set[int] = set()
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        if values[place] * (len(values) - rank) > level:
            break
        rejected.add(place)
    assert {i for i, p in enumerate(holm(values)) if p <= level} == rejected


def test_holm_keeps_order_and_single_values() -> None:
    assert holm([0.03]) == [0.03]
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilsons_bounds_are_where_the_share_is_just_surprising(count: int, where: float) -> None:
    hits = round(where * count)
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(hits / count - bound) == pytest.approx(
                1.959964 * math.sqrt(bound * (1 - bound) / count), rel=1e-5
            )


def test_wilson_refuses_what_is_no_share() -> None:
    for hits, count in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="no share"):
            wilson(hits, count)


def test_the_error_of_a_mean() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(0, 2, 60)
    assert error(values, np.ones(60)) == pytest.approx(np.std(values, ddof=1) / math.sqrt(60))
    assert error([1.0], [2]) == math.inf
    counts = draw.integers(1, 6, 4000)
    sums = np.array([draw.normal(draw.normal(0, 1), 1, c).sum() for c in counts])
    means = [sums[p].sum() / counts[p].sum() for p in (draw.integers(0, 4000, 4000) for _ in range(400))]
    assert error(sums, counts) == pytest.approx(np.std(means), rel=0.12)


def literal_power(count: int, discordance: float, loss: float, alpha: float) -> float:
    """Every number of lost and won items with its multinomial chance; those that McNemar calls a loss."""
    differ = max(discordance, loss)
    lost, won = (differ + loss) / 2, (differ - loss) / 2
    total = 0.0
    for worse in range(count + 1):
        for better in range(count + 1 - worse):
            if worse > better and literal_mcnemar(worse, better) <= alpha:
                ways = math.comb(count, worse) * math.comb(count - worse, better)
                total += ways * lost**worse * won**better * (1 - differ) ** (count - worse - better)
    return total


@pytest.mark.parametrize(("discordance", "loss"), [(0.3, 0.2), (0.3, 0.0), (0.0, 0.25), (0.1, 0.4), (0.6, 0.5), (1, 1)])
@pytest.mark.parametrize("alpha", [0.05, 0.004])
def test_power_is_the_sum_over_all_outcomes(discordance: float, loss: float, alpha: float) -> None:
    expected = literal_power(24, discordance, loss, alpha)
    assert power(24, discordance, loss, alpha=alpha) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("count", "discordance", "alpha"), [(500, 0.2, 0.05), (500, 0.05, 0.005), (200, 0.0, 0.01)])
def test_at_the_told_loss_four_simulated_runs_in_five_find_it(count: int, discordance: float, alpha: float) -> None:
    loss = visible(count, discordance, alpha=alpha)
    assert loss is not None
    differ = max(discordance, loss)
    draws = np.random.default_rng(5).multinomial(count, [(differ + loss) / 2, (differ - loss) / 2, 1 - differ], 4000)
    found = [w > b and mcnemar(int(w), int(b)) <= alpha for w, b, _ in draws]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    assert power(count, discordance, loss * 0.9, alpha=alpha) < 0.8


def test_too_few_items_see_no_loss_at_all() -> None:
    assert visible(5, 0.5, alpha=0.05) is None
    assert visible(6, 0.0, alpha=0.05) is not None
    assert visible(6, 0.0, alpha=0.01) is None
    assert power(50, 0.0, 0.0, alpha=0.05) == 0.0


def test_a_loss_of_a_mean_is_found_as_often_as_told() -> None:
    draw, alpha = np.random.default_rng(7), 0.01
    loss = visible_mean(1.5 / math.sqrt(200), alpha=alpha)
    assert loss is not None
    runs = [draw.normal(-loss, 1.5, 200) for _ in range(500)]
    found = [r.sum() < 0 and flipped(r, seed=n, draws=4000) <= alpha for n, r in enumerate(runs)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)
    assert visible_mean(math.inf, alpha=alpha) is None


def test_lower_than_the_rest() -> None:
    assert lower(-1.0, 0.0, 0.0, 0.5) == pytest.approx(0.02275, abs=1e-5)
    assert lower(-1.0, 0.3, 0.0, 0.4) == pytest.approx(0.02275, abs=1e-5)
    assert lower(0.0, 1.0, 0.0, 1.0) == 0.5
    assert lower(-1.0, 0.0, 0.0, 0.0) == 0.0
    assert lower(0.0, 0.0, 0.0, 0.0) == 1.0
    assert lower(-9.0, math.inf, 0.0, 0.1) == 1.0
