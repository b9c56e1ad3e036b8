"""StructPrune: a channel's energy is what the output loses without it; maps with more of it keep more channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from lamina.core.errors import InputError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, planner, recipe
from lamina.core.sites import Kind
from lamina.planners._widths import FAILS, NARROWS, Shape, energies, expect_counted, sites_of, steps_of, widest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Array, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.taps import Taps
    from lamina.maths.moments import Mean

PAPER = Paper(
    key="song2025structprune",
    title="StructPrune: Structured Global Pruning asymptotics with O(√N) GPU Memory",
    authors=("Xinyuan Song", "Guangji Bai", "Liang Zhao"),
    year=2025,
    arxiv="2510.03246",
)


@measure(
    "energy",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    deviations=(
        "a layer is a linear map, and its energy the mean over its channels; both are inferred, as is the channel's "
        "energy itself: the paper has no code and says that its score is of Wanda's kind",
        "the temperature counts in mean energies of all maps, so that it does not depend on their scale",
        "the energies alone: no masks, no alternating solution of the modules' problems",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Energy:
    """Mean channel energy of a linear map: ‖W_:,j‖² E[x_j²], averaged over its input channels j.

    That is what the output loses, in squares, when a channel goes and no other makes up for it. The grid `shares` has
    of each map the energy E and the share softmax(E / (`temperature` · mean E)) of the channels that are kept.
    """

    card: ClassVar[Card]

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature:g}")

    def tally(self, anatomy: Anatomy) -> Energies:
        """Token means of the energy of every linear map."""
        return Energies(self.card.name, self.temperature, anatomy.weight)

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        return lab.stream([self.tally(lab.anatomy)])[0]


class Energies:
    """Means over tokens of mean_j ‖W_:,j‖² x_j², per map; `weight` gives a map's weights [outputs, inputs]."""

    wants = frozenset({"linears"})

    def __init__(self, measure: str, temperature: float, weight: Callable[[Site], Tensor]) -> None:
        self.settings = (measure, temperature)
        self.weight = weight
        self.norms: dict[str, Tensor] = {}
        self.means: dict[str, Mean] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one map on one batch."""
        if site.kind is not Kind.LINEAR:
            return
        import torch

        from lamina.maths.moments import Mean

        if site.id not in self.norms:
            weight = self.weight(site).detach().float()
            self.norms[site.id] = torch.linalg.vecdot(weight, weight, dim=0).double() / weight.shape[1]
        lengths = torch.bincount(taps.sequence, minlength=taps.sequences)
        squares = [torch.linalg.vecdot(x, x, dim=0) for x in taps.x.split(lengths.tolist())]
        sums = torch.stack(squares).double() @ self.norms[site.id]
        self.means.setdefault(site.id, Mean()).add(sums.cpu().numpy(), lengths.cpu().numpy())

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        from lamina.maths.moments import Mean

        both = type(self)(*self.settings, self.weight)
        both.norms = {**self.norms, **other.norms}
        for key in {**self.means, **other.means}:
            both.means[key] = self.means.get(key, Mean()).merge(other.means.get(key, Mean()))
        return both

    def scores(self) -> Scores:
        """Values and standard errors so far, [1] per map."""
        from lamina.core.scores import Grid, Scores

        name, temperature = self.settings
        values = {k: np.atleast_1d(m.value) for k, m in self.means.items()}
        energies = np.array([v[0] for v in values.values()])
        table = np.stack([energies, shares(energies, temperature)], 1) if values else np.zeros((0, 2))
        grid = Grid(values=table, rows=tuple(values), columns=("energy", "share"))
        return Scores(
            measure=name,
            values=values,
            stderr={k: np.atleast_1d(m.stderr) for k, m in self.means.items()},
            grids={"shares": grid} if values else {},
        )


def shares(energies: Array, temperature: float) -> Array:
    """softmax(E / (T · mean E)), which sums to 1."""
    scale = temperature * energies.mean()
    logits = energies / scale if scale > 0 else np.zeros_like(energies)
    found = np.exp(logits - logits.max())
    return found / found.sum()


@planner(
    "struct-prune",
    PAPER,
    on=(Kind.NEURON, Kind.KV_GROUP),
    needs=Need.FORWARD,
    deviations=(
        "the energy form of the shares, inferred as the measure's energies are; no ADMM: each last map is refitted "
        "once, in closed form, on the dense network's inputs",
        "units are neurons and KV groups, and a layer is the last map behind them",
    ),
)
@dataclass(frozen=True, kw_only=True)
class StructPrune:
    """Sublayers keep softmax(E / (`temperature` · mean E)) of their units, scaled to the budget, within [`least`, 1].

    E is the mean energy of a sublayer's units, ‖W_:,j‖² mean x_j² over their columns j of its last map W; units of most
    energy stay, and with `refit` what stays takes over what goes (see `narrow`). One forward over the text.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(FAILS, NARROWS)

    temperature: float = 1.0
    least: float = 0.1
    kinds: tuple[Kind, ...] = (Kind.NEURON, Kind.KV_GROUP)
    multiple: int = 32
    parallel: int = 1
    refit: float = 0.01

    def __post_init__(self) -> None:
        Shape(multiple=self.multiple, parallel=self.parallel)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature:g}")
        if not 0 <= self.least < 1:
            raise ValueError(f"least lies in [0, 1), not at {self.least:g}")
        if not set(self.kinds) <= {Kind.NEURON, Kind.KV_GROUP}:
            raise ValueError("kinds are neuron and kv_group")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """A narrow step for each kind. Raises InputError for a budget that no such shares meet."""
        from lamina.planners._target import Target, required

        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        expect_counted(budget, self.card.name)
        sites = sites_of(anatomy, self.kinds, target)
        each = energies(required(bench, self.card.name).lab, sites)
        sites = [s for s in sites if s.id in each]
        if not sites:
            raise InputError("the model has no units that may go", hint="protect less, or name other kinds")
        shape = Shape(multiple=self.multiple, parallel=self.parallel)
        parts = np.log(np.maximum(shares(np.array([each[s.id].mean() for s in sites]), self.temperature), 1e-300))
        reach = parts.max() - parts.min() - np.log(max(self.least, 1e-3))

        def make(level: float) -> dict[str, int]:
            kept = np.exp(np.minimum(parts - parts.min() - (1 - level) * reach, 0.0)).clip(self.least, 1.0)
            return {s.id: shape.count(anatomy, s, float(k)) for s, k in zip(sites, kept, strict=True)}

        return steps_of(anatomy, each, widest(anatomy, target, make), refit=self.refit)


recipe(
    "struct-prune",
    PAPER,
    summary="Neurons and KV groups of least energy go, most where energies are low; the last maps are refitted.",
    measure="",
    planner="struct-prune",
    rewrite="narrow",
)
