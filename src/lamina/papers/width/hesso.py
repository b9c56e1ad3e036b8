"""HESSO: units by several saliencies of their weights at once, each in units of its own norm over the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from lamina.core.errors import InputError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, planner, recipe
from lamina.core.sites import SUBLAYERS, Kind
from lamina.planners._widths import FAILS, NARROWS, Shape, above, expect_counted, sites_of, steps_of, widest

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Array, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.taps import Taps

PAPER = Paper(
    key="chen2024hesso",
    title="HESSO: Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning",
    authors=(
        "Tianyi Chen",
        "Xiaoyi Qu",
        "David Aponte",
        "Colby Banbury",
        "Jongwoo Ko",
        "Tianyu Ding",
        "Yong Ma",
        "Vladimir Lyapunov",
        "Ilya Zharkov",
        "Luming Liang",
    ),
    year=2024,
    arxiv="2409.09085",
)
UNITS = (Kind.NEURON, Kind.KV_GROUP)
CRITERIA = ("magnitude", "average", "cosine", "taylor1", "taylor2")


@measure(
    "hesso",
    PAPER,
    on=UNITS,
    needs=Need.GRADIENT,
    deviations=(
        "once, on the gradient of the text's loss: no training, so neither the optimiser's direction nor progressive "
        "decay, and no cycles of CRIC",
        "the cosine counts by its size",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Hesso:
    """Keep units whose weights x and gradients g say so: the sum of five saliencies, each over its norm over all units.

    ‖x‖, ‖x‖ over the number of weights, |cos(x, g)|, |x·g| and ½ (x·g)², of all that a unit owns. The grid `saliencies`
    has their means per site. Memory: gradients of all weights of sublayers, in float32.
    """

    card: ClassVar[Card]

    def measure(self, lab: Lab) -> Scores:
        """One forward and one backward, sequence by sequence."""
        from lamina.core.scores import Grid, Scores
        from lamina.lab.gradients import stream_gradients
        from lamina.lab.lab import predicts

        sites = lab.anatomy.of_kind(*UNITS)
        if not predicts(lab.model):
            return Scores.none(self.card.name, "the model predicts no tokens, so there is no loss")
        sums = _Gradients()
        stream_gradients(lab, [sums])
        tables = {s.id: saliencies(lab.anatomy, s, sums.held, max(sums.tokens, 1)) for s in sites}
        norms = np.sqrt(sum((t * t).sum(1) for t in tables.values())) if tables else np.ones(len(CRITERIA))
        norms = np.where(norms > 0, norms, 1.0)
        values = {s: (t / norms[:, None]).mean(0) for s, t in tables.items()}
        means = np.array([t.mean(1) for t in tables.values()]).reshape(len(tables), len(CRITERIA))
        grid = Grid(values=means, rows=tuple(tables), columns=CRITERIA)
        return Scores(measure=self.card.name, values=values, grids={"saliencies": grid} if tables else {})


def saliencies(anatomy: Anatomy, site: Site, gradients: Mapping[str, Tensor], tokens: int) -> Array:
    """The five of each unit, [5, units]; `gradients` are summed over `tokens`."""
    import torch

    named = dict(anatomy.model.named_parameters())
    dots, xx, gg, sizes = (torch.zeros(site.width, dtype=torch.float64) for _ in range(4))
    for tie in (t for t in anatomy.ties(site) if t.param in gradients):
        x = named[tie.param].detach().double().cpu().movedim(tie.dim, 0)
        g = gradients[tie.param].double().cpu().movedim(tie.dim, 0) / tokens
        rows = slice(tie.start, tie.start + tie.size * site.width)
        x, g = (v[rows].reshape(site.width, -1) for v in (x, g))
        dots, xx, gg = dots + (x * g).sum(1), xx + x.square().sum(1), gg + g.square().sum(1)
        sizes += x.shape[1]
    size = xx.sqrt()
    cosine = dots.abs() / (size * gg.sqrt()).clamp_min(1e-300)
    return torch.stack([size, size / sizes.clamp_min(1), cosine, dots.abs(), dots.square() / 2]).numpy()


@dataclass
class _Gradients:
    """Gradients of the summed loss by parameter, float32, and predicted tokens."""

    wants: ClassVar[frozenset[str]] = frozenset({"weights"})
    probes: ClassVar[tuple[str, ...]] = ("loss",)

    held: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    first: str = ""

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one sublayer on one sequence."""
        if site.kind not in SUBLAYERS:
            return
        self.first = self.first or site.id
        self.tokens += max(len(taps.entering) - 1, 0) if site.id == self.first else 0
        for name, (_, gradient) in taps.weights.items():
            found = gradient.detach().float()
            self.held[name] = self.held[name].add_(found) if name in self.held else found.clone()

    def merge(self, other: Self) -> Self:
        """The sums of both parts."""
        both = type(self)(dict(self.held), self.tokens + other.tokens, self.first or other.first)
        for name, value in other.held.items():
            both.held[name] = both.held[name] + value if name in both.held else value
        return both

    def scores(self) -> Scores:
        """A tally's table; these sums score nothing."""
        from lamina.core.scores import Scores

        return Scores.none("gradients", "sums for saliencies, no scores")


@planner(
    "hesso",
    PAPER,
    on=(Kind.NEURON, Kind.KV_GROUP),
    deviations=(
        "the units of lowest score of the whole network go at once, without training between periods",
        "the number that goes follows from the budget; kept counts are rounded up to legal widths, as the code does",
    ),
)
@dataclass(frozen=True, kw_only=True)
class HessoPlan:
    """Units of lowest score go wherever they stand, as many as the budget asks for; widths differ from block to block.

    Scores may be any measure's of neurons and KV groups; without any, this paper's own.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(FAILS, NARROWS)

    kinds: tuple[Kind, ...] = UNITS
    multiple: int = 32
    parallel: int = 1
    refit: float = 0.0

    def __post_init__(self) -> None:
        Shape(multiple=self.multiple, parallel=self.parallel)
        if Kind.CHANNEL in self.kinds or {Kind.HEAD, Kind.KV_GROUP} <= set(self.kinds):
            raise ValueError("kinds are neuron, expert, and kv_group or head")

    def plan(self, scores: Scores, budget: Budget, anatomy: Anatomy, bench: Bench | None = None) -> tuple[Step, ...]:
        """A narrow step for each kind. Raises InputError for a budget that no such widths meet."""
        from lamina.planners._target import Target, required

        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        expect_counted(budget, self.card.name)
        sites = sites_of(anatomy, self.kinds, target)
        if not any(s in scores for s in sites):
            scores = Hesso().measure(required(bench, self.card.name).lab)
        sites = [s for s in sites if s in scores]
        if not sites:
            raise InputError("the model has no units that may go", hint="protect less, or name other kinds")
        shape = Shape(multiple=self.multiple, parallel=self.parallel)
        counts = widest(anatomy, target, lambda share: above(anatomy, sites, scores.values, shape, share))
        return steps_of(anatomy, scores.values, counts, refit=self.refit)


recipe(
    "hesso",
    PAPER,
    summary="Neurons and KV groups go whose weights and gradients matter least by five saliencies together.",
    measure="hesso",
    planner="hesso",
    rewrite="narrow",
)
