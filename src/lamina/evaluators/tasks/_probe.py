"""A linear probe on vectors of a frozen model: both models of a pair get the same items, split alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.core.errors import InputError
from lamina.evaluators.tasks._item import Marks, Subject

Array = NDArray[np.float64]
PENALTY = 0.01
"""Inverse strength of the probe's ridge, on features of mean 0 and deviation 1: vectors are wider than examples."""
STEPS = 5000


@dataclass(frozen=True)
class Split:
    """Which items the probe is fitted on, and which are marked: numbers of items, none in both."""

    fitted: NDArray[np.int64]
    marked: NDArray[np.int64]


def split(count: int, fitted: int, marked: int, seed: int) -> Split:
    """A draw without replacement; what is fitted does not change with the number that is marked.

    Raises ValueError where `count` items are not enough to mark one.
    """
    if count <= fitted or marked < 1:
        raise ValueError(f"{count} items: {fitted} are fitted and {marked} are marked")
    drawn = np.random.default_rng(seed).permutation(count)
    return Split(drawn[:fitted], drawn[fitted : fitted + marked])


def right(train: Array, classes: Array, test: Array, truth: Array) -> NDArray[np.bool_]:
    """Which rows of `test` [items, width] a logistic probe, fitted on `train` [examples, width], tells right."""
    logistic, limits = _expect_sklearn()
    center, spread = train.mean(0), train.std(0)
    spread[spread == 0] = 1
    with limits(1, user_api="blas"):
        probe = logistic(C=PENALTY, max_iter=STEPS).fit((train - center) / spread, classes)
        return probe.predict((test - center) / spread) == truth


def probed(
    name: str,
    subject: Subject,
    labels: Sequence[str],
    vectors: Callable[[Sequence[int]], Array],
    *,
    fitted: int,
    keys: Sequence[str],
    how: str,
) -> Marks:
    """1.0 for each marked item whose label the probe tells, else 0.0.

    `vectors` gives float64 [items, width] for numbers of items; both parts are asked at once. Chance is the share of
    the commonest label among what is marked.
    """
    _expect_sklearn()
    parts = split(len(labels), fitted, subject.items, subject.seed)
    classes = np.array(labels)
    both = vectors([*parts.fitted.tolist(), *parts.marked.tolist()])
    if not np.isfinite(both).all():
        raise InputError("the model's vectors are not finite", where=name)
    truth = classes[parts.marked]
    found = right(both[:fitted], classes[parts.fitted], both[fitted:], truth)
    chance = np.unique(truth, return_counts=True)[1].max() / len(truth)
    return Marks.of(found, [keys[i] for i in parts.marked], chance=float(chance), how=f"{how}, {fitted} fitted")


def _expect_sklearn() -> tuple[Any, Any]:
    """The probe's class, and what limits BLAS's threads. Raises InputError where scikit-learn is missing."""
    try:
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise InputError("scikit-learn is missing", where="tasks", hint="pip install 'lamina[probes]'") from None
    return LogisticRegression, threadpool_limits
