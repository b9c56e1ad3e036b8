"""Bootstrap intervals against scipy's, a literal second version, and their own promise of coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lamina.maths import bootstrap


def test_equal_counts_give_scipys_bca_of_the_mean() -> None:
    values = np.random.default_rng(3).lognormal(size=40)
    want = stats.bootstrap((values,), np.mean, n_resamples=60_000, method="BCa", rng=np.random.default_rng(1))
    low, high = bootstrap.ratio_interval(values * 7, np.full(40, 7.0), seed=0, resamples=60_000)  # type: ignore[misc]
    width = want.confidence_interval.high - want.confidence_interval.low
    assert abs(low - want.confidence_interval.low) < 0.02 * width
    assert abs(high - want.confidence_interval.high) < 0.02 * width


def test_the_ratio_is_of_sums_and_not_a_mean_of_ratios() -> None:
    sums, counts = np.array([1.0, 100.0, 3.0, 120.0]), np.array([1.0, 50.0, 1.0, 60.0])
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        picks = generator.integers(0, 4, 4)
        drawn.append(sum(sums[i] for i in picks) / sum(counts[i] for i in picks))
    left_out = [(sums.sum() - s) / (counts.sum() - n) for s, n in zip(sums, counts, strict=True)]
    want = bootstrap.bca(np.array(drawn), sums.sum() / counts.sum(), np.array(left_out), 0.95)
    got = bootstrap.ratio_interval(sums, counts, seed=1, resamples=4000)
    assert got == pytest.approx(want, abs=0.03)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    hits = 0
    for trial in range(300):
        counts = generator.integers(20, 200, 40).astype(float)
        sums = counts * 2.0 + np.sqrt(counts) * generator.gamma(1.0, 3.0, 40) - np.sqrt(counts) * 3.0
        low, high = bootstrap.ratio_interval(sums, counts, seed=trial, resamples=500)  # type: ignore[misc]
        hits += low <= 2.0 <= high
    assert 0.90 <= hits / 300 <= 0.985


def test_pairing_narrows_the_interval() -> None:
    generator = np.random.default_rng(0)
    counts = np.full(30, 100.0)
    dense = generator.normal(300, 60, 30)
    thinned = dense + generator.normal(5, 1, 30)
    low, high = bootstrap.ratio_interval(thinned - dense, counts, seed=0)  # type: ignore[misc]
    alone = bootstrap.ratio_interval(thinned, counts, seed=0)
    assert 0.04 < low < 0.05 < high < 0.06
    assert high - low < 0.1 * (alone[1] - alone[0])  # type: ignore[index]


def test_the_same_seed_gives_the_same_interval_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = np.arange(1.0, 21.0), np.full(20, 4.0)
    whole = bootstrap.ratio_interval(sums, counts, seed=3)
    assert whole == bootstrap.ratio_interval(sums, counts, seed=3)
    assert whole != bootstrap.ratio_interval(sums, counts, seed=4)
    monkeypatch.setattr(bootstrap, "CELLS", 1000)
    assert whole == bootstrap.ratio_interval(sums, counts, seed=3)


def test_no_spread_is_a_point_and_one_sequence_has_no_interval() -> None:
    assert bootstrap.ratio_interval([2.0, 4.0], [1.0, 2.0], seed=0) == (2.0, 2.0)
    assert bootstrap.ratio_interval([2.0], [1.0], seed=0) is None
    assert bootstrap.median_interval([2.0], seed=0) is None
    with pytest.raises(ValueError, match="one number per sequence"):
        bootstrap.ratio_interval([2.0, 1.0], [1.0], seed=0)


def test_a_sequence_without_tokens_does_no_harm() -> None:
    low, high = bootstrap.ratio_interval([0.0, 4.0, 6.0], [0.0, 2.0, 2.0], seed=0)  # type: ignore[misc]
    assert 2.0 <= low <= high <= 3.0


def test_the_median_and_its_interval() -> None:
    values = [1.0, 1.1, 1.2, 1.3, 9.0]
    low, high = bootstrap.median_interval(values, seed=0)  # type: ignore[misc]
    assert 1.0 <= low <= 1.2 <= high <= 9.0
    assert bootstrap.median_interval(values, seed=0) == (low, high)
