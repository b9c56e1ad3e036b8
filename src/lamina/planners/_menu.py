"""The menu of a mixed plan: options of every sublayer, made and priced one sublayer after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from lamina.core.documents import Step
from lamina.core.menu import Menu, Option

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.moments import InputMoments
    from lamina.lab.pricing import Priced, Trial
    from lamina.planners._moves import Move

RESOURCES = ("parameters", "bytes", "macs", "kv_bytes")
"""What options free, by the names of `Cost`."""
FLOOR = 1e-5
"""The least price of an option, in nats: none is predicted to help."""
KAPPA = 1.85
"""As of the measure `damage`."""
LEAST = 0.3
"""The share of the second-order term that no first-order gain outweighs: on other text it is another one."""

Makes = Callable[["Anatomy", "Site", "InputMoments"], Iterable["Move"]]


def priced(lab: Lab, fitting: Lab, judged: Lab, makes: Makes) -> Menu:
    """What `makes` (anatomy, sublayer, inputs of maps) can do to each sublayer, with prices on the judged text."""
    from lamina.lab.moments import input_moments
    from lamina.lab.pricing import Pricing, written

    anatomy, before = lab.anatomy, lab.passes
    seen = input_moments(fitting, [s.id for x in anatomy.sublayers for s in anatomy.linears(x)])
    pricing = Pricing(judged)
    rows: dict[str, list[Move]] = {s.id: [] for s in anatomy.sublayers}

    def offers(site: str) -> Iterator[tuple[str, Trial]]:
        for move in makes(anatomy, anatomy.site(site), seen):
            rows[site].append(replace(move, weights={}))  # so that no more than one is held
            if move.weights:
                yield move.name, lambda w=move.weights: written(lab.model, w)

    prices = pricing.price(offers)
    options: list[Option] = []
    for site, row in rows.items():
        damage = {
            m.name: price(prices[site, m.name] if (site, m.name) in prices else pricing.silence(site)) for m in row
        }
        options += [_option(m, damage[m.name]) for m in row]
        options += _combined([m for m in row if m.keeps < 1 and "narrow" in m.name], row, damage)
    whole = {k: float(v) for k, v in asdict(anatomy.total()).items() if k in RESOURCES}
    return Menu(whole=whole, options=tuple(options), passes=lab.passes - before, tokens=lab.tokens)


def price(found: Priced) -> float:
    """What a move should cost, in nats per token: slope plus the mean, in logarithms, of two second-order terms.

    The Gauss-Newton form is right for small changes and too low for those of whole sublayers; its damped form, which is
    right for these, is too high for others.
    """
    slope, curve, damped = found.mean()
    second = (curve * KAPPA * damped) ** 0.5
    return max(slope + second, LEAST * second, FLOOR)


def _option(move: Move, damage: float) -> Option:
    saves = {name: float(getattr(move.saves, name)) for name in RESOURCES}
    steps = tuple(_told(s, damage, saves) for s in move.steps)
    return Option(name=move.name, groups=(move.site,), steps=steps, damage=damage, saves=saves)


def _told(step: Step, damage: float, saves: Mapping[str, float]) -> Step:
    """The step with its price and what it frees."""
    return replace(step, why={"damage": damage, **{k: v for k, v in saves.items() if v}})


def _combined(narrow: Sequence[Move], row: Sequence[Move], damage: Mapping[str, float]) -> Iterator[Option]:
    """Narrower and of fewer bits: prices add up, that of the bits by the share that stays.

    What is left of a map's inputs must fit the grid's blocks.
    """
    from lamina.maths.grids import GRIDS

    for first in narrow:
        for second in (m for m in row if "type" in m.steps[0].options):
            if first.inputs % GRIDS[second.steps[0].options["type"]].block:
                continue
            a, b = _option(first, damage[first.name]), _option(second, damage[second.name] * first.keeps)
            less = b.saves["bytes"] * first.keeps
            bits = (_told(s, b.damage, {"bytes": less}) for s in b.steps)
            yield Option(
                name=f"{a.name} + {b.name}", groups=a.groups, steps=(*a.steps, *bits),
                damage=a.damage + b.damage, saves={**a.saves, "bytes": a.saves["bytes"] + less},
            )  # fmt: skip


def unlike(anatomy: Anatomy, options: Sequence[Option]) -> list[list[int]]:
    """Sets of options that can't all be taken: drops that would leave a stack without sublayers, or without a cache."""
    drops = {o.groups[0]: n for n, o in enumerate(options) if o.kinds == ("drop",)}
    sets = [[x.site.id for b in k.blocks for x in b.branches] for k in anatomy.stacks]
    sets.append([s.id for s in anatomy.sublayers if anatomy.branch(s).cached])
    return [[drops[s] for s in group] for group in sets if group and all(s in drops for s in group)]
