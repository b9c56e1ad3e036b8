"""When Does Sparsity Mitigate the Curse of Depth: four ways to ask whether a layer does anything of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.papers.depth._layer_effectiveness import CausalEffects

PAPER = Paper(
    key="muhtar2026sparsity",
    title="When Does Sparsity Mitigate the Curse of Depth in LLMs",
    authors=(
        "Dilxat Muhtar",
        "Xinyuan Song",
        "Sebastian Pokutta",
        "Max Zimmer",
        "Nico Pelleriti",
        "Thomas Hofmann",
        "Shiwei Liu",
    ),
    year=2026,
    arxiv="2603.15389",
)


def _expect_some(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is at least 1, not {count}")


@measure("causal-effect", PAPER, on=Kind.BLOCK, needs=Need.ABLATION, status="stable")
@dataclass(frozen=True, kw_only=True)
class CausalEffect:
    """Keep blocks that later blocks build on: how far later updates move without it, as a ratio of means over tokens.

    C[s, l] = mean ‖u_l - ū_l‖ / mean ‖u_l‖ with u_l what block l adds and ū_l what it adds without block s. The score
    is the mean of row s over all blocks, of which those up to s count as zero, as in the code: the last block has no
    effect by definition. Grid `effects`: C.
    """

    card: ClassVar[Card]

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_identity_block_is_lowest": "the last block has no later block to act upon: as published, it has no effect"
    }

    def tally(self, anatomy: Anatomy) -> CausalEffects:
        """Sums over tokens of every sequence, from the shared sweep."""
        from lamina.papers.depth._layer_effectiveness import CausalEffects

        return CausalEffects(self.card.name)

    def measure(self, lab: Lab) -> Scores:
        """One partial forward per block."""
        return lab.sweep([self.tally(lab.anatomy)])[0]


@measure(
    "permutation",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.ABLATION,
    status="stable",
    deviations=(
        "pairs at most `reach` apart change places; the paper takes all pairs",
        "the paper sums pairs up for the network; a block is scored by the mean over its own pairs",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Permutation:
    """Keep blocks whose place matters: |loss - loss with two blocks exchanged| / loss, averaged over its neighbours.

    All parameters of the two change places. Pairs at most `reach` apart are tried, on the first `length` tokens of
    `sequences` sequences (None takes all). Blocks built in other ways than all in reach have no score. Grid `pairs`: P.
    """

    card: ClassVar[Card]

    reach: int = 1
    sequences: int | None = 32
    length: int | None = 32

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_identity_block_is_lowest": "beside an identity block, the last block changes places for free as well"
    }

    def __post_init__(self) -> None:
        _expect_some(reach=self.reach, sequences=self.sequences, length=self.length)

    def measure(self, lab: Lab) -> Scores:
        """A partial forward per pair."""
        from lamina.lab.resume import few
        from lamina.papers.depth._layer_effectiveness import permutation

        return permutation(self.card.name, few(lab, self.sequences, self.length), self.reach)


@measure(
    "usefulness",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.ABLATION,
    status="stable",
    deviations=(
        "the maps are fitted by ridge to what a block adds, each to all sequences but the one it is judged on; the code "
        "fits and judges on the same tokens",
        "the paper reports the share of layers above a threshold (grid `usefulness`); a block is scored by its own ratio",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Usefulness:
    """Keep blocks that no affine map replaces: loss with the best affine map in the block's place, over the loss.

    The first `length` tokens of `sequences` sequences (None takes all); `ridge`: see `lamina.maths.maps.Ridge`.
    A block counts as useful above the ratio `threshold`. Grid `usefulness`: per block both losses, ratio, and whether
    it is useful.
    """

    card: ClassVar[Card]

    sequences: int | None = 32
    length: int | None = 64
    ridge: float = 0.01
    threshold: float = 1.1

    def __post_init__(self) -> None:
        _expect_some(sequences=self.sequences, length=self.length)
        if self.ridge <= 0:
            raise ValueError(f"ridge is above 0, not {self.ridge:g}")

    def measure(self, lab: Lab) -> Scores:
        """A fit and a partial forward per block."""
        from lamina.lab.resume import few
        from lamina.papers.depth._layer_effectiveness import usefulness

        return usefulness(self.card.name, few(lab, self.sequences, self.length), self.ridge, self.threshold)


@measure(
    "jacobian",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.GRADIENT,
    status="stable",
    deviations=("the norm is estimated from random vectors, unless probes=0 takes all channels one by one as the code",),
)
@dataclass(frozen=True, kw_only=True)
class Jacobian:
    """Keep blocks that are no identity: ‖J - I‖ / √D² of the Jacobian of the block's output, summed over tokens.

    J = mean over sequences and positions s of ∂ Σ_t h'[t] / ∂ h[s], of width D. `probes` random sign vectors v estimate
    the Frobenius norm from vᵀ(J - I), without bias of its square; 0 takes the exact one. The first `length` tokens of
    `sequences` sequences (None takes all). Grid `jacobian` (where exact): deviation, mean and spread of the diagonal,
    the rest, norm, and largest singular value.
    """

    card: ClassVar[Card]

    probes: int = 8
    sequences: int | None = 32
    length: int | None = 32
    seed: int | None = None

    def __post_init__(self) -> None:
        _expect_some(sequences=self.sequences, length=self.length)
        if self.probes < 0:
            raise ValueError(f"probes is at least 0, not {self.probes}")

    def measure(self, lab: Lab) -> Scores:
        """One forward, and a backward per probe."""
        from lamina.lab.resume import few
        from lamina.papers.depth._layer_effectiveness import jacobians

        seed = lab.seed if self.seed is None else self.seed
        return jacobians(self.card.name, few(lab, self.sequences, self.length), self.probes, seed)
