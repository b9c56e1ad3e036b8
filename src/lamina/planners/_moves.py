"""What a mixed plan may do at each sublayer: steps, what they free, and the maps that they would make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Step
from lamina.core.registry import REWRITES
from lamina.core.sites import Cost, Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.sites import Site
    from lamina.lab.moments import InputMoments

REFIT = 0.01
"""The ridge by which maps make up for the units that leave them."""
MULTIPLE = 32
"""Widths of MLPs stay multiples of it, where they are: so that block grids and tensor cores fit."""


@dataclass(frozen=True)
class Move:
    """One change of a sublayer: `weights` path → [outputs, inputs] are its maps as they would be (none: it is dropped).

    `keeps` is the share of its weights that stays, by which the price of rounding them scales; `inputs` how many of
    the last map's inputs do, where some go.
    """

    name: str
    site: str
    steps: tuple[Step, ...]
    saves: Cost
    weights: dict[str, Tensor] = field(default_factory=dict)
    keeps: float = 1.0
    inputs: int = 0


def droppable(anatomy: Anatomy, site: Site) -> bool:
    """Whether nothing stands in the way of dropping the sublayer."""
    return not REWRITES.make("drop").check(Step(rewrite="drop", sites=(site.id,)), anatomy)


def dropped(anatomy: Anatomy, site: Site) -> Move:
    """The sublayer goes."""
    return Move("drop", site.id, (Step(rewrite="drop", sites=(site.id,)),), anatomy.freed([site.id]), keeps=0.0)


def narrowed(anatomy: Anatomy, site: Site, seen: InputMoments, shares: Sequence[float]) -> Iterator[Move]:
    """Fewer neurons of an MLP, or KV groups of an attention; the units of least energy behind the last map go."""
    method = REWRITES.make("narrow", {"refit": REFIT})
    for kind in (Kind.NEURON, Kind.KV_GROUP):
        for units in anatomy.units(site, kind):
            order, columns = least(anatomy, units, seen), anatomy.columns(units)
            for share in shares:
                count = _count(units.width, share, MULTIPLE if kind is Kind.NEURON else 1)
                if not 0 < count < units.width:
                    continue
                gone = order[: units.width - count]
                options = {"gone": {units.id: sorted(gone)}, "refit": REFIT}
                step = Step(rewrite="narrow", sites=(units.id,), options=options)
                if method.check(step, anatomy):
                    continue
                saves = anatomy.total() - method.forecast(step, anatomy)
                weights = method.weights(step, anatomy, seen)
                name = f"narrow to {count} of {units.width} {kind.value.replace('_', ' ')}s"
                left = sum(len(columns[n]) for n in order[units.width - count :])
                yield Move(name, site.id, (step,), saves, weights, count / units.width, left)


def _count(width: int, share: float, multiple: int) -> int:
    """Units that stay: a multiple, where the width is one and enough are left."""
    multiple = multiple if width % multiple == 0 and width * share >= multiple else 1
    return max(1, round(width * share / multiple)) * multiple


def least(anatomy: Anatomy, units: Site, seen: InputMoments) -> list[int]:
    """Units in the order of what they add: Σ over their columns of ‖W_j‖² Σ_t z_j², the least first."""
    tail = next(s for s in anatomy.linears() if s.path == anatomy.tail(units))
    energy = seen.of(tail.id)[0].diagonal() * anatomy.weight(tail).detach().double().square().sum(0)
    sums = [float(energy[c.start : c.stop].sum()) for c in anatomy.columns(units)]
    return sorted(range(units.width), key=lambda n: sums[n])


def factorised(
    anatomy: Anatomy, site: Site, seen: InputMoments, shares: Sequence[float], rewrite: str
) -> Iterator[Move]:
    """All maps of a sublayer as two of a lower rank, each with that share of its parameters."""
    method: Any = REWRITES.make(rewrite)
    maps = [s.id for s in anatomy.linears(site)]
    whole = {}
    for share in sorted(shares, reverse=True):
        ranks = {}
        for one in maps:
            outputs, inputs = anatomy.weight(one).shape
            ranks[one] = max(1, math.floor(share * outputs * inputs / (outputs + inputs)))
        step = Step(rewrite=rewrite, sites=tuple(maps), options={"rank": ranks})
        if not maps or method.check(step, anatomy):
            continue
        whole = whole or method.factors(step, anatomy, seen)
        weights = {p: b[:, : ranks[s]] @ a[: ranks[s]] for s, (p, a, b) in whole.items()}
        saves = anatomy.total() - method.forecast(step, anatomy)
        yield Move(f"{rewrite} at {share:.0%}", site.id, (step,), saves, weights, share)


def rounded(anatomy: Anatomy, site: Site, seen: InputMoments, types: Sequence[str], rewrite: str) -> Iterator[Move]:
    """All maps of a sublayer on the grid of a type."""
    method: Any = REWRITES.make(rewrite)
    maps = tuple(s.id for s in anatomy.linears(site))
    for kind in types:
        step = Step(rewrite=rewrite, sites=maps, options={"type": kind})
        if maps and not method.check(step, anatomy):
            saves = anatomy.total() - method.forecast(step, anatomy)
            yield Move(kind, site.id, (step,), saves, method.weights(step, anatomy, seen))
