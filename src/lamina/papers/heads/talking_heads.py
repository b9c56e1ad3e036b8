"""Talking Heads: what a head writes, later heads read; how well the two fit is seen in the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from lamina.core.errors import UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Stack
    from lamina.anatomy.projections import Projections
    from lamina.core.scores import Array, Grid, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab

PAPER = Paper(
    key="merullo2024talking",
    title="Talking Heads: Understanding Inter-layer Communication in Transformer Language Models",
    authors=("Jack Merullo", "Carsten Eickhoff", "Ellie Pavlick"),
    year=2024,
    arxiv="2406.09519",
)

SIDES = ("v", "k", "q")


@measure(
    "composition",
    PAPER,
    on=Kind.HEAD,
    needs=Need.NOTHING,
    deviations=(
        "a score per head, the mean over all later heads and their three sides; the paper looks for single pairs and "
        "components that stand out, and then edits them",
        "the baseline is 1/sqrt(width), what two matrices turned against each other at random give in closed form",
        "gains of the norms around an attention are folded into its matrices, and channel means taken away where the "
        "norm centres; norms and rotations of queries and keys are left out, so that their sides are approximate",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Composition:
    """How much of what a head writes later heads read: composition scores above chance, from the weights.

    CS(A, B) = ‖B A‖ / (‖A‖ ‖B‖) of a writer A = W_O W_V with B = W_O W_V (values), W_Qᵀ W_K (keys) and W_Kᵀ W_Q
    (queries) of a head of a later block, minus 1/√width. The grid `v` [writers, readers] has CS of the values' side,
    `v component` the largest ‖B uᵢ‖ / ‖B‖ over A's left singular vectors uᵢ; both NaN where the reader is not later.
    Heads that no later head reads have no score.
    """

    card: ClassVar[Card]

    def measure(self, lab: Lab) -> Scores:
        """Reads the weights, and runs each block on a few tokens to tell which of them are whose."""
        from lamina.core.scores import Scores

        values, grids, missing = {}, {}, {}
        for stack in lab.anatomy.stacks:
            attentions = dict(_attentions(lab.anatomy, stack, missing))
            if attentions:
                values |= _scored(lab, stack, attentions, grids, missing)
        if not values:
            raise UnsupportedError(next(iter(missing.values()), "the model has no attention"), where=self.card.name)
        return Scores(measure=self.card.name, values=values, grids=grids, missing=missing)


def _attentions(anatomy: Anatomy, stack: Stack, missing: dict[str, str]) -> list[tuple[int, tuple[Site, Projections]]]:
    """(number of the block, site of its heads and their projections), in depth order."""
    from lamina.anatomy.projections import projections

    found = []
    for number, block in enumerate(stack.blocks):
        for branch in block.branches:
            if branch.site.kind not in (Kind.ATTENTION, Kind.CROSS_ATTENTION):
                continue
            name = f"{branch.site.id}.{Kind.HEAD.value}"
            heads = next(iter(anatomy.units(branch.site, Kind.HEAD)), None)
            if heads is None:
                missing[name] = anatomy.refused_units(branch.site).get(name, "its heads were not found")
            elif branch.site.kind is Kind.CROSS_ATTENTION:
                missing[name] = "it reads two streams"
            else:
                try:
                    found.append((number, (heads, projections(anatomy, branch.site))))
                except UnsupportedError as reason:
                    missing[name] = reason.what
    return found


class _Writers(NamedTuple):
    """The heads of one block as writers: left singular vectors [width, heads · size], singular values [heads, size]."""

    vectors: Tensor
    strengths: Tensor


class _Reader(NamedTuple):
    """One side of the heads of a block: B = L R.

    `left` [heads, size, size] is L's triangular factor; `group` heads share one R in `right` [groups, size, width].
    """

    left: Tensor
    right: Tensor
    group: int


def _scored(
    lab: Lab,
    stack: Stack,
    attentions: dict[int, tuple[Site, Projections]],
    grids: dict[str, Grid],
    missing: dict[str, str],
) -> dict[str, Array]:
    """Scores [heads] by site; `grids` and `missing` are added to."""
    from lamina.core.scores import Grid

    sites = [site for site, _ in attentions.values()]
    starts = np.cumsum([0, *(len(p.q) for _, p in attentions.values())])
    maps = {s: np.full((starts[-1], starts[-1]), np.nan) for s in (*SIDES, "v component")}
    writers: list[_Writers] = []
    for place, (_, found) in enumerate(attentions.values()):
        own = slice(starts[place], starts[place + 1])
        for side, reader in _readers(found).items() if writers else ():
            for earlier, writer in enumerate(writers):
                here = slice(starts[earlier], starts[earlier + 1])
                whole, component = composed(writer, reader)
                maps[side][here, own] = whole
                if side == "v":
                    maps["v component"][here, own] = component
        writers.append(_writers(found))
        lab.progress("composing heads", place + 1, len(attentions))
    names = tuple(f"{s.id}.{i}" for s, a, b in zip(sites, starts, starts[1:], strict=False) for i in range(b - a))
    for name in ("v", "v component"):
        grids[".".join(x for x in (stack.name, name) if x)] = Grid(values=maps[name], rows=names, columns=names)
    values = {}
    for place, (site, found) in enumerate(attentions.values()):
        own, later = slice(starts[place], starts[place + 1]), starts[place + 1]
        if later == starts[-1]:
            missing[site.id] = "no later head reads it"
            continue
        chance = (stack.width - found.centred) ** -0.5
        sums = sum(maps[s][own, later:].sum(1) for s in SIDES)
        values[site.id] = sums / (3 * (starts[-1] - later)) - chance
    return values


def _folded(found: Projections) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and o with the norms around them folded in, and channel means taken away where the norm does."""

    def read(w: Tensor) -> Tensor:
        w = w * found.gain
        return w - w.mean(-1, keepdim=True) if found.centred else w

    o = found.o * found.gain_after.unsqueeze(-1)
    o = o - o.mean(1, keepdim=True) if found.centred else o
    return read(found.q), read(found.k), read(found.v), o


