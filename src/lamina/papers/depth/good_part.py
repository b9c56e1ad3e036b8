"""Skip to the Good Part: blocks whose output is like their input, in plateaus of alike layers, can be skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Array, Grid, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.sample import Sampled
    from lamina.lab.taps import Taps
    from lamina.maths.moments import Mean

PAPER = Paper(
    key="goel2026skip",
    title="Skip to the Good Part: Representation Structure & Inference-Time Layer Skipping in Diffusion vs. "
    "Autoregressive LLMs",
    authors=("Raghavv Goel", "Risheek Garrepalli", "Sudhanshu Agrawal", "Chris Lott", "Mingu Lee", "Fatih Porikli"),
    year=2026,
    arxiv="2603.07475",
)
FRONT = 1
"""Tokens at a sequence's beginning that are left out."""


@measure(
    "adjacent-similarity",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=(
        "on the text as it is: a diffusion model's denoising steps and masked inputs are not run",
        "maps and runs of blocks are those of a sample of tokens",
        "the paper's choice (cosine above 0.95, no two neighbours) has no recipe row: no planner refuses neighbours",
    ),
)
@dataclass(frozen=True, kw_only=True)
class AdjacentSimilarity:
    """Keep what turns the stream: 1 - cos(h_l, h_{l+1}), averaged over all tokens but each sequence's first.

    `spans` has the same for runs of blocks, on a sample of `sequences` x `each` tokens. Grids: `similarity`, the mean
    cosine of all pairs of depths; `depths`, per depth its cosine to the first (drift) and the mean cosine of a token's
    state to that of the token before it (recency).
    """

    card: ClassVar[Card]

    sequences: int = 64
    each: int = 8

    def tally(self, anatomy: Anatomy) -> Similarities:
        """Token means, and a sample for the maps."""
        stacks = [[b.site.id for b in k.blocks] for k in anatomy.stacks]
        return Similarities(self.card.name, stacks, self.sequences, self.each)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


class Similarities:
    """Means of 1 - cos across blocks and of cosines of neighbours, and a sample of tokens at all depths."""

    def __init__(self, measure: str, stacks: list[list[str]], sequences: int, each: int) -> None:
        from lamina.lab.sample import TokenSample

        self.measure, self.stacks = measure, stacks
        self.sample = TokenSample(sequences, each)
        self.across: dict[str, Mean] = {}
        self.recency: dict[str, Mean] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one block on one batch."""
        from lamina.lab.sampled import behind, masked
        from lamina.maths.moments import Mean

        if site.kind is not Kind.BLOCK:
            return
        self.sample.add(site, taps)
        mask = behind(taps.rows, FRONT)
        self.across.setdefault(site.id, Mean()).add(*masked(taps, 1 - taps.cosine, mask))
        pairs = mask[1:] & mask[:-1] & (taps.rows.sequence[1:] == taps.rows.sequence[:-1])
        self._note(f"before {site.id}", taps, _neighbours(taps.x, taps.xx), pairs)
        if any(site.id == blocks[-1] for blocks in self.stacks):
            self._note(f"behind {site.id}", taps, _neighbours(taps.leaving, taps.yy), pairs)

    def _note(self, name: str, taps: Taps, cosines: Tensor, pairs: Tensor) -> None:
        import torch

        from lamina.lab.sampled import masked
        from lamina.maths.moments import Mean

        nothing = cosines.new_zeros(1)
        mask = torch.cat([torch.zeros(1, dtype=torch.bool), pairs])
        self.recency.setdefault(name, Mean()).add(*masked(taps, torch.cat([nothing, cosines]), mask))

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        from lamina.lab.sampled import merged

        both = type(self)(self.measure, self.stacks, self.sample.sequences, self.sample.each)
        both.sample = self.sample.merge(other.sample)
        both.across, both.recency = merged(self.across, other.across), merged(self.recency, other.recency)
        return both

    def scores(self) -> Scores:
        """Scores of all tokens; runs and maps of the sample."""
        import numpy as np

        from lamina.core.scores import Scores
        from lamina.lab.sampled import stack_of

        spans: dict[str, Array] = {}
        grids: dict[str, Grid] = {}
        for sampled in self.sample.stacks():
            cosines = _map(sampled)
            spans |= {b: 1 - cosines[i, i + 1 :] for i, b in enumerate(sampled.blocks)}
            grids |= {f"{stack_of(sampled.blocks)}{k}": g for k, g in self._grids(sampled, cosines).items()}
        return Scores(
            measure=self.measure,
            values={k: np.atleast_1d(m.value) for k, m in self.across.items()},
            stderr={k: np.atleast_1d(m.stderr) for k, m in self.across.items()},
            spans=spans,
            grids=grids,
        )

    def _grids(self, sampled: Sampled, cosines: Array) -> dict[str, Grid]:
        from lamina.lab.sampled import curves, layer_map

        names = [*(f"before {b}" for b in sampled.blocks), f"behind {sampled.blocks[-1]}"]
        recency = [float(self.recency[n].value) for n in names]
        return {
            "similarity": layer_map(sampled.blocks, cosines),
            "depths": curves(sampled.blocks, drift=cosines[0], recency=recency),
        }


def _neighbours(states: Tensor, squares: Tensor) -> Tensor:
    """Cosine of every token's state to that of the one before it [tokens - 1]; 0 where either is zero."""
    import torch

    dots = torch.linalg.vecdot(states[1:], states[:-1]).double()
    return dots / (squares[1:] * squares[:-1]).sqrt().clamp_min(1e-300)


def _map(sampled: Sampled) -> Array:
    """Mean cosines of all pairs of depths [blocks + 1, blocks + 1]."""
    import torch

    from lamina.lab.sampled import sampled_behind

    states = sampled_behind(sampled, FRONT).states
    units = torch.nn.functional.normalize(states.double(), dim=-1).flatten(1)
    return (units @ units.T / states.shape[1]).clamp(-1, 1).numpy()
