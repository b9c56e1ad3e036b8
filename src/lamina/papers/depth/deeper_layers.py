"""The Unreasonable Ineffectiveness of the Deeper Layers: a run of blocks with little angle across it can go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, recipe
from lamina.core.sites import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.taps import Taps
    from lamina.maths.moments import Mean

PAPER = Paper(
    key="gromov2024unreasonable",
    title="The Unreasonable Ineffectiveness of the Deeper Layers",
    authors=("Andrey Gromov", "Kushal Tirumala", "Hassan Shapourian", "Paolo Glorioso", "Daniel A. Roberts"),
    year=2024,
    arxiv="2403.17887",
)


@measure("angular", PAPER, on=Kind.BLOCK, needs=Need.FORWARD, status="stable")
@dataclass(frozen=True, kw_only=True)
class Angular:
    """Keep runs of n blocks by arccos(cos(input of the first, output of the last)) / π at the last token (eq. 5).

    The score of a single block is that of the run of one; `spans` has all runs.
    """

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy) -> Angles:
        """A tally that compares the last tokens' states of all depths of a batch."""
        return Angles(self.card.name, [[b.site.id for b in k.blocks] for k in anatomy.stacks])

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


class Angles:
    """Means over sequences of the angle between the streams before block i and after block i + n - 1 of a stack."""

    def __init__(self, measure: str, stacks: list[list[str]]) -> None:
        self.measure, self.stacks = measure, stacks
        self.means: dict[str, Mean] = {}
        self._states: dict[tuple[int, int], list[Tensor]] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Note the last tokens before each block; compare when a stack's last block has come."""
        if site.kind is not Kind.BLOCK:
            return
        stack = next(n for n, blocks in enumerate(self.stacks) if site.id in blocks)
        met = self._states.setdefault((taps.rows.number, stack), [])
        if not met:
            met.append(taps.x[taps.last].double())
        met.append(taps.leaving[taps.last].double())
        if len(met) > len(self.stacks[stack]):
            self._compare(self.stacks[stack], self._states.pop((taps.rows.number, stack)))

    def _compare(self, blocks: list[str], met: list[Tensor]) -> None:
        import torch

        from lamina.maths.moments import Mean

        states = torch.nn.functional.normalize(torch.stack(met), dim=-1)
        for first, block in enumerate(blocks):
            cosines = (states[first] * states[first + 1 :]).sum(-1).clamp(-1, 1)
            angles = (torch.arccos(cosines) / math.pi).T
            self.means.setdefault(block, Mean()).add(angles.cpu().numpy(), torch.ones(len(angles)).numpy())

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        from lamina.maths.moments import Mean

        both = type(self)(self.measure, self.stacks)
        for key in {**self.means, **other.means}:
            both.means[key] = self.means.get(key, Mean()).merge(other.means.get(key, Mean()))
        return both

    def scores(self) -> Scores:
        """`values` for runs of one block, `spans` for all runs."""
        from lamina.core.scores import Scores

        return Scores(
            measure=self.measure,
            values={k: m.value[:1] for k, m in self.means.items()},
            stderr={k: m.stderr[:1] for k, m in self.means.items()},
            spans={k: m.value for k, m in self.means.items()},
        )


recipe(
    "angular",
    PAPER,
    summary="Deeper Layers: the run of blocks with the least angle across it goes.",
    measure="angular",
    planner="contiguous",
    kinds=(Kind.BLOCK,),
    status="stable",
)
