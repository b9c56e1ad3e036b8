"""When Does Sparsity Mitigate the Curse of Depth: what a layer does to later ones, and how near it is to identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.scores import Array, Grid, Scores
from lamina.core.sites import Kind, Site
from lamina.maths.sums import Sums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab
    from lamina.lab.rows import Rows
    from lamina.lab.trials import Trial

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
Chosen = NDArray[np.bool_]
GROUPS = 64
"""Of the jackknife: no more sequences than that are run by default, so that each is left out by itself."""
STILL = 1e-8
"""A mean update that is no larger counts as none."""


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
        "check_identity_block_is_lowest": "the last block has no later block to act upon, so that it has no effect"
    }

    def tally(self, anatomy: Anatomy) -> CausalEffects:
        """Sums over tokens of every sequence, from the shared sweep."""
        return CausalEffects(self.card.name)

    def measure(self, lab: Lab) -> Scores:
        """One partial forward per block."""
        return lab.sweep([self.tally(lab.anatomy)])[0]


@measure(
    "jacobian",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.GRADIENT,
    status="stable",
    deviations=(
        "the norm is estimated from random vectors, unless probes=0 takes all channels one by one as the code",
    ),
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

        seed = lab.seed if self.seed is None else self.seed
        return _jacobians(self.card.name, few(lab, self.sequences, self.length), self.probes, seed)


class CausalEffects:
    """Of each skipped block, sums over tokens of ‖u - ū‖ and ‖u‖ of all later blocks, sequence by sequence."""

    kinds = (Kind.BLOCK,)

    def __init__(self, measure: str) -> None:
        self.measure = measure
        self.blocks: dict[str, tuple[str, ...]] = {}
        self.sums: dict[str, Sums] = {}
        self.tokens: dict[str, int] = {}

    def add(self, site: Site, trial: Trial) -> None:
        """Take in one skipped block on one batch."""
        import torch

        from lamina.lab.per_trial import per_sequence, rows_at

        before = trial.states(site.id)
        rows = rows_at(trial, site.id)
        moved, size = [], []
        for block in trial.blocks[trial.blocks.index(site.id) + 1 :]:
            behind = trial.states(block)
            update = behind[0] - before[0]
            moved.append(per_sequence((update - (behind[1] - before[1])).norm(dim=-1), rows))
            size.append(per_sequence(update.norm(dim=-1), rows))
            before = behind
        vectors = torch.stack([*moved, *size], 1) if moved else torch.zeros(rows.sequences, 0)
        self.blocks[site.id] = trial.blocks
        self.sums.setdefault(site.id, Sums()).add(vectors.cpu().numpy())
        self.tokens[site.id] = self.tokens.get(site.id, 0) + int(rows.mask.sum())

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(self.measure)
        both.blocks = self.blocks | other.blocks
        for site in both.blocks:
            both.sums[site] = self.sums.get(site, Sums()).merge(other.sums.get(site, Sums()))
            both.tokens[site] = self.tokens.get(site, 0) + other.tokens.get(site, 0)
        return both

    def scores(self) -> Scores:
        """Row means, [1] per block; errors by the delta method over sequences."""
        values, errors, effects = {}, {}, {}
        for site, sums in self.sums.items():
            moved, size = np.split(np.atleast_1d(sums.total), 2)
            real = size / max(self.tokens[site], 1) > STILL
            below = np.where(real, size, 1.0)
            effects[site] = np.where(real, moved / below, 0.0)
            depth = len(self.blocks[site])
            gradient = np.concatenate([real / below, -effects[site] * real / below]) / depth
            values[site] = np.array([effects[site].sum() / depth])
            errors[site] = np.array([sums.stderr(gradient)])
        return Scores(measure=self.measure, values=values, stderr=errors, grids=self._grids(effects))

    def _grids(self, effects: Mapping[str, Array]) -> dict[str, Grid]:
        grids = {}
        for blocks in dict.fromkeys(self.blocks.values()):
            table = np.zeros((len(blocks), len(blocks)))
            for number, block in enumerate(blocks):
                table[number, number + 1 :] = effects[block]
            grids[f"{_prefix(blocks)}effects"] = Grid(values=table, rows=blocks, columns=blocks)
        return grids


def _jacobians(measure: str, lab: Lab, probes: int, seed: int) -> Scores:
    """Deviations of all blocks' Jacobians from the identity."""
    import torch

    from lamina.lab.feed import side_of
    from lamina.lab.gradients import frozen, graph_recorded

    vectors = {k.name: _vectors(k.width, probes, seed) for k in lab.anatomy.stacks}
    products: dict[str, list[Tensor]] = {}
    counts: dict[str, list[Tensor]] = {}
    for number, rows in enumerate(lab.rows()):
        with frozen(lab.model), torch.enable_grad():
            with graph_recorded(lab.model, lab.anatomy) as passed:
                lab.result(rows.batch)
            for here in passed:
                block = here.block.site.id
                assert here.leaving is not None
                own = rows.of(side_of(lab.anatomy, here.block)).on(here.entering)
                found = _products(here.entering, here.leaving, own, vectors[lab.anatomy.stack(block).name])
                products.setdefault(block, []).append(found)
                counts.setdefault(block, []).append(own.mask.sum(1))
                lab.counts.backwards += int(rows.mask.sum()) * found.shape[1]
        lab.progress("Jacobians", number + 1, len(lab.batches))
    values, errors, facts = {}, {}, {}
    for block in list(products):
        own, sizes = torch.cat(products.pop(block)), torch.cat(counts[block]).double()
        v = vectors[lab.anatomy.stack(block).name]
        values[block], errors[block] = _deviation(own, sizes, v)
        if not probes:
            facts[block] = _facts(own.sum(0) / sizes.sum())
    return Scores(measure=measure, values=values, stderr=errors, grids=_jacobian_grids(lab, facts))


