"""Direct matching: how well the best affine map of a block's input stands for its output; and maps of likeness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Grid, Scores
    from lamina.lab import Lab
    from lamina.lab.sample import Sampled
    from lamina.lab.sampled import Found, PerSample

PAPER = Paper(
    key="balogh2024stitch",
    title="How not to Stitch Representations to Measure Similarity: Task Loss Matching versus Direct Matching",
    authors=("András Balogh", "Márk Jelasity"),
    year=2024,
    arxiv="2412.11299",
)
FRONT = 1
"""Tokens at a sequence's beginning that are left out."""
ROWS = 256
"""At most so many tokens are compared in the maps of depths."""


@measure(
    "direct-matching",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=(
        "from a block's input to its output; the paper matches layers of two networks",
        "the loss is that on held-out sequences, each in turn; the paper's, on the rows of the fit, is in the grid",
        "ridge regression of the update, so that the ridge pulls to the identity; the paper takes the pseudo-inverse",
        "the first token of a sequence is left out: in many models its huge norm would be all of the loss",
        "CCA and Procrustes compare principal directions: of all channels CCA finds 1 unless rows far outnumber them",
    ),
)
@dataclass(frozen=True, kw_only=True)
class DirectMatching:
    """Keep what no affine map of the input can replace: Σ‖x W + b - y‖² / Σ‖y‖² on sequences that were held out.

    `ridge` is relative to the number of tokens times their median energy. Errors take the maps as known. Grids:
    `matching`, the loss on held-out and on fitted rows; `cka` (linear, of the unbiased estimate where `debiased`),
    `cca` (mean squared canonical correlation) and `procrustes` (orthogonal Procrustes distance) of all pairs of depths,
    the latter two on `components` directions.
    """

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "errors take maps as known, while leaving a sequence out fits others"
    }

    card: ClassVar[Card]

    sequences: int = 64
    each: int = 8
    ridge: float = 0.002
    components: int = 16
    debiased: bool = True

    def __post_init__(self) -> None:
        if self.ridge <= 0:
            raise ValueError(f"ridge must be above 0, not {self.ridge:g}")
        if self.components < 1:
            raise ValueError(f"components must be at least 1, not {self.components}")

    def tally(self, anatomy: Anatomy) -> PerSample:
        """A sample of tokens; the maps are fitted in the end."""
        from lamina.lab.sampled import PerSample

        return PerSample(self.card.name, self._found, self.sequences, self.each)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]

    def _found(self, sampled: Sampled) -> Found:
        from lamina.core.scores import Grid
        from lamina.lab.sampled import Found, over_sequences, sampled_behind, sequences_of
        from lamina.maths.maps import Ridge

        sampled = sampled_behind(sampled, FRONT)
        errors, fitted, energy = [], [], []
        for before, behind in zip(sampled.states[:-1], sampled.states[1:], strict=True):
            ridge, update = Ridge(before, self.ridge), behind - before
            errors.append((ridge.held_out(update, sampled.owner) ** 2).sum(1).numpy())
            fitted.append(float((ridge.fitted(update) ** 2).sum()))
            energy.append((behind.double() ** 2).sum(1).clamp_min(1e-300).numpy())
        value, error = over_sequences(np.stack(errors), np.stack(energy), sequences_of(sampled))
        table = np.column_stack([value, np.array(fitted) / np.sum(energy, 1)])
        grid = Grid(values=table, rows=sampled.blocks, columns=("held out", "fitted"))
        return Found(values=value, stderr=error, grids={"matching": grid, **self._likeness(sampled)})

    def _likeness(self, sampled: Sampled) -> dict[str, Grid]:
        from lamina.lab.sampled import layer_map
        from lamina.maths.similarity import depth_maps

        some = sampled.states[:, :: -(-len(sampled.owner) // ROWS)]
        found = depth_maps(some, self.components, debiased=self.debiased and some.shape[1] > 3)
        return {name: layer_map(sampled.blocks, values.numpy()) for name, values in found.items()}
