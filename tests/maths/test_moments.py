"""The ratio estimator against literal sums, the jackknife and a simulation; and its laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.maths.moments import Mean

PARTS = st.lists(
    st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 30)), min_size=1, max_size=5), min_size=1, max_size=4
)


def mean(rows: list[tuple[float, int]]) -> Mean:
    made = Mean()
    made.add([s for s, _ in rows], [n for _, n in rows])
    return made


@settings(max_examples=100)
@given(PARTS)
def test_parts_add_up_in_any_order(parts: list[list[tuple[float, int]]]) -> None:
    whole = mean([row for part in parts for row in part])
    for order in (parts, parts[::-1]):
        both = Mean()
        for part in order:
            both = both.merge(mean(part))
        assert both.value == pytest.approx(whole.value, rel=1e-10, abs=1e-10)
        assert both.stderr == pytest.approx(whole.stderr, rel=1e-5, abs=1e-5, nan_ok=True)
        assert (both.count, both.sequences) == (whole.count, whole.sequences)


def test_every_token_counts_the_same() -> None:
    found = mean([(10.0, 1), (0.0, 9)])
    assert found.value == 1.0  # the mean of the means would be 5


def test_merging_changes_neither_part() -> None:
    a, b = mean([(1.0, 2)]), mean([(5.0, 3)])
    a.merge(b)
    assert (a.value, b.value) == (0.5, pytest.approx(5 / 3))


def test_equal_counts_give_the_textbook_error() -> None:
    sums = np.array([1.0, 4.0, 2.0, 9.0, 4.0])
    found = mean([(s, 7) for s in sums])
    assert found.stderr == pytest.approx((sums / 7).std(ddof=1) / math.sqrt(5))


def test_error_agrees_with_the_jackknife() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 150, 200)
    sums = counts * (2 + 0.3 * rng.standard_normal(200))
    rows = list(zip(sums, counts.tolist(), strict=True))
    left = np.array([mean(rows[:i] + rows[i + 1 :]).value for i in range(200)])
    jackknife = math.sqrt(199 / 200 * ((left - left.mean()) ** 2).sum())
    assert mean(rows).stderr == pytest.approx(jackknife, rel=0.02)


def test_error_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        counts = rng.integers(1, 40, 60)
        sums = counts * (1.5 + rng.standard_normal(60))
        found = mean(list(zip(sums, counts.tolist(), strict=True)))
        inside += abs(float(found.value) - 1.5) < 1.96 * float(found.stderr)
    assert 0.91 < inside / 400 < 0.98


def test_tokens_of_one_sequence_are_not_independent() -> None:
    few = Mean()
    few.add([100.0, -100.0] * 4, [100] * 8)
    tokens = Mean()
    tokens.add([1.0, -1.0] * 400, [1] * 800)
    assert few.stderr == pytest.approx(10 * float(tokens.stderr), rel=0.1)


def test_no_error_without_two_sequences() -> None:
    assert math.isnan(mean([(3.0, 2)]).stderr)
    assert math.isnan(Mean().value)
    assert math.isnan(Mean().stderr)


def test_arrays_are_taken_place_by_place() -> None:
    both = Mean()
    both.add([[1.0, 10.0], [3.0, 30.0]], [1, 1])
    assert both.value.tolist() == [2.0, 20.0]
    assert both.stderr.tolist() == pytest.approx([1.0, 10.0])
    empty = Mean().merge(both)
    assert empty.value.tolist() == [2.0, 20.0]
