"""A tally for measures that are a mean over positions of what a trial changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from lamina.core.errors import UnsupportedError
from lamina.core.scores import Scores
from lamina.core.sites import Kind, Site
from lamina.maths.divergence import KLFrom
from lamina.maths.moments import Mean

if TYPE_CHECKING:
    from lamina.lab.rows import Rows
    from lamina.lab.trials import Trial

CHUNK = 1 << 18
"""Numbers of an output that are compared at once, so that they stay in cache."""
Sums = tuple[Tensor, Tensor]
"""Of each sequence the sum of a value, and how many positions it was summed over: float64 [sequences] each."""


class PerTrial:
    """Σ / Σ over sequences of what `score(trial)` gives, per site of the given kinds; errors over sequences.

    `unit` is a name, or "damage" for that of the trials' own objective.
    """

    def __init__(self, measure: str, kinds: Sequence[Kind], score: Callable[[Trial], Sums], unit: str = "") -> None:
        self.measure, self.kinds, self.score, self.unit = measure, tuple(kinds), score, unit
        self.means: dict[str, Mean] = {}

    def add(self, site: Site, trial: Trial) -> None:
        """Take in one site on one batch."""
        sums, counts = self.score(trial)
        self.means.setdefault(site.id, Mean()).add(sums.cpu().numpy(), counts.cpu().numpy())
        self.unit = trial.objective.unit if self.unit == "damage" else self.unit

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(self.measure, self.kinds, self.score, other.unit if self.unit == "damage" else self.unit)
        for key in {**self.means, **other.means}:
            both.means[key] = self.means.get(key, Mean()).merge(other.means.get(key, Mean()))
        return both

    def scores(self) -> Scores:
        """Values and standard errors so far, [1] per site."""
        return Scores(
            measure=self.measure,
            values={k: np.atleast_1d(m.value) for k, m in self.means.items()},
            stderr={k: np.atleast_1d(m.stderr) for k, m in self.means.items()},
            unit="" if self.unit == "damage" else self.unit,
        )


def rise(trial: Trial) -> Sums:
    """The damage of the trial's own objective."""
    values, valid = trial.rise
    return values.sum(1), valid.sum(1).double()


Comparison = Callable[[Tensor, Tensor], Tensor]
"""(dense, thinned) rows [n, features], float32 → [n]."""


def over_outputs(trial: Trial, compare: Comparison) -> Sums:
    """Sums of a comparison of the outputs over all real positions of each sequence."""
    rows, values = compared(trial, compare)
    return _sums(values, rows.sequence, rows.sequences)


def compared(trial: Trial, compare: Comparison) -> tuple[Rows, Tensor]:
    """The outputs' positions, and a comparison of the outputs at the real ones [n], float64."""
    rows, dense, thinned = paired(trial)
    size = max(1, CHUNK // dense.shape[-1])
    pairs = zip(dense.split(size), thinned.split(size), strict=True)
    return rows, torch.cat([compare(a.float(), b.float()).double() for a, b in pairs])


def paired(trial: Trial) -> tuple[Rows, Tensor, Tensor]:
    """The outputs' positions, and both outputs at the real ones, [n, features] each."""
    dense, thinned = _rowed(trial.dense.out), _rowed(trial.thinned.out)
    rows = trial.rows.on(dense)
    return rows, rows.strip(dense), rows.strip(thinned)


class OutputKL:
    """KL in nats from the dense output distributions to the thinned ones; the dense softmax is computed once a batch.

    Raises UnsupportedError where outputs are no distributions.
    """

    def __init__(self) -> None:
        self._held: tuple[Tensor, KLFrom] | None = None

    def __call__(self, trial: Trial) -> Sums:
        """Sums over the real positions of each sequence."""
        expect_distributions(trial)
        rows, dense, thinned = paired(trial)
        if self._held is None or self._held[0] is not trial.dense.out:
            self._held = trial.dense.out, KLFrom(dense)
        found = self._held[1](thinned).double()
        return _sums(found, rows.sequence, rows.sequences)


def expect_distributions(trial: Trial) -> None:
    """Raise UnsupportedError where the model's outputs are vectors, and no logits."""
    if trial.objective.name == "output":
        hint = "output-mse compares any outputs"
        raise UnsupportedError("the model's outputs are no distributions", where=trial.site.id, hint=hint)


def over_states(trial: Trial, block: str, compare: Comparison) -> Sums:
    """Sums of a comparison of the streams behind a block over each sequence's tokens."""
    rows = rows_at(trial, block)
    return _sums(compare(*trial.states(block)).double(), rows.sequence, rows.sequences)


def rows_at(trial: Trial, block: str) -> Rows:
    """The positions of the streams behind a block of the trial's stack."""
    return trial.rows.of(trial.side).on(trial.dense.leaving[block])


def per_sequence(values: Tensor, rows: Rows) -> Tensor:
    """Sums of `values` [tokens] over each sequence, float64 [sequences]."""
    return _sums(values.double(), rows.sequence, rows.sequences)[0]


def turned(dense: Tensor, thinned: Tensor) -> Tensor:
    """1 - cos of rows [n, width], float64: exactly 0 of equal rows, 1 where one of the two is zero."""
    a, b = dense.double(), thinned.double()
    norm = ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()
    return torch.where(norm > 0, 1 - (a * b).sum(-1) / norm.clamp_min(1e-300), (a != b).any(-1).double())


def _rowed(out: Tensor) -> Tensor:
    """[batch, positions, features]: an output of one vector per sequence has one position."""
    return out.unsqueeze(1) if out.ndim == 2 else out.flatten(1, -2)


def _sums(values: Tensor, sequence: Tensor, sequences: int) -> Sums:
    owner, zero = sequence.to(values.device), torch.zeros(sequences, dtype=torch.float64, device=values.device)
    return zero.index_add(0, owner, values), zero.index_add(0, owner, torch.ones_like(values))