def _vectors(width: int, probes: int, seed: int) -> Tensor:
    """Random sign vectors [probes, width], or all unit vectors."""
    import torch

    if not probes:
        return torch.eye(width)
    return torch.randint(0, 2, (probes, width), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def _products(entering: Tensor, leaving: Tensor, rows: Rows, vectors: Tensor) -> Tensor:
    """Σ over positions of vᵀ ∂(Σ_t leaving[t]) / ∂ entering[s], float64 [sequences, vectors, width]."""
    import torch

    mask = rows.mask.to(entering.device).unsqueeze(-1).to(entering.dtype)
    shape = (*rows.mask.shape, entering.shape[-1])
    found = []
    for v in vectors.to(entering.device, entering.dtype):
        (made,) = torch.autograd.grad(leaving, entering, (mask * v).reshape(leaving.shape), retain_graph=True)
        found.append((made.reshape(shape) * mask).sum(1, dtype=torch.float64).cpu())
    return torch.stack(found, 1)


def _deviation(products: Tensor, sizes: Tensor, vectors: Tensor) -> tuple[Array, Array]:
    """‖J - I‖ / √D², [1], from products [sequences, vectors, width] and tokens [sequences]; and its error."""
    import torch

    from lamina.maths.jackknife import jackknife

    exact = len(vectors) == vectors.shape[1] and bool((vectors == torch.eye(len(vectors))).all())
    scale = 1.0 if exact else 1 / len(vectors)

    def size(rows: Chosen) -> Array:
        kept = torch.from_numpy(rows)
        off = products[kept].sum(0) / sizes[kept].sum() - vectors.double()
        return np.atleast_1d(float((off.square().sum() * scale).sqrt()) / vectors.shape[1])

    value, error = jackknife(size, np.arange(len(sizes)), GROUPS)
    return value, error


def _facts(jacobian: Tensor) -> list[float]:
    import torch

    width, diagonal = len(jacobian), jacobian.diagonal()
    off = jacobian - torch.diag(diagonal)
    largest = float(torch.linalg.matrix_norm(jacobian, 2))
    deviation = float((jacobian - torch.eye(width, dtype=jacobian.dtype)).norm()) / width
    rest = float(off.norm()) / max(width * width - width, 1) ** 0.5
    spread = float(diagonal.std()) if width > 1 else 0.0
    return [deviation, rest, float(diagonal.mean()), spread, float(jacobian.norm()), largest]


def _jacobian_grids(lab: Lab, facts: Mapping[str, list[float]]) -> dict[str, Grid]:
    columns = ("deviation", "off the diagonal", "mean diagonal", "spread of the diagonal", "norm", "largest")
    grids = {}
    for stack in lab.anatomy.stacks if facts else ():
        blocks = tuple(b.site.id for b in stack.blocks)
        grids[f"{_prefix(blocks)}jacobian"] = Grid(
            values=np.array([facts[b] for b in blocks]), rows=blocks, columns=columns
        )
    return grids


def _prefix(blocks: Sequence[str]) -> str:
    return blocks[0].rpartition("block.")[0]
