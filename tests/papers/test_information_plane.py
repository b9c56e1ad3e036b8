"""Opening the Black Box (arXiv 1703.00810): information in bits, from counts in plain loops."""

from __future__ import annotations

import math
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.lab.sample import Sampled
from lamina.lab.sampled import error_of
from lamina.papers.representation.information_plane import binned, entropy, plane, surprise
from lamina.testing.models import text, tiny

symbols = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40)


def bits(rows: list[tuple[int, int]]) -> tuple[float, float]:
    """I(X;T) = H(T) - Σ p(x) H(T|x), one row per x, and I(T;Y) = H(T) - Σ p(y) H(T|y)."""

    def h(values: list[int]) -> float:
        return -math.fsum(c / len(values) * math.log2(c / len(values)) for c in Counter(values).values())

    own = h([t for t, _ in rows])
    by_label = [[t for t, y in rows if y == label] for label in {y for _, y in rows}]
    return own, own - math.fsum(len(part) / len(rows) * h(part) for part in by_label)


@settings(max_examples=60, deadline=None)
@given(symbols)
def test_bits_are_those_of_a_loop_with_a_counter(rows: list[tuple[int, int]]) -> None:
    cells, labels = np.array(rows).T
    got = plane(cells, labels)
    assert got == pytest.approx(bits(rows), abs=1e-9)
    assert got[1] <= min(got[0], entropy(labels)) + 1e-9
    merged = plane(cells // 2, labels)
    assert merged[0] <= got[0] + 1e-9


def test_a_constant_tells_nothing_and_an_injective_code_all() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 2, 2])
    assert plane(np.zeros(8, dtype=int), labels) == (0.0, 0.0)
    assert plane(np.arange(8), labels) == pytest.approx((3.0, 1.5))


def test_influence_agrees_with_the_jackknife_over_sequences() -> None:
    draw = np.random.default_rng(5)
    sequence = np.repeat(np.arange(60), 10)
    labels = (draw.integers(0, 3, 600) + draw.integers(0, 2, 60)[sequence]) % 3
    cells = (labels + (draw.random(600) < 0.4)) % 4
    got = error_of(surprise(cells, labels), sequence)
    out = np.array([plane(cells[sequence != s], labels[sequence != s]) for s in range(60)])
    np.testing.assert_allclose(got, np.sqrt(59 * out.var(0)), rtol=0.05)
    assert np.isnan(error_of(surprise(cells, labels), np.zeros(600, dtype=int))).all()


def test_errors_are_those_of_the_distance_moved() -> None:
    """By the jackknife on the same bins, of a sample large enough that bins matter little."""
    draw = np.random.default_rng(6)
    depths = torch.from_numpy(draw.normal(size=(2, 800, 3)) * [3, 2, 0.1])
    ids = torch.from_numpy((depths[1, :, 0] > 0).long().numpy())
    owner = np.arange(800) // 8
    sample = Sampled(("block.0",), depths, owner, np.arange(800) % 8 + 1, ids, ids)
    found = MEASURES.make("information-plane")._found(sample)
    cells = [binned(d.numpy(), 2, 6) for d in depths]
    out = []
    for s in range(100):
        rest = owner != s
        out.append(np.hypot(*np.subtract(*(plane(c[rest], ids.numpy()[rest]) for c in cells))))
    np.testing.assert_allclose(found.stderr, [np.sqrt(99 * np.var(out))], rtol=0.1)


def test_bins_are_equal_parts_of_each_principal_direction() -> None:
    draw = np.random.default_rng(0)
    axes = np.linalg.qr(draw.normal(size=(7, 7)))[0]
    scores = draw.normal(size=(30, 2)) * [5, 2]
    scores -= scores.mean(0)
    u, s, _ = np.linalg.svd(scores, full_matrices=False)
    ways = []
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        own = u * s * signs  # along the sample's own directions
        edges = [np.linspace(c.min(), c.max(), 5) for c in own.T]
        places = [np.clip(np.searchsorted(e, c, "right") - 1, 0, 3) for e, c in zip(edges, own.T, strict=True)]
        ways.append((places[0] * 4 + places[1]).tolist())
    assert binned((scores @ axes[:2]).astype(np.float32), 2, 4).tolist() in ways


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_are_scored_by_their_way_in_the_plane(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(6, 9)
    pairs = literal.pairs(model, name, ids)
    got = MEASURES.make("information-plane", {"sequences": 6, "each": 9}).measure(Lab(model, ids))
    points = []
    for state in (pairs["block.0"][0], *(pairs[f"block.{i}"][1] for i in range(4))):
        rows = state[:, 1:-1].flatten(0, 1).numpy()  # neither the first token, nor the last, which predicts none
        cells = binned(rows.astype(np.float32), 2, 6)
        points.append(bits(list(zip(cells.tolist(), ids[:, 2:].flatten().tolist(), strict=True))))
    np.testing.assert_allclose(got.grids["plane"].values, points, atol=1e-9)
    for n in range(4):
        assert got[f"block.{n}"] == pytest.approx(math.dist(points[n], points[n + 1]))
    labels = ids[:, 2:].flatten().numpy()
    assert got.grids["rows"].values.tolist() == [pytest.approx([42, entropy(labels), 6, 2])]


def test_an_identity_block_does_not_move(literal: ModuleType) -> None:
    model = literal.zeroed(tiny("llama"), "llama", ["block.2"])
    assert MEASURES.make("information-plane").measure(Lab(model, text(4, 8)))["block.2"] == 0.0


@pytest.mark.parametrize("options", [{"components": 0}, {"bins": 1}], ids=["components", "bins"])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make("information-plane", options)
