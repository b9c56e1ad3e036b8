"""Rules that share a sparsity out: exact means, bounds, and the rules written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.core.errors import InputError
from lamina.maths.ratios import CEILING, er, erk, owl, pq, uniform

SHAPES = {"square": (32, 32), "wide": (64, 32), "small": (8, 32), "tall": (32, 128), "conv": (16, 8, 3, 3)}
shapes = st.dictionaries(
    st.sampled_from("abcdefgh"), st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8
)


def sizes(of: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return {k: math.prod(v) for k, v in of.items()}


def mean(sparsity: dict[str, float], of: dict[str, int]) -> float:
    return sum(sparsity[k] * n for k, n in of.items()) / sum(of.values())


def by_hand(
    of: dict[str, tuple[int, ...]], density: float, dense: set[str], kernel: bool, power: float
) -> dict[str, float]:
    """Densities as the method's card has them: the right side and the divisor as sums over layers."""
    dense = set(dense)
    while True:
        right = divisor = 0.0
        raw = {}
        for name, shape in of.items():
            n = math.prod(shape)
            if name in dense:
                right -= n * (1 - density)
            else:
                right += n * density
                dims = shape if kernel else shape[:2]
                raw[name] = (sum(dims) / math.prod(dims)) ** power
                divisor += raw[name] * n
        if not raw:
            return dict.fromkeys(of, 1.0)
        eps = right / divisor
        if max(raw.values()) * eps <= 1:
            return {name: 1.0 if name in dense else eps * raw[name] for name in of}
        dense.add(max(raw, key=lambda k: raw[k]))


