from __future__ import annotations

import numpy as np
import pytest

from lamina.maths.moments import Mean
from lamina.maths.sums import Sums


def test_the_error_of_a_ratio_is_that_of_the_ratio_estimator() -> None:
    draw = np.random.default_rng(0)
    counts, sums = draw.integers(3, 9, 12).astype(float), draw.normal(2, 1, 12)
    mean, both = Mean(), Sums()
    mean.add(sums, counts)
    both.add(np.stack([counts, sums], 1))
    n, s = both.total
    assert both.stderr([-s / n**2, 1 / n]) == pytest.approx(float(mean.stderr))


def test_sums_add_up_in_any_order() -> None:
    vectors = np.random.default_rng(1).normal(size=(9, 3))
    whole, parts = Sums(), [Sums() for _ in range(3)]
    whole.add(vectors)
    for part, rows in zip(parts, np.split(vectors, 3), strict=True):
        part.add(rows)
    found = Sums().merge(parts[2]).merge(parts[0].merge(parts[1]))
    np.testing.assert_allclose(found.total, whole.total)
    np.testing.assert_allclose(found.outer, whole.outer)
    assert found.stderr([1, -2, 0.5]) == pytest.approx(whole.stderr([1, -2, 0.5]))


def test_one_sequence_has_no_error() -> None:
    one = Sums()
    one.add(np.ones((1, 2)))
    assert np.isnan(one.stderr([1, 1]))
    one.add(np.ones((3, 2)))
    assert one.stderr([1, 1]) == 0.0
