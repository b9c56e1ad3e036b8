"""What a model takes once units have left it: exactly, also where heads, neurons and channels go from one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from lamina.core.sites import Cost, Kind, Site

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy

Gone = Mapping[str, Sequence[int]]
"""Site of units → the numbers of those that go."""


@dataclass(frozen=True)
class Sizes:
    """Of each tensor that loses something, its shape before and after."""

    before: Mapping[str, tuple[int, ...]]
    after: Mapping[str, tuple[int, ...]]

    def less(self, name: str) -> int:
        """The numbers that a tensor loses; 0 for one that loses none."""
        return prod(self.before[name]) - prod(self.after[name]) if name in self.before else 0


def sizes(anatomy: Anatomy, gone: Gone) -> Sizes:
    """The shapes of all parameters that own slices of these units."""
    parameters = dict(anatomy.model.named_parameters())
    lost: dict[tuple[str, int], set[int]] = {}
    for name, units in gone.items():
        for tie in anatomy.ties(anatomy.site(name)):
            if tie.param in parameters:
                rows = (r for n in units for r in range(tie.start + n * tie.size, tie.start + (n + 1) * tie.size))
                lost.setdefault((tie.param, tie.dim), set()).update(rows)
    before = {name: tuple(parameters[name].shape) for name, _ in lost}
    after = {n: tuple(s - len(lost.get((n, d), ())) for d, s in enumerate(shape)) for n, shape in before.items()}
    return Sizes(before, after)


def narrowed_cost(anatomy: Anatomy, gone: Gone) -> Cost:
    """What the whole model takes without these units."""
    parameters = dict(anatomy.model.named_parameters())
    held = sizes(anatomy, gone)
    total = anatomy.total() - Cost(
        sum(held.less(n) for n in held.before),
        sum(held.less(n) * parameters[n].element_size() for n in held.before),
    )
    sites = [anatomy.site(s) for s in gone]
    channels = [s for s in sites if s.kind is Kind.CHANNEL]
    share = {s.id: 1 - len(gone[s.id]) / s.width for s in sites}
    mixtures = {s.id for s in anatomy.of_kind(Kind.MOE)}
    inside = {p: owners[0] for p, owners in anatomy.coverage().items() if owners}
    maps = {f"{s.path}.weight" for s in anatomy.linears()}
    for name in held.before:
        counts = inside[name] not in mixtures or name in maps if name in inside else False
        if counts and len(held.before[name]) > 1:
            total -= Cost(macs=held.less(name))
    for mixture in mixtures if channels else {s.id.rpartition(".")[0] for s in sites if s.kind is Kind.EXPERT}:
        total -= Cost(macs=_mixture(anatomy, mixture, gone, share[channels[0].id] if channels else 1.0, held))
    for site in sites:
        total -= _products(anatomy, site, len(gone[site.id]))
    return total - (Cost(macs=_head(anatomy, held)) if channels else Cost())


def _products(anatomy: Anatomy, site: Site, count: int) -> Cost:
    """What attention weights take, and the cache: both go in proportion to heads."""
    if site.kind not in (Kind.HEAD, Kind.KV_GROUP):
        return Cost()
    home = anatomy.branch(site.id.rpartition(".")[0]).site
    cost = anatomy.cost(home)
    maps = sum(anatomy.linear_cost(s).macs for s in anatomy.linears(home))
    alone = site.kind is Kind.KV_GROUP or anatomy.grouped(site)[0] == 1
    kv = cost.kv_bytes * count // site.width if alone else 0
    return Cost(macs=(cost.macs - maps) * count // site.width, kv_bytes=kv)


def _mixture(anatomy: Anatomy, mixture: str, gone: Gone, channels: float, held: Sizes) -> int:
    """Products that a mixture saves beside those of linear maps: its router's rows, and experts that see all tokens.

    `channels` is the share of the stream's channels that stays.
    """
    experts = next(iter(anatomy.units(mixture, Kind.EXPERT)), None)
    maps = {f"{s.path}.weight": anatomy.linear_cost(s).macs for s in anatomy.linears(mixture)}
    rest = anatomy.cost(mixture).macs - sum(maps.values())
    if experts is None:
        return rest - round(rest * channels)
    parameters = dict(anatomy.model.named_parameters())
    cubes = {t.param for t in anatomy.ties(experts) if t.param in parameters and parameters[t.param].ndim > 2}
    each = sum(parameters[n].numel() // experts.width for n in cubes)
    runs = next(r for r in (experts.width, anatomy.active(experts), 0) if rest >= r * each)
    left = experts.width - len(gone.get(experts.id, ()))
    router = rest - runs * each
    after = router * left // experts.width + (left if runs == experts.width else runs) * each
    return rest - round(after * channels)


def _head(anatomy: Anatomy, held: Sizes) -> int:
    """Products that the model's head saves: a matrix outside of the blocks that reads the stream."""
    blocks = tuple(f"{b.path}." for k in anatomy.stacks for b in k.blocks)
    outer = [n for n, shape in held.before.items() if not n.startswith(blocks) and len(shape) > 1]
    spent = anatomy.total().macs - sum(anatomy.cost(b.site).macs for k in anatomy.stacks for b in k.blocks)
    used = [n for n in outer if prod(held.before[n]) <= spent]
    return held.less(max(used, key=lambda n: prod(held.before[n]))) if used else 0