def _writers(found: Projections) -> _Writers:
    """Singular vectors and values of W_O W_V by those of a small product: both factors are first made triangular."""
    import torch

    _, _, v, o = _folded(found)
    basis, outer = torch.linalg.qr(o)
    inner = torch.linalg.qr(v.mT, mode="r").R
    left, strengths, _ = torch.linalg.svd(outer @ inner.mT)
    return _Writers((basis @ left).movedim(1, 0).flatten(1), strengths.double())


def _readers(found: Projections) -> dict[str, _Reader]:
    import torch

    q, k, v, o = _folded(found)
    triangle = {n: torch.linalg.qr(m, mode="r").R for n, m in (("o", o), ("k", k.mT), ("q", q.mT))}
    group = found.group
    return {
        "v": _Reader(triangle["o"], v[::group], group),
        "k": _Reader(triangle["q"], k[::group], group),
        "q": _Reader(triangle["k"], q, 1),
    }


def composed(writers: _Writers, reader: _Reader) -> tuple[Array, Array]:
    """CS of every writer with every reader, and the largest of its components', float64 [writers, readers]; 0 for 0/0.

    ‖B A‖² = Σ sᵢ² ‖B uᵢ‖², since A's right singular vectors are orthonormal.
    """
    read = (reader.right @ writers.vectors).repeat_interleave(reader.group, 0)
    sums = (reader.left @ read).square().sum(1).double().unflatten(1, tuple(writers.strengths.shape))
    full = reader.left @ reader.right.repeat_interleave(reader.group, 0)
    norms = full.double().square().sum((1, 2)).clamp_min(1e-300)
    parts = (sums / norms[:, None, None]).transpose(0, 1)  # [writers, readers, components]
    energy = writers.strengths.square()
    weights = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
    whole = (parts * weights.unsqueeze(1)).sum(-1).sqrt()
    return whole.cpu().numpy(), parts.amax(-1).sqrt().cpu().numpy()
