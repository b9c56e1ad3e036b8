"""Opening the Black Box: where each layer stands in the plane of information on the input and on the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.errors import UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.sample import Sampled
    from lamina.lab.sampled import Found, PerSample

PAPER = Paper(
    key="shwartzziv2017opening",
    title="Opening the Black Box of Deep Neural Networks via Information",
    authors=("Ravid Shwartz-Ziv", "Naftali Tishby"),
    year=2017,
    arxiv="1703.00810",
)


@measure(
    "information-plane",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=(
        "on a trained network, across its depth; the paper follows each layer over the training",
        "principal directions of the states are binned, not every unit: wide layers would all be at log2 of the rows",
        "bins span the range of the sampled states; the code's are 29 between -1 and 1, for tanh",
        "the first token of a sequence is left out: in many models its huge norm would fix the range of the bins",
    ),
)
@dataclass(frozen=True, kw_only=True)
class InformationPlane:
    """Keep what moves in the information plane: the distance in bits of (I(X;T), I(T;Y)) before and behind the block.

    T is the cell of a state among `bins` equal bins along each of its depth's `components` principal directions; X the
    token with all that it has read, so that I(X;T) = H(T); Y the next token's id (of positions that are no tokens, the
    sequence). Grids: `plane`, both at all depths; `rows`: how many tokens there were, their H(Y), bins and components.
    Few tokens overestimate both. Errors, by the delta method, take the bins as known.
    """

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "errors take bins as known, while leaving a sequence out moves them"
    }

    card: ClassVar[Card]

    sequences: int = 64
    each: int = 8
    components: int = 2
    bins: int = 6

    def __post_init__(self) -> None:
        if self.components < 1 or self.bins < 2:
            raise ValueError("components must be at least 1, and bins at least 2")

    def tally(self, anatomy: Anatomy) -> PerSample:
        """A sample of tokens; they are binned in the end."""
        from lamina.lab.sampled import PerSample

        return PerSample(self.card.name, self._found, self.sequences, self.each)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]

    def _found(self, sampled: Sampled) -> Found:
        from lamina.core.scores import Grid
        from lamina.lab.sampled import Found, curves, error_of, kept, sampled_behind, sequences_of

        sampled = sampled_behind(sampled, 1)
        if sampled.next_ids is not None:
            sampled = kept(sampled, sampled.next_ids.numpy() >= 0)
        if not len(sampled.owner):
            raise UnsupportedError("no sampled token has a next one", hint="give it more text")
        labels = sampled.owner if sampled.next_ids is None else sampled.next_ids.numpy()
        cells = [binned(s.numpy(), self.components, self.bins) for s in sampled.states]

        found = np.array([plane(c, labels) for c in cells])
        steps = np.diff(found, axis=0)
        moved = np.hypot(*steps.T)
        moves = np.diff(np.stack([surprise(c, labels) for c in cells]), axis=0)
        along = np.einsum("li,lin->ln", steps / np.maximum(moved, 1e-300)[:, None], moves)
        size = np.array([[len(labels), entropy(labels), self.bins, self.components]], dtype=np.float64)
        return Found(
            values=moved,
            stderr=error_of(along, sequences_of(sampled)),
            grids={
                "plane": curves(sampled.blocks, **{"I(X;T)": found[:, 0], "I(T;Y)": found[:, 1]}),
                "rows": Grid(values=size, rows=("sample",), columns=("tokens", "H(Y)", "bins", "components")),
            },
        )


def binned(states: np.ndarray, components: int, bins: int) -> np.ndarray:
    """A cell's number for each row of `states` [n, width]: equal bins over the range of each principal direction."""
    import torch

    from lamina.maths.similarity import principal

    basis, sizes = principal(torch.from_numpy(states), components)
    scores = (basis * sizes).numpy()
    cells = np.zeros(len(states), dtype=np.int64)
    for column in scores.T:
        low, high = column.min(), column.max()
        place = np.floor((column - low) / max(high - low, 1e-300) * bins)
        cells = cells * bins + np.clip(place, 0, bins - 1).astype(np.int64)
    return cells


def entropy(symbols: np.ndarray) -> float:
    """-Σ p log2 p of symbols [n], in bits."""
    counts = np.unique(symbols, return_counts=True)[1] / max(len(symbols), 1)
    return float(-(counts * np.log2(counts)).sum())


def surprise(cells: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each row's influence on the two numbers of `plane` [2, n]: the row's share of each entropy, minus the mean."""
    codes = np.unique(labels, return_inverse=True)[1]

    def share(symbols: np.ndarray) -> np.ndarray:
        _, place, times = np.unique(symbols, return_inverse=True, return_counts=True)
        bits = -np.log2(times / len(symbols))[place]
        return (bits - bits.mean()) / len(symbols)

    own = share(cells)
    return np.stack([own, own + share(codes) - share(cells * (codes.max(initial=0) + 1) + codes)])


def plane(cells: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(I(X;T), I(T;Y)) in bits of symbols T and Y [n], where each row is an X of its own."""
    codes = np.unique(labels, return_inverse=True)[1]
    joint = entropy(cells * (codes.max(initial=0) + 1) + codes)
    own = entropy(cells)
    return own, own + entropy(labels) - joint
