"""γ-MoD's ARank: attention maps of low rank move few distinct mixtures of tokens about."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.attention import Attention
    from lamina.lab.taps import Taps

PAPER = Paper(
    key="luo2024gammamod",
    title="γ-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models",
    authors=("Yaxin Luo", "Gen Luo", "Jiayi Ji", "Yiyi Zhou", "Xiaoshuai Sun", "Zhiqiang Shen", "Rongrong Ji"),
    year=2024,
    arxiv="2410.13859",
)


@measure(
    "arank",
    PAPER,
    on=Kind.ATTENTION,
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "maps of the first `length` tokens: for causal attention those of the text cut there, for others a corner",
        "attentions are scored; the paper converts their whole layers",
        "the score is the mean over sequences, as in the paper; the code prints one rank per sample",
    ),
)
@dataclass(frozen=True, kw_only=True)
class ARank:
    """The rank of an attention's maps, their diagonals set to 0, averaged over heads and sequences.

    Singular values above σ_max · tokens · 1.2e-7 count, in float32. At most `sequences` sequences, whose choice
    follows from what they hold, and the first `length` tokens of each.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_silent_sublayer_is_lowest": "maps are looked at, not what the attention adds: a silent one's may have "
        "full rank"
    }

    length: int = 32
    sequences: int = 24

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"length must be at least 2, not {self.length}")
        if self.sequences < 1:
            raise ValueError(f"sequences must be at least 1, not {self.sequences}")

    def tally(self, anatomy: Anatomy) -> Ranks:
        """Mean ranks of the chosen sequences."""
        return Ranks(self.card.name, self.length, self.sequences)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


class Ranks:
    """Of each attention, (key, mean rank over heads) of the sequences of least key."""

    wants = frozenset({"attention"})

    def __init__(self, measure: str, length: int, sequences: int) -> None:
        self.settings = (measure, length, sequences)
        self.ranks: dict[str, list[tuple[int, float]]] = {}
        self.refused: dict[str, str] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one attention on one batch."""
        if site.kind is not Kind.ATTENTION:
            return
        _, length, sequences = self.settings
        if (why := _unfit(taps)) is not None:
            self.refused[site.id] = why
            return
        chosen = taps.rows.sequence[taps.rows.picked(sequences, 1)].tolist()
        by_size: dict[int, list[tuple[int, Tensor]]] = {}
        for sequence in chosen:
            kept = _map(taps, sequence, length)
            by_size.setdefault(kept.shape[-1], []).append((int(taps.rows.owners[sequence]), kept))
        for group in by_size.values():
            found = mean_ranks([kept for _, kept in group])
            own = self.ranks.setdefault(site.id, [])
            own += [(key, rank) for (key, _), rank in zip(group, found, strict=True)]

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(*self.settings)
        for key in {**self.ranks, **other.ranks}:
            both.ranks[key] = self._least([*self.ranks.get(key, []), *other.ranks.get(key, [])])
        both.refused = self.refused | other.refused
        return both

    def _least(self, ranks: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """Those of the sequences of least key; equal ones stay together."""
        ordered = sorted(ranks)
        limit = ordered[min(self.settings[2], len(ordered)) - 1][0]
        return [r for r in ordered if r[0] <= limit]

    def scores(self) -> Scores:
        """Mean ranks, [1] per attention."""
        from lamina.core.scores import Scores

        values, errors = {}, {}
        for site, ranks in self.ranks.items():
            found = np.array([rank for _, rank in self._least(ranks)])
            values[site] = np.array([found.mean()])
            errors[site] = np.array([found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.nan])
        return Scores(measure=self.settings[0], values=values, stderr=errors, missing=self.refused)


def _unfit(taps: Taps) -> str | None:
    """Why the attention can't be looked at; None where it can."""
    if taps.attention is None:
        return "its attention weights were not seen"
    given = taps.attention.query if taps.attention.softmaxed is None else taps.attention.softmaxed
    if given is None or len(given) != taps.rows.sequences or given.shape[2] != taps.rows.mask.shape[1]:
        return "it has no one map per sequence and head"
    return None


def _map(taps: Taps, sequence: int, length: int) -> Tensor:
    """The first `length` tokens' weights on each other [heads, tokens, tokens]."""
    import torch

    assert taps.attention is not None
    places = taps.rows.mask[sequence].nonzero().squeeze(1)[:length]
    alone = _cut(taps.attention, sequence, places)
    if alone is not None:
        return alone.weights(0)
    return taps.attention.weights(sequence, torch.arange(len(places)))[:, :, : len(places)]


def _cut(attention: Attention, sequence: int, places: Tensor) -> Attention | None:
    """The attention of these neighbouring tokens alone; None where they see others than each other."""
    import torch

    if attention.query is None or attention.key is None:
        return None
    start, stop = int(places[0]), int(places[-1]) + 1
    mask = attention.mask
    if mask is not None:
        mask = mask[min(sequence, len(mask) - 1)].unsqueeze(0) if mask.ndim == 4 else mask
        mask = mask[..., start:stop, :] if mask.shape[-2] > 1 else mask
        later = mask[..., stop:]
        if bool(later.any() if later.dtype == torch.bool else (later > -1e4).any()) and not attention.causal:
            return None
        mask = mask[..., start:stop]
    elif not attention.causal:
        return None
    here = {n: getattr(attention, n)[sequence, None, :, start:stop] for n in ("query", "key")}
    return replace(attention, **here, mask=mask, rows=None)


def mean_ranks(maps: list[Tensor]) -> list[float]:
    """Mean rank over the heads of each map [heads, tokens, tokens] of a list, diagonals set to 0."""
    import torch

    stacked = torch.stack(maps)
    stacked.diagonal(dim1=-2, dim2=-1).zero_()
    return torch.linalg.matrix_rank(stacked).double().mean(-1).tolist()
