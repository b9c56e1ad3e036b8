"""Geometric structure of layer updates: what of a block's update is a map of each token alone, and what is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.sample import Sampled
    from lamina.lab.sampled import Found, PerSample

PAPER = Paper(
    key="yoo2026geometric",
    title="On the Geometric Structure of Layer Updates in Deep Language Models",
    authors=("Jun-Sik Yoo",),
    year=2026,
    arxiv="2604.02459",
)


@measure(
    "tokenwise",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=(
        "the number of neighbours, the ridge and the class of maps were not found in the paper: they are options",
        "neighbours are nearest by angle and weigh the same, as norms differ by orders of magnitude between tokens",
        "the map is fitted to the update, so that the ridge pulls to the identity",
        "the first token of a sequence is left out: in many models nothing is like it",
        "where the update is zero, nothing is left of it: the residual's share is 0",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Tokenwise:
    """Keep what is no map of each token alone: ‖r‖²/‖d‖², averaged over tokens, of the update d = t + r.

    t is what a map fitted to the token's `neighbours` nearest other tokens, all at norm 1, makes of it: diagonal, plus
    one of rank `rank` on their principal directions. `ridge` is relative to the neighbours' energy. Grid `update`: the
    score, and the mean cosines of d to t and to r.
    """

    card: ClassVar[Card]

    sequences: int = 64
    each: int = 8
    neighbours: int = 32
    rank: int = 0
    ridge: float = 0.1

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.rank < 0:
            raise ValueError("neighbours must be at least 1, and rank not negative")
        if self.ridge <= 0:
            raise ValueError(f"ridge must be above 0, not {self.ridge:g}")

    def tally(self, anatomy: Anatomy) -> PerSample:
        """A sample of tokens; the maps are fitted in the end."""
        from lamina.lab.sampled import PerSample

        return PerSample(self.card.name, self._found, self.sequences, self.each)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]

    def _found(self, sampled: Sampled) -> Found:
        import torch

        from lamina.core.scores import Grid
        from lamina.lab.sampled import Found, over_sequences, sampled_behind, sequences_of

        sampled = sampled_behind(sampled, 1)
        itself = torch.from_numpy(
            (sampled.owner[:, None] == sampled.owner) & (sampled.position[:, None] == sampled.position)
        )
        shares, cosines = [], []
        for before, behind in zip(sampled.states[:-1], sampled.states[1:], strict=True):
            norms = before.double().norm(dim=1, keepdim=True).clamp_min(1e-300)
            units, update = before / norms, (behind - before) / norms
            own = tokenwise(units, update, nearest(units, itself, self.neighbours), self.rank, self.ridge)
            left = update - own
            energy = (update**2).sum(1)
            shares.append(((left**2).sum(1) / energy.clamp_min(1e-300)) * (energy > 0))
            cosines.append((_cosine(update, own), _cosine(update, left)))
        value, error = over_sequences(torch.stack(shares).numpy(), 1.0, sequences_of(sampled))
        columns = ("share of the residual", "cos(d, t)", "cos(d, r)")
        grid = Grid(values=np.column_stack([value, np.array(cosines)]), rows=sampled.blocks, columns=columns)
        return Found(values=value, stderr=error, grids={"update": grid})


def nearest(states: Tensor, itself: Tensor, count: int) -> Tensor:
    """Of each row of `states` [n, width] the `count` rows at the least angle, bool [n, n].

    `itself` [n, n] tells rows that are the same token: of these one is a neighbour of others, none of itself.
    """
    import torch

    units = torch.nn.functional.normalize(states.double(), dim=-1)
    again = itself.tril(-1).any(1)
    alike = (units @ units.T).masked_fill(itself | again, -torch.inf)
    best = alike.topk(min(count, len(states)), dim=-1).indices
    return torch.zeros_like(itself).scatter(1, best, True) & ~(itself | again)


def tokenwise(states: Tensor, updates: Tensor, near: Tensor, rank: int, ridge: float) -> Tensor:
    """What maps fitted to each row's neighbours make of the row: an estimate of `updates` [n, width], float64.

    The diagonal a_c = Σ x_c d_c / (Σ x_c² + λ), sums over neighbours and λ `ridge` times the mean of Σ x_c² over
    channels; then for rank > 0, of what it leaves, the ridge regression on the neighbours' principal directions.
    """
    import torch

    x, d, chosen = states.double(), updates.double(), near.double()
    squares = chosen @ (x * x)
    penalty = (ridge * squares.mean(1, keepdim=True)).clamp_min(1e-300)
    diagonal = (chosen @ (x * d)) / (squares + penalty)
    if not rank:
        return diagonal * x
    inner = x @ x.T
    within = inner.unsqueeze(0) * near.unsqueeze(1) * near.unsqueeze(2)
    energies, directions = torch.linalg.eigh(within)
    energies, directions = energies[:, -rank:], directions[:, :, -rank:]
    scores = (directions * (inner * near).unsqueeze(2)).sum(1)
    weights = (directions @ (scores / (energies + penalty)).unsqueeze(2)).squeeze(2)
    return diagonal * (x - weights @ x) + weights @ d


def _cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of rows; 0 where either is zero."""
    a, b = a.double(), b.double()
    norms = (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-300)
    return float(((a * b).sum(1) / norms).mean())
