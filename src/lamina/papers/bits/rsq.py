"""RSQ: rounding is fitted to the tokens that others attend to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from lamina.core.documents import Step
from lamina.core.errors import UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Kind
from lamina.rewrites.quantise import Quantise, examples

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.moments import InputMoments
    from lamina.lab.taps import Taps
    from lamina.maths.grids import AnyGrid

PAPER = Paper(
    key="sung2025rsq",
    title="RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
    authors=("Yi-Lin Sung", "Prateek Yadav", "Jialu Li", "Jaehong Yoon", "Mohit Bansal"),
    year=2025,
    arxiv="2503.01820",
)


@rewrite(
    "rsq",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "nothing is rotated: the paper first turns the stream and the heads by random Hadamard matrices",
        "a token counts by its importance, of mean 1 in a sequence, as in the code; the paper's formula squares it",
        "inputs and attention are those of the network as it was, and sequences are not shifted to make more of them",
        "grids are GGUF's, with steps from the weights alone: the code searches where to clip the rows",
        "maps before their block's attention, or in a block without, count all tokens alike",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Rsq(Quantise):
    """GPTQ, where a token counts by the attention that it gets in the map's own block.

    The sum over heads and queries goes to [`least`, 1] in each sequence, and is then scaled to mean 1 there. `damping`
    raises the diagonal of Σ w x xᵀ by that share of its mean.
    """

    card: ClassVar[Card]
    informed: ClassVar[bool] = True

    least: float = 0.005
    damping: float = 0.01

    def __post_init__(self) -> None:
        for name in ("least", "damping"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], not {getattr(self, name)}")

    def moments(self, lab: Lab, sites: Iterable[str]) -> InputMoments:
        """Σ w x xᵀ of every map, in one forward."""
        tally = Concentrated(sites, self.least)
        lab.stream([tally], "inputs", score=False)
        return tally.moments

    def rounded(self, weight: Tensor, grid: AnyGrid, dtype: torch.dtype, moment: Tensor | None, tokens: int) -> Tensor:
        """Input by input, by the inverse moment's Cholesky factor."""
        from lamina.maths.grids import compensated

        assert moment is not None
        return compensated(weight, moment, grid, dtype, self.damping)

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries."""
        return examples("rsq", anatomy)


class Concentrated:
    """Moments of maps' inputs, tokens weighted by the attention of the block at hand: blocks come in turn."""

    wants: ClassVar[frozenset[str]] = frozenset({"attention", "linears"})

    def __init__(self, sites: Iterable[str], least: float) -> None:
        from lamina.lab.moments import InputMoments

        self.moments, self.least = InputMoments(sites), least
        self._weights: Tensor | None = None

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one site on one batch."""
        from lamina.lab.taps import Taps

        if site.kind is Kind.BLOCK:
            self._weights = None
        elif site.kind is Kind.ATTENTION:
            self._weights = self._seen(site, taps)
        elif site.kind is Kind.LINEAR:
            x = taps.entering.float()
            if self._weights is not None:
                x = x * self._weights.to(x.device).sqrt().unsqueeze(-1)
            self.moments.add(site, Taps(x, x[:, :0], taps.sequence, taps.sequences, rows=taps.rows))

    def _seen(self, site: Site, taps: Taps) -> Tensor:
        """The weight of each token [tokens]."""
        import torch

        if taps.attention is None:
            raise UnsupportedError("its attention weights can't be seen", where=site.id, hint="use gptq")
        sums = [taps.attention.weights(s).sum((0, 1)) for s in range(taps.sequences)]
        return torch.cat([importance(s, self.least) for s in sums])

    def merge(self, other: Self) -> Self:
        """The sums of both parts."""
        both = type(self)((), self.least)
        both.moments = self.moments.merge(other.moments)
        return both

    def scores(self) -> Scores:
        """A tally's table; these sums score nothing."""
        return self.moments.scores()


def importance(attention: Tensor, least: float) -> Tensor:
    """Weights of mean 1 of one sequence's tokens, by the attention [tokens] that each gets; equal ones where all get
    the same.
    """
    low, high = attention.min(), attention.max()
    if not bool(high > low):
        return attention.new_ones(attention.shape)
    weights = least + (1 - least) * (attention - low) / (high - low)
    return weights / weights.mean()
