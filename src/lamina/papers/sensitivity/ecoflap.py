"""ECoFLaP: two forwards with a weight matrix moved along a random direction say how much the loss hangs on it."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.errors import InputError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, planner, recipe
from lamina.core.scores import Grid, Scores
from lamina.core.sites import Kind
from lamina.maths.moments import Mean
from lamina.planners._widths import FAILS, NARROWS, Shape, energies, expect_counted, sites_of, steps_of, widest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.resume import Resumed

PAPER = Paper(
    key="sung2023ecoflap",
    title="ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
    authors=("Yi-Lin Sung", "Jaehong Yoon", "Mohit Bansal"),
    year=2023,
    arxiv="2310.02998",
)


@measure(
    "zeroth-order",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.ABLATION,
    status="stable",
    deviations=(
        "absolute values are taken of each sequence's mean loss and averaged; the code adds up those of batches",
        "all sequences see the same directions, which depend on the seed, the matrix and the draw alone",
        "blocks before the one that holds the matrix are not run again",
    ),
)
@dataclass(frozen=True, kw_only=True)
class ZerothOrder:
    """Keep matrices that the loss hangs on: |loss(W + εz) - loss(W - εz)| / 2ε along random normal directions z.

    The mean over `noises` directions and the sequences: `sequences` of the text, their first `length` tokens (None
    takes all). `epsilon` is that of the step, `seed` that of the directions (None takes the lab's). Weights are put
    back bit for bit. Grid `groups`: the sum over each block's matrices, and that over their number of weights.
    """

    card: ClassVar[Card]

    noises: int = 1
    sequences: int | None = 8
    length: int | None = 32
    epsilon: float = 1e-3
    seed: int | None = None

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "two forwards per matrix: eight sequences are run, however many there are; "
        "with sequences=None the check holds"
    }

    def __post_init__(self) -> None:
        for name in ("noises", "sequences", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon is above 0, not {self.epsilon:g}")

    def measure(self, lab: Lab) -> Scores:
        """Two partial forwards per matrix and direction."""
        from lamina.lab.resume import Resumed, few

        part = few(lab, self.sequences, self.length)
        holders = {
            site.id: (site, b.site.id)
            for k in lab.anatomy.stacks
            for b in k.blocks
            for site in lab.anatomy.linears(b.site)
        }
        means = {name: Mean() for name in holders}
        total = len(part.batches) * len(holders)
        for number, rows in enumerate(part.rows()):
            run = Resumed(part, rows)
            run.losses(run.out)
            for done, (name, (site, block)) in enumerate(holders.items()):
                slopes = self._slopes(run, site, block).cpu().numpy()
                means[name].add(slopes, np.ones(len(slopes)))
                part.progress("moved matrices", number * len(holders) + done + 1, total)
        return Scores(
            measure=self.card.name,
            values={s: np.atleast_1d(m.value) for s, m in means.items()},
            stderr={s: np.atleast_1d(m.stderr) for s, m in means.items()},
            grids={"groups": _groups(lab, holders, means)} if holders else {},
        )

    def _slopes(self, run: Resumed, site: Site, block: str) -> Tensor:
        """Mean |slope| of each sequence's loss along the directions, float64 [sequences]."""
        import torch

        from lamina.lab.probes import noise_of

        seed = run.lab.seed if self.seed is None else self.seed
        weight = run.lab.model.get_submodule(site.path).weight
        assert isinstance(weight, torch.Tensor)
        found = []
        for number in range(self.noises):
            z = torch.randn(weight.shape, generator=noise_of(f"{site.id} {number}", "direction", seed))
            means = []
            for step in (self.epsilon, -self.epsilon):
                with torch.no_grad(), _moved(weight, z.to(weight.device), step):
                    sums, counts = run.losses(run.forward(block))
                means.append(sums / counts.clamp_min(1.0))
            found.append((means[0] - means[1]).abs() / (2 * self.epsilon))
        return torch.stack(found).mean(0)


@contextmanager
def _moved(weight: Tensor, direction: Tensor, step: float) -> Iterator[None]:
    """Inside, the weight stands a step further; afterwards it is what it was, bit for bit."""
    kept = weight.data
    try:
        weight.data = (kept.float() + step * direction).to(kept.dtype)
        yield
    finally:
        weight.data = kept


def _groups(lab: Lab, holders: Mapping[str, tuple[Site, str]], means: Mapping[str, Mean]) -> Grid:
    """Of each block that holds matrices, the sum of their scores, and the sum per weight."""
    blocks = tuple(dict.fromkeys(block for _, block in holders.values()))
    table = np.zeros((len(blocks), 2))
    for number, block in enumerate(blocks):
        mine = [name for name, (_, b) in holders.items() if b == block]
        total = sum(float(means[name].value) for name in mine)
        table[number] = total, total / sum(lab.anatomy.weight(name).numel() for name in mine)
    return Grid(values=table, rows=blocks, columns=("sum", "per weight"))


@planner(
    "ecoflap",
    PAPER,
    on=(Kind.NEURON, Kind.KV_GROUP),
    needs=Need.ABLATION,
    deviations=(
        "blocks become narrower by their ratios instead of sparser: the units of least ‖W_:,j‖² mean x_j² behind the "
        "last map go, which is Wanda's score of its columns",
        "ratios are of neurons and KV groups alike; `spread` is the code's 0.1",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Ecoflap:
    """Blocks keep shares of their neurons and KV groups as their matrices' zeroth-order scores are large.

    At a mean share r each block keeps r - `spread` at least; see `allocate`. r is the largest within the budget. Scores
    are the bench's measure's, or this paper's own.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(FAILS, NARROWS)

    spread: float = 0.1
    kinds: tuple[Kind, ...] = (Kind.NEURON, Kind.KV_GROUP)
    multiple: int = 32
    parallel: int = 1
    refit: float = 0.0

    def __post_init__(self) -> None:
        Shape(multiple=self.multiple, parallel=self.parallel)
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread lies in [0, 1), not at {self.spread:g}")
        if not set(self.kinds) <= {Kind.NEURON, Kind.KV_GROUP}:
            raise ValueError("kinds are neuron and kv_group")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """A narrow step for each kind. Raises InputError for a budget that no such ratios meet."""
        from lamina.planners._target import Target, required

        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        expect_counted(budget, self.card.name)
        lab = required(bench, self.card.name).lab
        sites = sites_of(anatomy, self.kinds, target)
        each = energies(lab, sites)
        sites = [s for s in sites if s.id in each]
        if not sites:
            raise InputError("the model has no units that may go", hint="protect less, or name other kinds")
        blocks = {anatomy.block(s.id.rpartition(".")[0]).site.id for s in sites}
        maps = {b: [s.id for s in anatomy.linears(b)] for b in sorted(blocks)}
        if scores is None or not all(m in scores for held in maps.values() for m in held):
            scores = ZerothOrder().measure(lab)
        found = [sum(scores[m] for m in held) for held in maps.values()]
        weights = [sum(anatomy.weight(m).numel() for m in held) for held in maps.values()]
        shape = Shape(multiple=self.multiple, parallel=self.parallel)

        def make(share: float) -> dict[str, int]:
            keep = allocate(found, weights, int(share * sum(weights)), max(share - self.spread, 0.0))
            ratios = {b: k / n for b, k, n in zip(maps, keep, weights, strict=True)}
            home = {s.id: anatomy.block(s.id.rpartition(".")[0]).site.id for s in sites}
            return {s.id: shape.count(anatomy, s, ratios[home[s.id]]) for s in sites}

        return steps_of(anatomy, each, widest(anatomy, target, make), refit=self.refit)


def allocate(scores: Sequence[float], sizes: Sequence[int], keep: int, least: float) -> list[int]:
    """Of `keep` weights in all, how many each group keeps: `least` of its own first, then in proportion to its score.

    What a full group can't take goes to the others, again in proportion.
    """
    kept = [min(math.ceil(n * least), n) for n in sizes]
    while (left := keep - sum(kept)) > 0:
        free = [s if k < n else 0.0 for s, k, n in zip(scores, kept, sizes, strict=True)]
        free = free if sum(free) > 0 else [float(k < n) for k, n in zip(kept, sizes, strict=True)]
        if not sum(free):
            break
        more = [math.ceil(f / sum(free) * left) for f in free]
        kept = [min(k + m, n) for k, m, n in zip(kept, more, sizes, strict=True)]
    first = [min(math.ceil(n * least), n) for n in sizes]
    for _ in range(sum(kept) - keep):  # shares were rounded up
        place = max(range(len(kept)), key=lambda n: kept[n] - first[n])
        kept[place] -= 1 if kept[place] > first[place] else 0
    return kept


recipe(
    "ecoflap",
    PAPER,
    summary="Blocks whose matrices the loss hangs on least become narrowest.",
    measure="zeroth-order",
    planner="ecoflap",
    rewrite="narrow",
)
