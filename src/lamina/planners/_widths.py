"""Widths: scores of units and shares that stay → narrow steps of legal shapes within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import REWRITES
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.core.scores import Array
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.planners._target import Target

KINDS = (Kind.NEURON, Kind.HEAD, Kind.KV_GROUP, Kind.EXPERT, Kind.CHANNEL)
WIDE = (Kind.NEURON, Kind.CHANNEL)
"""The kinds whose widths block grids and tensor cores look at."""
NARROWS = "the check counts what dropping frees, and takes budgets of blocks and sublayers; here widths shrink"
"""Why a planner of widths fails the checks of planners that drop."""
FAILS = (
    "check_budget_is_met_and_not_overshot",
    "check_planner_is_deterministic",
    "check_ties_go_in_depth_order",
    "check_steps_are_explicit",
    "check_planner_takes_every_model",
)
ROUNDS, FEW = 40, 4
Counts = Mapping[str, int]
"""Site of units → how many of them stay."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which widths are legal: neurons and channels in multiples of `multiple`; what is split over devices in those of
    `parallel`, the degree of tensor parallelism.

    `multiple` is halved until the dense width is one, and has four of them.
    """  # fmt: skip

    multiple: int = 32
    parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("multiple", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")

    def step(self, anatomy: Anatomy, site: Site) -> int:
        """The number of units by which a site's width goes up and down: heads as many in each KV group."""
        groups = 1 if site.kind is Kind.CHANNEL else site.width // anatomy.grouped(site)[0]
        least = groups if groups < site.width else 1
        split = 1 if site.kind is Kind.CHANNEL else self.parallel
        multiple = self.multiple if site.kind in WIDE else 1
        while multiple > 1 and (site.width % multiple or site.width < FEW * multiple):
            multiple //= 2
        grain = math.lcm(multiple, split, least)
        return grain if site.width % grain == 0 else math.lcm(multiple, least)

    def count(self, anatomy: Anatomy, site: Site, share: float) -> int:
        """The legal number of units that is nearest to a share of all; at least one step, and a token's experts."""
        step = self.step(anatomy, site)
        least = anatomy.active(site) if site.kind is Kind.EXPERT else 1
        return min(site.width, max(math.floor(share * site.width / step + 0.5), -(least // -step)) * step)


def sites_of(anatomy: Anatomy, kinds: Sequence[Kind], target: Target) -> list[Site]:
    """The sites of units of these kinds that may be cut: not protected, and of classes that run without some.

    Channels run through everything: where anything is protected, they are.
    """
    unknown = [k for k in kinds if k not in KINDS]
    if unknown:
        raise InputError(f"{', '.join(unknown)} can't be narrowed", hint=f"kinds: {', '.join(KINDS)}")
    found = []
    known: dict[tuple[Kind, int], bool] = {}
    for site in anatomy.of_kind(*kinds):
        home = site.id.rpartition(".")[0]
        free = not target.protected if site.kind is Kind.CHANNEL else home not in target.protected
        if free and site.width > 1:
            like = site.kind, site.width
            if like not in known:
                known[like] = _cuttable(anatomy, site)
            found += [site] if known[like] else []
    return found


def _cuttable(anatomy: Anatomy, site: Site) -> bool:
    """Whether the site's class runs without some of its units."""
    if site.kind is Kind.EXPERT and site.width <= anatomy.active(site):
        return False
    if site.kind is Kind.CHANNEL and len(anatomy.stacks) > 1:
        return False
    group = 1 if site.kind is Kind.CHANNEL else anatomy.grouped(site)[0]
    gone = list(range(0, site.width, group)) if group > 1 else [0]
    try:
        anatomy.without_units(site, gone)
    except UnsupportedError:
        return False
    return True


def best(anatomy: Anatomy, site: Site, scores: Array | Sequence[float], count: int) -> list[int]:
    """The `count` units of highest score, in order; of heads as many in each KV group. Of equal ones the first stay."""
    group = 1 if site.kind is Kind.CHANNEL else anatomy.grouped(site)[0]
    parts = [range(n, n + group) for n in range(0, site.width, group)] if group > 1 else [range(site.width)]
    kept = []
    for part in parts:
        kept += sorted(part, key=lambda n: (-float(scores[n]), n))[: count // len(parts)]
    return sorted(kept)


def energies(lab: Lab, sites: Sequence[Site]) -> dict[str, Array]:
    """Site of heads, KV groups or neurons → Σ over each unit's columns j of ‖W_:,j‖² mean x_j², [units].

    That is what the last map W's output loses, in squares, when the unit goes. One forward over the text.
    """
    import numpy as np

    from lamina.lab.moments import input_moments

    anatomy = lab.anatomy
    homes = {s.path: s.id for s in anatomy.linears()}
    tails = {s.id: homes[anatomy.tail(s)] for s in sites if anatomy.tail(s) in homes}
    seen = input_moments(lab, set(tails.values()))
    found: dict[str, Array] = {}
    for site in (s for s in sites if s.id in tails):
        moment, _, tokens = seen.of(tails[site.id])
        each = anatomy.weight(tails[site.id]).detach().double().square().sum(0).to(moment.device)
        each = (each * moment.diagonal() / tokens).cpu().numpy()
        found[site.id] = np.array([each[c.start : c.stop].sum() for c in anatomy.columns(site)])
    return found


def above(anatomy: Anatomy, sites: Sequence[Site], scores: Mapping[str, Array], shape: Shape, share: float) -> Counts:
    """Of each site as many units as are among the `share` of all sites' units that score highest; legal, rounded up.

    Of equal ones the first count.
    """
    ranked = sorted(((-float(v), n, s.id) for n, s in enumerate(sites) for v in scores[s.id]), key=lambda r: r[:2])
    kept = dict.fromkeys((s.id for s in sites), 0)
    for _, _, site in ranked[: round(share * len(ranked))]:
        kept[site] += 1
    found = {}
    for site in sites:
        step = shape.step(anatomy, site)
        found[site.id] = min(max(-(-kept[site.id] // step) * step, shape.count(anatomy, site, 0.0)), site.width)
    return found


def steps_of(anatomy: Anatomy, scores: Mapping[str, Array], counts: Counts, *, refit: float = 0.0) -> tuple[Step, ...]:
    """A narrow step for each kind of unit of which some go; it says which share of its sites' units stays."""
    found: dict[Kind, dict[str, list[int]]] = {}
    for name, count in counts.items():
        site = anatomy.site(name)
        if count < site.width:
            stays = set(best(anatomy, site, scores[name], count))
            found.setdefault(site.kind, {})[name] = [n for n in range(site.width) if n not in stays]
    steps = []
    for kind, gone in found.items():
        options: dict[str, Any] = {"gone": gone}
        options |= {"refit": refit} if refit and kind not in (Kind.EXPERT, Kind.CHANNEL) else {}
        stay, whole = (sum(of[n] for n in gone) for of in (counts, {n: anatomy.site(n).width for n in gone}))
        steps.append(Step(rewrite="narrow", sites=tuple(gone), options=options, why={"keeps": stay / whole}))
    return tuple(steps)


def taken(anatomy: Anatomy, counts: Counts, metric: str) -> int:
    """What the model takes with so many units, in a budget's metric."""
    widths = {n: anatomy.site(n).width for n in counts}
    gone = {n: list(range(c, widths[n])) for n, c in counts.items() if c < widths[n]}
    step = Step(rewrite="narrow", sites=tuple(gone), options={"gone": gone})
    return int(getattr(REWRITES.make("narrow").forecast(step, anatomy), metric))


def expect_counted(budget: Budget, planner: str) -> None:
    """Raise InputError for a budget that widths can't meet: of blocks, of sublayers."""
    if budget.metric in ("blocks", "sublayers"):
        raise InputError(f"the planner {planner} takes no budget of {budget.metric}", hint="parameters or bytes")


def widest(anatomy: Anatomy, target: Target, make: Callable[[float], Counts]) -> Counts:
    """The counts `make(share)` of the largest share in [0, 1] that meets the budget, by bisection.

    Raises InputError where the least does not.
    """
    metric = target.budget.metric
    whole = int(getattr(anatomy.total(), metric))

    def meets(share: float) -> bool:
        return whole - taken(anatomy, make(share), metric) >= target.need

    if not meets(0.0):
        raise target.refuse(whole - taken(anatomy, make(0.0), metric))
    low, high = (1.0, 1.0) if meets(1.0) else (0.0, 1.0)
    for _ in range(ROUNDS if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return make(low)


def uniform(anatomy: Anatomy, sites: Sequence[Site], shape: Shape, share: float) -> dict[str, int]:
    """The same share of every site's units, as far as it is legal."""
    return {s.id: shape.count(anatomy, s, share) for s in sites}


def even(anatomy: Anatomy, target: Target, groups: Sequence[Sequence[Site]], shape: Shape) -> Counts:
    """The largest common share of all groups of sites within the budget; what is left over goes to them in turn."""
    counts = widest(anatomy, target, lambda share: uniform(anatomy, [s for g in groups for s in g], shape, share))
    for group in groups:

        def more(share: float, group: Sequence[Site] = group, known: Counts = counts) -> Counts:
            return {**known, **{n: max(c, known[n]) for n, c in uniform(anatomy, group, shape, share).items()}}

        counts = widest(anatomy, target, more)
    return counts
