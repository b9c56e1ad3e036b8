"""Prices put right by trials: what a rewrite really costs in a plan, beside all the others of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.planners._solve import Problem
    from lamina.planners._trials import Trials

MOST = 8.0
"""By what prices are multiplied or divided at most."""


@dataclass(frozen=True)
class Settled:
    """The choice of the least true rise of all that were tried.

    `factors`: rewrite → what its prices were multiplied by when it was made; `level`: what the plan's true rise is to
    the sum of its prices; `rises`: of every round's plan, in nats.
    """

    chosen: list[int]
    factors: Mapping[str, float]
    level: float = 1.0
    rises: tuple[float, ...] = ()


def settled(problem: Problem, trials: Trials, chosen: list[int], rounds: int) -> Settled:
    """Try the plan, whole and without each of its rewrites; choose again at prices put right; at most `rounds` times.

    A rewrite's factor is its rise beside the others over the sum of its prices. One forward over the judged text for
    each plan, and one for each rewrite of it. At last the cheapest plan of each single kind is tried too, if its prices
    promise less than the best rise so far.
    """
    best: Settled | None = None
    factors: dict[str, float] = {}
    rises: list[float] = []
    tried = set[tuple[int, ...]]()
    for number in range(rounds):
        tried.add(tuple(chosen))
        at = problem.at(factors)
        rise, sums = trials.rise([problem.options[i] for i in chosen]), at.price(chosen)
        rises.append(rise)
        if best is None or rise < min(rises[:-1]):
            best = Settled(chosen, dict(factors), _level(rise, sums))
        if number + 1 < rounds:
            factors = _corrected(problem, trials, chosen, factors, rise)
            again = problem.at(factors).cheapest()
            if again is None or tuple(again) in tried:
                break
            chosen = again
    if best is None:
        return Settled(chosen, {})
    for kinds in dict.fromkeys(o.kinds for o in problem.options):
        one = [i for i, o in enumerate(problem.options) if o.kinds == kinds]
        alone = problem.cheapest(without=set(range(len(problem.options))) - {*one})
        sums = problem.price(alone) if alone else 0.0
        if alone and tuple(alone) not in tried and sums < min(rises):
            rise = trials.rise([problem.options[i] for i in alone])
            if rise < min(rises):
                best = Settled(alone, {}, _level(rise, sums))
            rises.append(rise)
    return Settled(best.chosen, best.factors, best.level, tuple(rises))


def _corrected(
    problem: Problem, trials: Trials, chosen: Sequence[int], factors: Mapping[str, float], rise: float
) -> dict[str, float]:
    """Factors by what the rise falls by where the options with a rewrite are left out."""
    options = [problem.options[i] for i in chosen]
    kinds = list(dict.fromkeys(k for o in options for k in o.kinds))
    found = dict(factors)
    for kind in kinds if len(kinds) > 1 else ():
        prices = problem.at(factors)
        share = prices.price(i for i, o in zip(chosen, options, strict=True) if kind in o.kinds)
        marginal = rise - trials.rise([o for o in options if kind not in o.kinds])
        ratio = _held(marginal / share) if share > 0 else 1.0
        found[kind] = factors.get(kind, 1.0) * ratio
    return found


def _level(rise: float, sums: float) -> float:
    """The true rise over the sum of prices; a half where the text says less than that, or that all gets better."""
    return min(max(rise / sums, 0.5), MOST) if sums > 0 else 1.0


def _held(ratio: float) -> float:
    """A ratio within bounds: what a text tells of plans that cost next to nothing is noise."""
    return min(max(ratio, 1 / MOST), MOST)
