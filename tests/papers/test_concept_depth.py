"""Concept Depth (arXiv 2404.07066): linear probes at every depth, and the points of their curve."""

from __future__ import annotations

import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.lab.sample import TokenSample
from lamina.lab.sampled import error_of, kept
from lamina.papers.representation.concept_depth import added, common, dealt, influence, marked, points, probe, reduced
from lamina.testing.models import text, tiny

pytest.importorskip("sklearn")


def literal_probe(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> tuple[float, float, float]:
    """scikit-learn's logistic regression on standardised states, the marks by counting."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x[~test].astype(np.float64))
    model = LogisticRegression(max_iter=10_000, tol=1e-10).fit(scaler.transform(x[~test]), y[~test])
    chance, truth = model.predict_proba(scaler.transform(x[test]))[:, 1], y[test]
    guess = chance > 0.5
    hits = int((guess & (truth == 1)).sum())
    pairs = [(a > b) + 0.5 * (a == b) for a in chance[truth == 1] for b in chance[truth == 0]]
    return float((guess == truth).mean()), 2 * hits / int(guess.sum() + truth.sum()), float(np.mean(pairs))


def test_the_probe_is_a_logistic_regression() -> None:
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, 120)
    x = (draw.normal(size=(120, 7)) * [1, 1, 1, 5, 1, 1, 100] + 1.2 * y[:, None]).astype(np.float32)
    test = dealt(np.arange(120) // 4, 3) == 1
    got = marked(probe(x, y, test, directions=64, iterations=1000), y[test])
    assert got == pytest.approx(literal_probe(x, y, test), abs=1e-3)
    assert 0.7 < got[0] < 1


def test_marks_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    draw = np.random.default_rng(3)
    chances, y = draw.integers(0, 7, 50) / 7, draw.integers(0, 2, 50)  # with ties
    guess = chances > 0.5
    wanted = accuracy_score(y, guess), f1_score(y, guess), roc_auc_score(y, chances)
    assert marked(chances, y) == pytest.approx(wanted)


def test_influence_on_the_area_is_that_of_delong_and_of_the_jackknife() -> None:
    draw = np.random.default_rng(4)
    y = draw.integers(0, 2, 400)
    chances = np.round(draw.normal(size=400) + y + draw.normal(size=50)[np.arange(400) // 8], 1)  # with ties
    psi = influence(chances, y)
    wins = (chances[y == 1][:, None] > chances[y == 0]) + 0.5 * (chances[y == 1][:, None] == chances[y == 0])
    alone = wins.mean(1).var() / (y == 1).sum() + wins.mean(0).var() / (y == 0).sum()
    assert (psi**2).sum() == pytest.approx(alone, rel=1e-9)
    assert psi.sum() == pytest.approx(0, abs=1e-12)
    owner = np.arange(400) // 8
    out = [marked(chances[owner != s], y[owner != s])[2] for s in range(50)]
    assert error_of(psi, owner) == pytest.approx([np.sqrt(49 * np.var(out))], rel=0.03)


def test_all_directions_are_a_rotation_of_the_standardised_states() -> None:
    """So that a penalty on the weights' norm is the same."""
    x = np.random.default_rng(1).normal(size=(30, 5)) * [1, 2, 3, 4, 0] + 7
    test = np.arange(30) % 5 == 1
    z = (x - x[~test].mean(0)) / np.array([*x[~test].std(0)[:4], 1.0])
    got = reduced(x, test, 64)
    assert got.shape == (30, 4)
    np.testing.assert_allclose(got @ got.T, z @ z.T, atol=1e-8)
    assert reduced(x, test, 2).shape == (30, 2)


def test_shuffled_labels_are_not_read_and_planted_ones_are() -> None:
    draw = np.random.default_rng(2)
    x, y = draw.normal(size=(400, 6)), draw.integers(0, 2, 400)
    test = np.arange(400) < 150
    assert marked(probe(x, y, test, 64, 100), y[test])[2] == pytest.approx(0.5, abs=0.12)
    x[:, 3] += 9 * y
    assert marked(probe(x, y, test, 64, 100), y[test]) == pytest.approx((1, 1, 1), abs=0.02)


def test_whole_sequences_are_dealt_out_to_parts() -> None:
    assert dealt(np.array([0, 0, 1, 2, 3, 3]), 3).tolist() == [0, 0, 1, 2, 0, 0]
    assert dealt(np.zeros(5, dtype=int), 2).tolist() == [0, 1, 0, 1, 0]


def test_the_commonest_ids_make_up_half() -> None:
    counts = {7: 5, 3: 4, 9: 4, 1: 2, 2: 1}
    assert common(counts).tolist() == [7, 3]  # 9 of 16; with 9 too it were 13
    assert common({5: 1}).tolist() == [5]
    assert common({}).tolist() == []
    assert added({1: 2}, {1: 3, 4: 1}) == {1: 5, 4: 1}


@pytest.mark.parametrize(
    ("accuracy", "wanted"),
    [
        ([0.5, 0.6, 0.7, 0.71, 0.72], {"jump": 0.25, "converge": 1.0, "settle": 0.75, "peak": 1.0}),
        ([0.5, 0.5, 0.8, 0.81, 0.6], {"jump": 0.5, "converge": 0.75, "settle": math.nan, "peak": 0.75}),
        ([0.9, 0.9, 0.9, 0.9, 0.9], {"jump": math.nan, "converge": 1.0, "settle": 0.25, "peak": 0.0}),
        ([0.0, 0.5, 0.6, 0.7, 0.8], {"jump": 0.25, "converge": math.nan, "settle": math.nan, "peak": 1.0}),
    ],
)
def test_points_of_a_curve(accuracy: list[float], wanted: dict[str, float]) -> None:
    """Jump: min i/L with a_i / a_(i-1) ≥ 1.1. Converge: max i/L with |a_i / a_(i-1) - 1| < 0.03. Peak: argmax."""
    grid = points(np.array(accuracy))
    assert dict(zip(grid.columns, grid.values[0].tolist(), strict=True)) == pytest.approx(wanted, nan_ok=True)


def test_the_texts_own_concept_is_probed_at_every_depth() -> None:
    model, ids = tiny("llama"), text(20, 12) % 9 + 3
    lab = Lab(model, ids, batch_size=4)
    got = MEASURES.make("concept-probe").measure(lab)

    class Sample(TokenSample):
        def scores(self):
            return self.stacks()[0]

    sampled = lab.stream([Sample(64, 8)])[0]
    counts = Counter(ids[:, 1:].flatten().tolist())
    order = sorted(counts, key=lambda k: (-counts[k], k))
    shares = np.cumsum([counts[k] for k in order]) / sum(counts.values())
    frequent = order[: int(np.abs(shares - 0.5).argmin()) + 1]
    sampled = kept(sampled, (sampled.next_ids.numpy() >= 0) & (sampled.position > 0))
    labels = np.isin(sampled.next_ids.numpy(), frequent).astype(int)
    assert 0.3 < labels.mean() < 0.7
    curve = []
    for states in sampled.states.numpy():
        chances = np.zeros(len(labels))
        for part in range(3):
            test = sampled.owner % 3 == part
            chances[test] = probe(states, labels, test, 64, 100)
        curve.append(marked(chances, labels))
    curve = np.array(curve)
    np.testing.assert_allclose(got.grids["probe"].values, curve, atol=1e-9)
    for n in range(4):
        assert got[f"block.{n}"] == pytest.approx(abs(curve[n + 1, 2] - curve[n, 2]))


def test_the_identity_of_a_token_is_read_off_the_first_depth() -> None:
    """Texts of one token over and over: which it is, is there before the first block."""
    ids = torch.tensor([5, 50]).repeat(10).unsqueeze(1).repeat(1, 6)
    ids[:, 0] = torch.arange(3, 23)
    batches = [{"input_ids": b, "concept": (b[:, 1] == 5).long()} for b in ids.split(4)]
    got = MEASURES.make("concept-probe").measure(Lab(tiny("llama"), batches))
    assert got.grids["probe"].values[0, 0] > 0.9
    other = MEASURES.make("concept-probe").measure(Lab(tiny("llama"), [batches[i] for i in (3, 0, 4, 1, 2)]))
    np.testing.assert_allclose(other.grids["probe"].values, got.grids["probe"].values, atol=1e-6)


def test_parts_of_a_text_keep_the_labels_of_the_whole() -> None:
    model, ids = tiny("llama"), text(20, 6)
    batches = [{"input_ids": b, "concept": b[:, 1] % 2} for b in ids.split(4)]
    measure, lab = MEASURES.make("concept-probe", {"sequences": 10, "each": 4}), Lab(model, batches)
    whole = measure.measure(lab)
    one, two = (measure.tally(lab.anatomy) for _ in range(2))
    lab.on(batches[:2]).stream([one], score=False)
    lab.on(batches[2:]).stream([two], score=False)
    both = two.merge(one).scores()
    assert {k: v.tolist() for k, v in both.values.items()} == {k: v.tolist() for k, v in whole.values.items()}


def test_one_class_alone_is_no_concept() -> None:
    batches = [{"input_ids": text(10, 6), "concept": torch.ones(10, dtype=torch.long)}]
    with pytest.raises(UnsupportedError, match="both classes"):
        MEASURES.make("concept-probe").measure(Lab(tiny("llama"), batches))


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"scikit-learn is missing.*lamina\[probes\]"):
        MEASURES.make("concept-probe").measure(Lab(tiny("llama"), text(4, 6)))


@pytest.mark.parametrize("options", [{"directions": 0}, {"iterations": 0}, {"folds": 1}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least"):
        MEASURES.make("concept-probe", options)