@settings(max_examples=80, deadline=None)
@given(shapes, st.floats(0.02, 0.98), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_er_and_erk_are_the_card(of: dict[str, tuple[int, int]], density: float, power: float) -> None:
    for got, kernel, exponent in ((er(of, density), False, 1.0), (erk(of, density, power=power), True, power)):
        wanted = by_hand(dict(of), density, set(), kernel, exponent)
        assert got.keys() == wanted.keys()
        for name, value in got.items():
            assert 1 - value == pytest.approx(wanted[name], abs=1e-9)
            assert -1e-12 <= value < 1
        assert abs(mean(got, sizes(dict(of))) - (1 - density)) < 1e-9


def test_kernels_count_for_erk_alone() -> None:
    flat, kernel = er(SHAPES, 0.4), erk(SHAPES, 0.4)
    assert flat["conv"] != pytest.approx(kernel["conv"], abs=0.01)
    plain = {k: v for k, v in SHAPES.items() if len(v) == 2}
    assert er(plain, 0.4) == pytest.approx(erk(plain, 0.4))


def test_larger_squares_are_sparser() -> None:
    got = er({f"{n}": (n, n) for n in (8, 16, 32, 64)}, 0.2)
    assert list(got.values()) == sorted(got.values())
    assert len(set(got.values())) == 4


def test_what_is_dense_stays_and_the_others_make_up_for_it() -> None:
    for rule in (er, erk, uniform):
        got = rule(SHAPES, 0.5, ["wide", "small"])
        assert got["wide"] == got["small"] == 0.0
        assert abs(mean(got, sizes(SHAPES)) - 0.5) < 1e-12
    assert uniform(SHAPES, 0.3) == pytest.approx(dict.fromkeys(SHAPES, 0.7))
    assert erk(SHAPES, 0.3, power=0.0) == pytest.approx(uniform(SHAPES, 0.3))


def test_a_layer_whose_density_would_be_above_one_is_dense() -> None:
    got = er({"tiny": (2, 2), "large": (100, 100)}, 0.5)
    assert got["tiny"] == 0.0
    assert got["large"] == pytest.approx(0.5 * 10004 / 10000, abs=1e-12)


@pytest.mark.parametrize("density", [0.0, 1.5, -1.0, float("nan")])
def test_densities_that_are_none(density: float) -> None:
    with pytest.raises(InputError, match="a density lies above 0"):
        er(SHAPES, density)


def test_more_dense_than_may_stay_is_refused() -> None:
    for dense in (["tall", "wide"], list(SHAPES)):
        with pytest.raises(InputError, match="so much that stays whole"):
            er(SHAPES, 0.2, dense)
    assert er(SHAPES, 1.0, list(SHAPES)) == er(SHAPES, 1.0) == dict.fromkeys(SHAPES, 0.0)


outliers = st.lists(st.floats(0, 20), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(outliers, st.floats(0.3, 0.8), st.floats(0.0, 0.09))
def test_owl_is_the_card(values: list[float], sparsity: float, spread: float) -> None:
    """keep = r - mean(r) + 1 - S with r = (D - min) / (max - min) · 2λ; the mean is S and the range 2λ."""
    got = owl({str(n): v for n, v in enumerate(values)}, sparsity, spread)
    d = np.array(values)
    r = (d - d.min()) / (d.max() - d.min()) * 2 * spread if d.max() > d.min() else np.zeros(len(d))
    keep = r - r.mean() + 1 - sparsity
    assert list(got.values()) == pytest.approx(list(1 - keep), abs=1e-9)
    assert np.mean(list(got.values())) == pytest.approx(sparsity, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(outliers, st.floats(0.0, 0.98), st.floats(0.0, 0.4), st.data())
def test_owl_keeps_its_mean_and_its_order_within_bounds(
    values: list[float], sparsity: float, spread: float, data: st.DataObject
) -> None:
    names = [str(n) for n in range(len(values))]
    weights = {n: data.draw(st.integers(1, 50)) for n in names}
    given_ = dict(zip(names, values, strict=True))
    got = owl(given_, sparsity, spread, weights)
    assert abs(mean(got, weights) - sparsity) < 1e-9
    assert all(0 <= v <= max(CEILING, (1 + sparsity) / 2) for v in got.values())
    for a in names:
        for b in names:
            assert given_[a] <= given_[b] or got[a] <= got[b] + 1e-12


def test_owl_of_equal_outliers_is_uniform() -> None:
    assert owl(dict.fromkeys("abc", 2.0), 0.7) == dict.fromkeys("abc", 0.7)
    assert owl({}, 0.7) == {}


@pytest.mark.parametrize(("sparsity", "spread", "words"), [(1.0, 0.1, "a sparsity"), (0.5, -0.1, "a spread")])
def test_owl_refuses(sparsity: float, spread: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        owl({"a": 1.0}, sparsity, spread)


def index(weights: np.ndarray, p: float, q: float) -> float:
    size, d = np.abs(weights), len(weights)
    return 1 - ((size**p).sum() / d) ** (1 / p) / ((size**q).sum() / d) ** (1 / q)


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.3, 1.0)])
def test_pq_lets_equal_weights_stay_and_zeros_go(p: float, q: float) -> None:
    """Of k equal weights among zeros exactly k must stay: the bound is met."""
    for k in (20, 50, 80, 100):
        weights = np.zeros(100)
        weights[:k] = 3.0
        got = pq({"a": index(weights, p, q)}, {"a": 100}, p=p, q=q)["a"]
        assert got == pytest.approx(min(1 - k / 100, 0.9), abs=0.011)


def test_pq_is_its_formula() -> None:
    weights = np.random.default_rng(0).standard_normal(1000)
    i = index(weights, 0.5, 1.0)
    must = math.ceil(1000 * (1 + 0.1) ** (1 / (0.5 - 1)) * (1 - i) ** (0.5 / 0.5))
    got = pq({"a": i}, {"a": 1000}, eta=0.1, gamma=0.8)
    assert got == {"a": math.floor(1000 * 0.8 * (1 - must / 1000)) / 1000}
    assert pq({"a": 0.999}, {"a": 1000}, most=0.6) == {"a": 0.6}
    assert pq({"a": 0.0}, {"a": 1000}) == {"a": 0.0}
    with pytest.raises(InputError, match="0 < p < q"):
        pq({"a": 0.1}, {"a": 10}, p=1.0, q=1.0)
