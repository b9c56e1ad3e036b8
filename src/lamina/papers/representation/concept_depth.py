"""Concept Depth: a linear probe at each depth tells where the model has come to know a concept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Array, Grid, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.sample import Sampled
    from lamina.lab.sampled import Found
    from lamina.lab.taps import Taps

PAPER = Paper(
    key="jin2025concept",
    title="Exploring Concept Depth: How Large Language Models Acquire Knowledge and Concept at Different Layers?",
    authors=(
        "Mingyu Jin",
        "Qinkai Yu",
        "Jingyuan Huang",
        "Qingcheng Zeng",
        "Zhenting Wang",
        "Wenyue Hua",
        "Haiyan Zhao",
        "Kai Mei",
        "Yanda Meng",
        "Kaize Ding",
        "Fan Yang",
        "Mengnan Du",
        "Yongfeng Zhang",
    ),
    year=2025,
    arxiv="2404.07066",
)
JUMP, STILL = 1.1, 0.03
"""A rise of accuracy by this factor is a jump; one that changes it by less than that is none."""


@measure(
    "concept-probe",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=(
        "the concept is made from the text itself, unless batches name one; the paper has nine sets of labelled texts",
        "states are the stream around blocks; the code probes the normed input of the MLP at the last token",
        "each of three parts of the sequences is the test once; the code tests on two fifths of its texts",
        "states are standardised and cut to their principal directions, for speed and so that the solver converges",
        "the first token of a sequence is left out: in many models its huge norm would be the first direction",
        "a block is scored by the size of the step of the area under the curve: accuracy moves in coarse steps",
    ),
)
@dataclass(frozen=True, kw_only=True)
class ConceptProbe:
    """Keep what makes a concept readable, or unreadable: |the step of a linear probe's AUC across the block|.

    The concept is whether the next token is one of the text's commonest, as many as make up half of it; or, where
    batches hold "concept" [batch] (int, two values), that of the sequence. The probe is a logistic regression on
    `directions` principal directions, with at most `iterations` steps; each of `folds` parts of the sequences is
    predicted from the others. Grids: `probe`, accuracy, F1 and AUC at all depths; `points`, depths as shares of the
    blocks: the first with accuracy 1.1 times the last one's (jump), the last with a change below 3 % (converge), the
    first of those that no other interrupts (settle), the best (peak); NaN where there is none. Errors take probes and
    labels as known (DeLong's, over sequences). Needs scikit-learn.
    """

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "one sequence has too few labels, and errors take probes as known"
    }

    card: ClassVar[Card]

    sequences: int = 64
    each: int = 8
    directions: int = 64
    iterations: int = 100
    folds: int = 3

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, not {self.folds}")
        if self.directions < 1 or self.iterations < 1:
            raise ValueError("directions and iterations must be at least 1")

    def tally(self, anatomy: Anatomy) -> Concepts:
        """A sample of tokens and how often each id follows; the probes are fitted in the end."""
        _expect_sklearn()
        return Concepts(self)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


class Concepts:
    """A sample of tokens, the counts of next ids in each stack's whole text, and labels by a sequence's key."""

    def __init__(self, options: ConceptProbe) -> None:
        from lamina.lab.sample import TokenSample

        self.options = options
        self.sample = TokenSample(options.sequences, options.each)
        self.counts: dict[str, dict[int, int]] = {}
        self.labels: dict[int, int] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one block on one batch."""
        from lamina.lab.sampled import stack_of

        if site.kind is not Kind.BLOCK:
            return
        self.sample.add(site, taps)
        rows = taps.rows
        if site.block == 0 and rows.next_ids is not None:
            ids, counts = np.unique(rows.next_ids.cpu().numpy(), return_counts=True)
            new = dict(zip(ids[ids >= 0].tolist(), counts[ids >= 0].tolist(), strict=True))
            self.counts[stack_of([site.id])] = added(self.counts.get(stack_of([site.id]), {}), new)
        if "concept" in rows.batch:
            chosen = np.unique(rows.sequence.numpy()[rows.picked(self.sample.sequences, self.sample.each).numpy()])
            for row in chosen:
                self.labels[int(rows.owners[row])] = int(rows.batch["concept"][row])

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(self.options)
        both.sample = self.sample.merge(other.sample)
        for stack in {**self.counts, **other.counts}:
            both.counts[stack] = added(self.counts.get(stack, {}), other.counts.get(stack, {}))
        both.labels = {**self.labels, **other.labels}
        return both

    def scores(self) -> Scores:
        """Probes at all depths. Raises UnsupportedError where there is no concept to probe."""
        from lamina.lab.sampled import table

        return table(self.options.card.name, self.sample.stacks(), self._found)

    def _found(self, sampled: Sampled) -> Found:
        from lamina.lab.sampled import Found, curves, error_of, sequences_of

        sampled, labels = self._labelled(sampled)
        parts = dealt(sampled.owner, self.options.folds)
        values = np.unique(labels)
        if len(values) != 2 or any(len(np.unique(labels[parts != p])) < 2 for p in np.unique(parts)):
            raise UnsupportedError("the probe needs both classes in every training part", hint="give it more sequences")
        labels, (_, limit) = (labels == values[1]).astype(np.int64), _expect_sklearn()
        with limit(1, user_api="blas"):  # BLAS on several threads is slower on matrices this small
            chances = [self._probed(states.numpy(), labels, parts) for states in sampled.states]
        marks = np.array([marked(c, labels) for c in chances])
        grid = curves(sampled.blocks, accuracy=marks[:, 0], f1=marks[:, 1], auc=marks[:, 2])
        steps = np.diff(np.stack([influence(c, labels) for c in chances]), axis=0)
        return Found(
            values=np.abs(np.diff(marks[:, 2])),
            stderr=error_of(steps, sequences_of(sampled)),
            grids={"probe": grid, "points": points(marks[:, 0])},
        )

    def _labelled(self, sampled: Sampled) -> tuple[Sampled, np.ndarray]:
        """The rows that have a label, and their labels."""
        from lamina.lab.sampled import kept, sampled_behind, stack_of

        sampled = sampled_behind(sampled, 1)
        if self.labels:
            return sampled, np.array([self.labels[k] for k in sorted(self.labels)])[sampled.owner]
        if sampled.next_ids is None:
            raise UnsupportedError(
                "positions are no tokens, so that text gives no concept", hint='give batches "concept"'
            )
        sampled = kept(sampled, sampled.next_ids.numpy() >= 0)
        follows: Any = sampled.next_ids
        return sampled, np.isin(follows.numpy(), common(self.counts[stack_of(sampled.blocks)])).astype(np.int64)

    def _probed(self, states: np.ndarray, labels: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """The chance of class 1 of every row [n], as probes fitted to the other parts have it."""
        chances = np.zeros(len(labels))
        for part in np.unique(parts):
            test = parts == part
            chances[test] = probe(states, labels, test, self.options.directions, self.options.iterations)
        return chances


def added(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    """Counts of both."""
    return {k: one.get(k, 0) + other.get(k, 0) for k in {**one, **other}}


def common(counts: dict[int, int]) -> np.ndarray:
    """The commonest ids, as many as come nearest to half of all counts; of equals the lower id first."""
    order = sorted(counts, key=lambda k: (-counts[k], k))
    share = np.cumsum([counts[k] for k in order]) / max(sum(counts.values()), 1)
    return np.array(order[: int(np.abs(share - 0.5).argmin()) + 1] if order else [], dtype=np.int64)


def dealt(owners: np.ndarray, folds: int) -> np.ndarray:
    """The part of each row [n]: sequences are dealt out in turn; of a single sequence, its rows are."""
    return (owners if len(np.unique(owners)) > 1 else np.arange(len(owners))) % folds


def probe(states: np.ndarray, labels: np.ndarray, test: np.ndarray, directions: int, iterations: int) -> np.ndarray:
    """Chances of class 1 of the `test` rows, by a logistic regression fitted to the others."""
    import warnings

    features = reduced(states, test, directions)
    model = _expect_sklearn()[0](max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that is stopped early is still a probe
        model.fit(features[~test], labels[~test])
    return model.predict_proba(features[test])[:, 1]


def marked(chances: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Accuracy, F1 and area under the curve of chances of class 1 [n]."""
    guess, truth = chances > 0.5, labels == 1
    f1 = 2 * np.sum(guess & truth) / max(np.sum(guess) + np.sum(truth), 1)
    return float((guess == truth).mean()), float(f1), float(beaten(chances, labels)[truth].mean())


def beaten(chances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each row [n] the share of the other class's rows that it is on the right side of, ties for one half.

    The mean over either class is the area under the curve (DeLong, DeLong and Clarke-Pearson, 1988).
    """
    truth = labels == 1
    found = np.empty(len(chances))
    for mine in (truth, ~truth):
        rest = np.sort(chances[~mine])
        below = np.searchsorted(rest, chances[mine], "left") + np.searchsorted(rest, chances[mine], "right")
        found[mine] = below / (2 * max(len(rest), 1))
    return np.where(truth, found, 1 - found)


def influence(chances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each row's influence on the area under the curve [n]."""
    found, truth = beaten(chances, labels), labels == 1
    return (found - found[truth].mean()) / np.where(truth, truth.sum(), (~truth).sum())


def reduced(states: np.ndarray, test: np.ndarray, directions: int) -> np.ndarray:
    """States [n, width], standardised and on at most `directions` principal directions, all as of the training rows."""
    import torch

    x = states.astype(np.float64)
    train = x[~test]
    spread = train.std(0)
    x = (x - train.mean(0)) / np.where(spread > 0, spread, 1.0) * (spread > 0)
    given = torch.from_numpy(x)
    fitted = given[torch.from_numpy(~test)]
    values, vectors = torch.linalg.eigh(fitted @ fitted.T)
    some = (values > 1e-9 * values[-1].clamp_min(1e-300)).nonzero().flatten()[-directions:]
    return (given @ (fitted.T @ (vectors[:, some] / values[some].sqrt()))).numpy()


def points(accuracy: Array) -> Grid:
    """Jump, converging, settling and peak point of a curve [depths], as shares of the blocks."""
    from lamina.core.scores import Grid

    blocks = max(len(accuracy) - 1, 1)
    change = np.divide(accuracy[1:], accuracy[:-1], out=np.full(len(accuracy) - 1, np.inf), where=accuracy[:-1] > 0)
    jumps, still = np.flatnonzero(change >= JUMP) + 1, np.flatnonzero(np.abs(change - 1) < STILL) + 1
    moving = np.flatnonzero(np.abs(change - 1) >= STILL) + 1
    settled = moving[-1] + 1 if len(moving) else 1
    found = {
        "jump": jumps[0] / blocks if len(jumps) else math.nan,
        "converge": still[-1] / blocks if len(still) else math.nan,
        "settle": settled / blocks if settled <= blocks else math.nan,
        "peak": accuracy.argmax() / blocks,
    }
    return Grid(values=np.array([list(found.values())]), rows=("share of depth",), columns=tuple(found))


def _expect_sklearn() -> tuple[Any, Any]:
    """The class of the probe, and what limits BLAS's threads. Raises InputError where scikit-learn is missing."""
    try:
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise InputError(
            "scikit-learn is missing", where="concept-probe", hint="pip install 'lamina[probes]'"
        ) from None
    return LogisticRegression, threadpool_limits
