"""What many measures share: tallies of a token sample, means over sequences, and leaving the first token out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lamina.core.errors import UnsupportedError
from lamina.core.scores import Array, Grid, Scores
from lamina.core.sites import Site
from lamina.lab.sample import EACH, SEQUENCES, Sampled, TokenSample
from lamina.maths.moments import Mean

if TYPE_CHECKING:
    from lamina.lab.rows import Rows
    from lamina.lab.taps import Taps


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a measure finds on one stack's sample: a value per block and, where it has them, errors, runs and grids.

    `values` and `stderr` have shape [blocks]; `spans[l]` scores the runs that begin at block l.
    """

    values: ArrayLike
    stderr: ArrayLike | None = None
    spans: Sequence[ArrayLike] = ()
    grids: dict[str, Grid] = field(default_factory=dict[str, Grid])


class PerSample:
    """A tally that gives each stack's token sample to `find`, once the text is through.

    A stack that `find` can't take (UnsupportedError) is `missing`; where none is left, its error is raised.
    """

    def __init__(
        self, measure: str, find: Callable[[Sampled], Found], sequences: int = SEQUENCES, each: int = EACH
    ) -> None:
        self.measure, self.find = measure, find
        self.sample = TokenSample(sequences, each)

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one site on one batch."""
        self.sample.add(site, taps)

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(self.measure, self.find, self.sample.sequences, self.sample.each)
        both.sample = self.sample.merge(other.sample)
        return both

    def scores(self) -> Scores:
        """The table so far. Raises UnsupportedError where no stack can be scored."""
        return table(self.measure, self.sample.stacks(), self.find)


def table(measure: str, stacks: Sequence[Sampled], find: Callable[[Sampled], Found]) -> Scores:
    """What is found on all stacks, as one table; a grid's name begins with its stack's where there are several."""
    values, stderr, spans, grids, missing = {}, {}, {}, {}, {}
    refused = None
    for sampled in stacks:
        try:
            found = find(sampled)
        except UnsupportedError as error:
            refused = error
            missing |= dict.fromkeys(sampled.blocks, error.what)
            continue
        values |= rows_of(sampled.blocks, found.values)
        stderr |= {} if found.stderr is None else rows_of(sampled.blocks, found.stderr)
        spans |= {b: np.asarray(s, dtype=np.float64) for b, s in zip(sampled.blocks, found.spans, strict=False)}
        grids |= {f"{stack_of(sampled.blocks)}{name}": grid for name, grid in found.grids.items()}
    if refused is not None and not values:
        raise refused
    return Scores(measure=measure, values=values, stderr=stderr, spans=spans, grids=grids, missing=missing)


def rows_of(blocks: Sequence[str], values: ArrayLike) -> dict[str, Array]:
    """Values [blocks] as a table of arrays [1]."""
    return {b: np.array([v]) for b, v in zip(blocks, np.asarray(values, dtype=np.float64), strict=True)}


def stack_of(blocks: Sequence[str]) -> str:
    """What stands before "block." in a stack's ids: "" where there is one stack."""
    return blocks[0].rpartition("block.")[0]


def depths(blocks: Sequence[str]) -> tuple[str, ...]:
    """Names of the depths: before the first block, then behind each."""
    return ("input", *blocks)


def curves(blocks: Sequence[str], **columns: ArrayLike) -> Grid:
    """A grid of curves over depth, each [blocks + 1]."""
    values = np.stack([np.asarray(c, dtype=np.float64) for c in columns.values()], 1)
    return Grid(values=values, rows=depths(blocks), columns=tuple(columns))


def layer_map(blocks: Sequence[str], values: ArrayLike) -> Grid:
    """A grid of depths by depths."""
    return Grid(values=np.asarray(values, dtype=np.float64), rows=depths(blocks), columns=depths(blocks))


def behind(rows: Rows, front: int) -> Tensor:
    """Which tokens stand behind the first `front` of their sequence, bool [tokens].

    All do where positions are no tokens, and in sequences that are no longer than that.
    """
    if rows.ids is None or front < 1:
        return torch.ones(len(rows.position), dtype=torch.bool)
    lengths = torch.bincount(rows.sequence, minlength=rows.sequences)
    return (rows.position >= front) | (lengths <= front)[rows.sequence]


