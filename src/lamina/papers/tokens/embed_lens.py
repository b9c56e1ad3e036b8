"""EmbedLens: which words of the input vocabulary a state is nearest to; sinks, dead and living tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.errors import UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Array, Grid, Scores
    from lamina.lab import Lab
    from lamina.lab.sample import Sampled
    from lamina.lab.sampled import Found, PerSample

PAPER = Paper(
    key="fan2026visual",
    title="What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in Multimodal Large Language Models",
    authors=("Yingqi Fan", "Junlong Tong", "Anhao Zhao", "Xiaoyu Shen"),
    year=2026,
    arxiv="2603.00510",
)
WORDS = 8192
"""Embeddings that are compared at once."""
MASSIVE = 5.0
"""A state whose norm is so many times its depth's median is taken for a sink."""
OFTEN = 0.25
"""A word among the nearest of this share of the other tokens marks them as dead."""


@measure(
    "embed-lens",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=(
        "of all tokens, in text models too; the paper looks at the visual tokens of LLaVA-1.5",
        "markers are inferred at each depth (the code has ids of one model): for sinks the word that tokens of outsize "
        "norm share most, for the dead a word near to a quarter of all others",
        "the paper scores tokens; a block is scored by how many of their words it changes",
    ),
)
@dataclass(frozen=True, kw_only=True)
class EmbedLens:
    """Keep what changes the words that tokens are near to: how many of their `top` words change across the block.

    A token's words are the input embeddings of largest cosine to its state; the score is the mean share of them that
    are others behind the block. A token is a sink (or dead) if the marker is among its words, else alive. Grids:
    `groups`, the shares of each, and of tokens whose nearest word is another than at the depth before; `markers`, the
    ids of the words that mark sinks and dead tokens (-1: none).
    """

    card: ClassVar[Card]

    sequences: int = 32
    each: int = 2
    top: int = 3

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top must be at least 1, not {self.top}")

    def tally(self, anatomy: Anatomy) -> PerSample:
        """A sample of tokens; they are looked up in the end."""
        from lamina.lab.sampled import PerSample

        def find(sampled: Sampled) -> Found:
            return _found(sampled, embeddings(anatomy.model, sampled), self.top)

        return PerSample(self.card.name, find, self.sequences, self.each)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


def embeddings(model: nn.Module, sampled: Sampled) -> Tensor:
    """The table of input embeddings [vocabulary, width]: the one that the model names, else that most like the input.

    Raises UnsupportedError where positions are no tokens, or where there is no table as wide as the stream.
    """
    import torch

    ids = sampled.ids
    if ids is None:
        raise UnsupportedError("positions of this stack are no tokens", where="embed-lens")
    getter = getattr(model, "get_input_embeddings", None)
    try:
        named = [getter()] if callable(getter) else []
    except (NotImplementedError, AttributeError):
        named = []
    width, most = sampled.states.shape[-1], int(ids.max())
    known = named or [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    tables = [w.detach() for m in known if isinstance(w := getattr(m, "weight", None), torch.Tensor)]
    tables = [t for t in tables if t.ndim == 2 and t.shape[1] == width and t.shape[0] > most]
    if not tables:
        raise UnsupportedError("there is no table of input embeddings as wide as the stream", where="embed-lens")

    def alike(table: Tensor) -> float:
        rows = table[ids.to(table.device)].float().cpu()
        return float(torch.nn.functional.cosine_similarity(rows, sampled.states[0]).mean())

    return max(tables, key=alike)


def nearest(states: Tensor, table: Tensor, top: int) -> Tensor:
    """Ids of the `top` embeddings of largest cosine to each row of `states` [n, width], nearest first: [n, top]."""
    import torch

    units = torch.nn.functional.normalize(states.to(table.device).float(), dim=-1)
    values, ids = [], []
    for start in range(0, len(table), WORDS):
        words = torch.nn.functional.normalize(table[start : start + WORDS].float(), dim=-1)
        best = (units @ words.T).topk(min(top, len(words)))
        values.append(best.values)
        ids.append(best.indices + start)
    order = torch.cat(values, 1).argsort(dim=1, descending=True, stable=True)[:, :top]
    return torch.cat(ids, 1).gather(1, order).cpu()


def _found(sampled: Sampled, table: Tensor, top: int) -> Found:
    from lamina.core.scores import Grid
    from lamina.lab.sampled import Found, depths, over_sequences, sequences_of

    count = len(sampled.owner)
    near = nearest(sampled.states.flatten(0, 1), table, top).view(-1, count, min(top, len(table))).numpy()
    norms = sampled.states.double().norm(dim=-1).numpy()
    held = (near[1:, :, :, None] == near[:-1, :, None, :]).any(-1).mean(-1)
    value, error = over_sequences(1 - held, 1.0, sequences_of(sampled))
    moved = np.concatenate([[np.nan], (near[1:, :, 0] != near[:-1, :, 0]).mean(1)])
    found = [groups(words, norm) for words, norm in zip(near, norms, strict=True)]
    shares, markers = (np.array([f[i] for f in found], dtype=np.float64) for i in (0, 1))
    names = depths(sampled.blocks)
    grids: dict[str, Grid] = {
        "groups": Grid(values=np.column_stack([shares, moved]), rows=names, columns=("sink", "dead", "alive", "moved")),
        "markers": Grid(values=markers, rows=names, columns=("sink", "dead")),
    }
    return Found(values=value, stderr=error, grids=grids)


def groups(words: Array, norms: Array) -> tuple[tuple[float, float, float], tuple[int, int]]:
    """Shares of sinks, dead and living tokens, and the two markers, from nearest ids [n, top] and norms [n]."""
    massive = norms > MASSIVE * np.median(norms)
    sink = _commonest(words[massive])[0]
    sinks = (words == sink).any(1) if sink >= 0 else np.zeros(len(words), dtype=bool)
    dead, times = _commonest(words[~sinks])
    marked = dead >= 0 and times > 1 and times >= OFTEN * np.sum(~sinks)
    dying = (words == dead).any(1) & ~sinks if marked else np.zeros(len(words), dtype=bool)
    shares = float(sinks.mean()), float(dying.mean()), float((~sinks & ~dying).mean())
    return shares, (sink, dead if marked else -1)


def _commonest(words: Array) -> tuple[int, int]:
    """The id that most rows hold, and how many do; the lowest of equals, (-1, 0) of no rows."""
    if not words.size:
        return -1, 0
    ids, counts = np.unique(words, return_counts=True)
    place = int(counts.argmax())
    return int(ids[place]), int(counts[place])
