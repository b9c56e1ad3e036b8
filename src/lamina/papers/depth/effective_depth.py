"""Do Language Models Use Their Depth Efficiently: what each layer adds next to the stream, and to the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.sample import Sampled
    from lamina.lab.sampled import BehindFirst, Found, PerSample
    from lamina.lab.taps import Taps

PAPER = Paper(
    key="csordas2025depth",
    title="Do Language Models Use Their Depth Efficiently?",
    authors=("Róbert Csordás", "Christopher D. Manning", "Christopher Potts"),
    year=2025,
    arxiv="2505.13898",
)
FRONT = (
    "the first token of a sequence is left out: in many models its huge norm would make the mean of one block "
    "(front=0 takes all tokens)"
)

CELLS = 2**24
"""Logits that are held at once."""


def _not_negative(front: int) -> None:
    if front < 0:
        raise ValueError(f"front must not be negative, not {front}")


def _contribution(taps: Taps) -> Tensor:
    """‖f‖ / max(‖x‖, 1e-6) per token."""
    return taps.ff.sqrt() / taps.xx.sqrt().clamp_min(1e-6)


def _against(taps: Taps) -> Tensor:
    """-cos(f, x) per token; 0 where either is zero."""
    xx, xf, ff = taps.dots
    norm = (xx * ff).sqrt()
    return -xf / norm.clamp_min(1e-300) * (norm > 0)


@measure(
    "relative-contribution",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.FORWARD,
    status="stable",
    deviations=(FRONT,),
)
@dataclass(frozen=True, kw_only=True)
class RelativeContribution:
    """Keep what adds much: ‖f(x)‖ / max(‖x‖, 1e-6), averaged over tokens."""

    card: ClassVar[Card]

    front: int = 1

    def __post_init__(self) -> None:
        _not_negative(self.front)

    def tally(self, anatomy: Anatomy) -> BehindFirst:
        """Token means for blocks and sublayers alike."""
        from lamina.lab.sampled import BehindFirst

        return BehindFirst(self.card.name, self.card.on, _contribution, self.front)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


@measure(
    "contribution-cosine",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.FORWARD,
    status="stable",
    deviations=(FRONT, "the score is minus the paper's cosine, so that what only amplifies the stream is lowest"),
)
@dataclass(frozen=True, kw_only=True)
class ContributionCosine:
    """Keep what turns or erases: -cos(f(x), x), averaged over tokens; a diagnostic more than a ranking.

    Above 0 a site erases what is there, around 0 it adds a new direction, below 0 it amplifies: the next norm takes
    most of that back, so that such sites rank lowest. A site that adds nothing has 0 and stands in the middle.
    """

    card: ClassVar[Card]

    front: int = 1

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_identity_block_is_lowest": "adding nothing is cosine 0, above blocks that amplify",
        "check_silent_sublayer_is_lowest": "adding nothing is cosine 0, above sublayers that amplify",
    }

    def __post_init__(self) -> None:
        _not_negative(self.front)

    def tally(self, anatomy: Anatomy) -> BehindFirst:
        """Token means for blocks and sublayers alike."""
        from lamina.lab.sampled import BehindFirst

        return BehindFirst(self.card.name, self.card.on, _against, self.front)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


@measure(
    "logit-lens",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=(
        "the divergence is KL(final ‖ lens); the paper's direction was not found",
        "the paper draws curves; a block is scored by the size of the step that the KL takes across it",
        "a sample of tokens, as every depth costs a head",
    ),
)
@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """Keep what moves the prediction: |KL before - KL behind the block|, of the lens at each depth to the final one.

    The lens reads a state by the last norm and the head. `sequences` x `each` tokens are read at every depth. Grid
    `lens`: the mean KL(final ‖ lens) in nats, and the share of the final top 5 that the lens has, at all depths.
    """

    card: ClassVar[Card]

    sequences: int = 32
    each: int = 2
    top: int = 5

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top must be at least 1, not {self.top}")

    def tally(self, anatomy: Anatomy) -> PerSample:
        """A sample that is decoded at all depths in the end."""
        from lamina.lab.sampled import PerSample

        def find(sampled: Sampled) -> Found:
            from lamina.lab.lab import decoder

            return _lenses(sampled, decoder(anatomy), self.top)

        return PerSample(self.card.name, find, self.sequences, self.each)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text, and heads over the sample."""
        return lab.stream([self.tally(lab.anatomy)])[0]


def _lenses(sampled: Sampled, decode: Callable[[Tensor], Tensor], top: int) -> Found:
    """KL and overlap at all depths [blocks + 1, n], and the steps of their means."""
    import numpy as np
    import torch

    from lamina.lab.sampled import Found, curves, over_sequences, sequences_of
    from lamina.maths.divergence import KLFrom

    count = sampled.states.shape[1]
    final = decode(sampled.states[-1])
    divergence, top = KLFrom(final), min(top, final.shape[-1])
    best = final.topk(top).indices.unsqueeze(2)
    kl, overlap = [], []
    for states in sampled.states.split(max(1, CELLS // final.numel())):  # a head's weights are read once for many rows
        for lens in decode(states.flatten(0, 1)).split(count):
            kl.append(divergence(lens).double())
            overlap.append((lens.topk(top).indices.unsqueeze(1) == best).any(2).double().mean(1))
    per_token = torch.stack(kl).cpu().numpy()
    steps, errors = over_sequences(-np.diff(per_token, axis=0), 1.0, sequences_of(sampled))
    grid = curves(sampled.blocks, kl=per_token.mean(1), overlap=torch.stack(overlap).mean(1).cpu().numpy())
    return Found(values=np.abs(steps), stderr=errors, grids={"lens": grid})