def kept(sampled: Sampled, rows: np.ndarray) -> Sampled:
    """Some rows of a sample: a mask or indices."""
    index = torch.from_numpy(np.arange(len(sampled.owner))[rows])
    return replace(
        sampled,
        states=sampled.states[:, index],
        owner=sampled.owner[rows],
        position=sampled.position[rows],
        ids=None if sampled.ids is None else sampled.ids[index],
        next_ids=None if sampled.next_ids is None else sampled.next_ids[index],
    )


def sampled_behind(sampled: Sampled, front: int) -> Sampled:
    """The sampled tokens behind the first `front` of their sequence; all, where none is or positions are no tokens."""
    rows = sampled.position >= front
    return sampled if sampled.ids is None or rows.all() or not rows.any() else kept(sampled, rows)


def sequences_of(sampled: Sampled) -> np.ndarray:
    """A number for each row's sequence [n]; a text that holds a sequence twice has two of them."""
    same = (sampled.owner[1:] == sampled.owner[:-1]) & (sampled.position[1:] == sampled.position[:-1])
    places = np.arange(len(sampled.owner))
    begins = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), places, 0))
    copy = places - begins
    return np.unique(sampled.owner * (copy.max() + 1) + copy, return_inverse=True)[1]


def over_sequences(sums: ArrayLike, counts: ArrayLike, sequences: np.ndarray) -> tuple[Array, Array]:
    """Σ sums / Σ counts over rows, and its standard error over sequences: each [k] from [k, n] (counts [n] do too)."""
    s = np.atleast_2d(np.asarray(sums, dtype=np.float64))
    n = np.broadcast_to(np.asarray(counts, dtype=np.float64), s.shape)
    size = int(sequences.max()) + 1
    value, error = np.zeros(len(s)), np.zeros(len(s))
    for row in range(len(s)):
        mean = Mean()
        mean.add(np.bincount(sequences, s[row], size), np.bincount(sequences, n[row], size))
        value[row], error[row] = mean.value, mean.stderr
    return value, error


def error_of(influence: ArrayLike, sequences: np.ndarray) -> Array:
    """Standard error over sequences, by the delta method: [k] from each row's influence on k values [k, n].

    √(G/(G-1) Σ_g (Σ of a sequence's rows)²), and NaN for fewer than two sequences.
    """
    rows = np.atleast_2d(np.asarray(influence, dtype=np.float64))
    size = int(sequences.max()) + 1
    if size < 2:
        return np.full(len(rows), np.nan)
    sums = np.stack([np.bincount(sequences, row, size) for row in rows])
    return np.sqrt((sums**2).sum(1) * size / (size - 1))


class BehindFirst:
    """Mean of `score(taps)` [tokens] over all tokens behind the first `front`, per site of the given kinds."""

    def __init__(self, measure: str, kinds: Sequence[str], score: Callable[[Taps], Tensor], front: int) -> None:
        self.measure, self.kinds, self.score, self.front = measure, tuple(kinds), score, front
        self.means: dict[str, Mean] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one site on one batch."""
        if site.kind in self.kinds:
            sums, counts = masked(taps, self.score(taps), behind(taps.rows, self.front))
            self.means.setdefault(site.id, Mean()).add(sums, counts)

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(self.measure, self.kinds, self.score, self.front)
        both.means = merged(self.means, other.means)
        return both

    def scores(self) -> Scores:
        """Values and standard errors so far, [1] per site."""
        return Scores(
            measure=self.measure,
            values={k: np.atleast_1d(m.value) for k, m in self.means.items()},
            stderr={k: np.atleast_1d(m.stderr) for k, m in self.means.items()},
        )


def masked(taps: Taps, values: Tensor, mask: Tensor) -> tuple[Array, Array]:
    """Sum and count per sequence of the `values` [tokens] where `mask` is true."""
    mask = mask.to(values.device)
    sums, _ = taps.per_sequence(torch.where(mask, values.double(), 0.0))
    counts, _ = taps.per_sequence(mask.double())
    return sums.cpu().numpy(), counts.cpu().numpy()


def merged(one: dict[str, Mean], other: dict[str, Mean]) -> dict[str, Mean]:
    """The means of both parts, by name."""
    return {k: one.get(k, Mean()).merge(other.get(k, Mean())) for k in {**one, **other}}
