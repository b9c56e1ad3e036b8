"""Evolution of plans: places at levels of compression, a budget that each plan just meets, survival in stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from lamina.core.documents import Step
from lamina.core.errors import LaminaError
from lamina.core.sites import Kind, depth_key

if TYPE_CHECKING:
    from lamina.core.scores import Scores
    from lamina.planners._target import Target

Genome = tuple[int, ...]
"""The level of each place; 0 leaves it as it is, each next one frees more."""
TRIES = 20
"""Draws for each plan that is asked for, before it is given up that there are as many."""


class Space:
    """Plans over places in depth order: `tops` are their highest levels, `groups` says which places are alike.

    `met`: whether a plan frees what the budget asks; `allowed`: whether it may be made.
    """

    def __init__(
        self,
        groups: Sequence[str],
        tops: Sequence[int],
        met: Callable[[Genome], bool],
        allowed: Callable[[Genome], bool],
    ) -> None:
        self.groups, self.tops, self.met, self.allowed = tuple(groups), tuple(tops), met, allowed

    @property
    def dense(self) -> Genome:
        """The plan that does nothing."""
        return (0,) * len(self.tops)

    def full(self) -> Genome:
        """Places raised as far as they may be, in depth order, or until the budget is met."""
        return self.filled([p for p, top in enumerate(self.tops) for _ in range(top)])

    def filled(self, order: Sequence[int], genome: Genome | None = None) -> Genome:
        """Places are raised by a level, in this order, until the budget is met or the order is at its end."""
        found = self.dense if genome is None else genome
        for place in order:
            if self.met(found):
                break
            found = self._raised(found, place) or found
        return found

    def trimmed(self, genome: Genome, order: Sequence[int]) -> Genome:
        """Places are lowered, in this order, as far as the budget is still met: no level is higher than needed."""
        for place in order:
            while genome[place] and self._fits(lower := _with(genome, place, genome[place] - 1)):
                genome = lower
        return genome

    def mended(self, genome: Genome, draw: Random) -> Genome | None:
        """The plan raised at random places until the budget is met, and trimmed; None where that leads nowhere."""
        steps = [p for p, top in enumerate(self.tops) for _ in range(top)]
        draw.shuffle(steps)
        found = self.filled(steps, genome)
        return self.trimmed(found, _shuffled(range(len(self.tops)), draw)) if self._fits(found) else None

    def drawn(self, draw: Random) -> Genome | None:
        """A random plan: groups take turns to be raised at one of their places."""
        turns: dict[str, list[int]] = {}
        for place, group in enumerate(self.groups):
            turns.setdefault(group, []).extend([place] * self.tops[place])
        piles = [_shuffled(pile, draw) for pile in turns.values()]
        draw.shuffle(piles)
        order = [p[n] for n in range(max(map(len, piles), default=0)) for p in piles if n < len(p)]
        return self.mended(self.filled(order), draw)

    def switched(self, genome: Genome, draw: Random, most: int, across: bool) -> Genome | None:
        """A few places are raised by a level and as many lowered; both of a pair in one group, unless `across`.

        Their number is the lower of two draws from 1 to `most`.
        """
        found = genome
        for _ in range(min(draw.randint(1, most), draw.randint(1, most))):
            pairs = self._switches(found, across)
            if not pairs:
                break
            ups, downs = draw.choice(pairs)
            up, down = draw.choice(ups), draw.choice(downs)
            if up != down:
                found = _with(_with(found, up, found[up] + 1), down, found[down] - 1)
        return self.mended(found, draw) if self.allowed(found) else None

    def crossed(self, one: Genome, other: Genome, place: int, draw: Random) -> Genome | None:
        """The first plan's levels before a place, the second one's from there on."""
        found = one[:place] + other[place:]
        return self.mended(found, draw) if self.allowed(found) else None

    def flipped(self, genome: Genome, draw: Random) -> Genome | None:
        """One place takes another level."""
        place = draw.randrange(len(genome))
        level = draw.choice([x for x in range(self.tops[place] + 1) if x != genome[place]])
        found = _with(genome, place, level)
        return self.mended(found, draw) if self.allowed(found) else None

    def pairs(self, genome: Genome, across: bool) -> int:
        """How many plans are one switch away."""
        return sum(len(ups) * len(downs) for ups, downs in self._switches(genome, across))

    def _switches(self, genome: Genome, across: bool) -> list[tuple[list[int], list[int]]]:
        """Of each group the places that can be raised and those that can be lowered, where there are both."""
        found = []
        for group in dict.fromkeys(("",) if across else self.groups):
            mine = [p for p, g in enumerate(self.groups) if across or g == group]
            ups = [p for p in mine if genome[p] < self.tops[p]]
            downs = [p for p in mine if genome[p] > 0]
            found += [(ups, downs)] if ups and downs else []
        return found

    def _raised(self, genome: Genome, place: int) -> Genome | None:
        if genome[place] >= self.tops[place]:
            return None
        higher = _with(genome, place, genome[place] + 1)
        return higher if self.allowed(higher) else None

    def _fits(self, genome: Genome) -> bool:
        return self.allowed(genome) and self.met(genome)


class Drops(Space):
    """Sets of sites of some kinds that go under a budget (none: all sublayers; blocks, where the budget counts them).

    The first `early` of the blocks stay.
    """

    def __init__(self, target: Target, kinds: Sequence[Kind] = (), early: float = 0.0) -> None:
        anatomy = target.anatomy
        kinds = kinds or ((Kind.BLOCK,) if target.budget.metric == "blocks" else ())
        stay = {b.site.id for k in anatomy.stacks for b in k.blocks[: int(len(k.blocks) * early)]}
        self.target = target
        self.units = [u for u in target.units(kinds) if anatomy.block(u).site.id not in stay]
        super().__init__(
            groups=[anatomy.site(u).kind.value for u in self.units],
            tops=[1] * len(self.units),
            met=lambda genome: target.met(self.sites(genome)),
            allowed=lambda genome: target.allowed(self.sites(genome)),
        )

    def sites(self, genome: Genome) -> list[str]:
        """What goes, in depth order."""
        return [u for u, level in zip(self.units, genome, strict=True) if level]

    def guess(self, scores: Scores | None) -> Genome | None:
        """The sites of lowest score that meet the budget; None without scores of all of them."""
        if scores is None or any(u not in scores for u in self.units):
            return None
        order = sorted(range(len(self.units)), key=lambda p: (scores[self.units[p]], depth_key(self.units[p])))
        found = self.filled(order)
        return self.trimmed(found, order[::-1]) if self.met(found) else None

    def firsts(self, count: int, draw: Random, scores: Scores | None = None) -> list[Genome]:
        """Different sets to begin with, that of the scores among them. Raises InputError where no set will do."""
        known = self.guess(scores)
        found = brood(lambda: self.drawn(draw), count, [known] if known else [])
        if not found and not known:
            raise self.target.refuse(self.target.amount(self.sites(self.full())))
        return [known, *found] if known else found

    def steps(self, genome: Genome, why: dict[str, float]) -> tuple[Step, ...]:
        """One step per site, in depth order; each says what the whole set costs."""
        return tuple(Step(rewrite="drop", sites=(u,), why=why) for u in self.sites(genome))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One selection: the `survivors` of lowest `value` go on."""

    survivors: int
    value: Callable[[Genome], float]


def brood(make: Callable[[], Genome | None], count: int, known: Sequence[Genome] = ()) -> list[Genome]:
    """Up to `count` different plans from `make`, none of them `known`; fewer where draw after draw brings nothing."""
    found: dict[Genome, None] = {}
    for _ in range(TRIES * count):
        if len(found) >= count:
            break
        made = make()
        if made is not None and made not in known:
            found[made] = None
    return list(found)


def evolve(
    first: Sequence[Genome],
    stages: Sequence[Stage],
    vary: Callable[[Sequence[Genome]], Sequence[Genome]],
    generations: int,
    each: Callable[[int, Sequence[Genome]], None] = lambda *_: None,
) -> tuple[Genome, float]:
    """The fittest plan after some generations, and its value in the last stage.

    The `first` plans go through the first stage alone. Then `vary` makes the young of the population, which go through
    all stages; parents join in the last one, so that the best one is never lost. Of equals the one that changes earlier
    places is the fitter. `each` is told the generations done and the population.
    """
    population = _fittest(first, Stage(survivors=stages[-1].survivors, value=stages[0].value))
    for generation in range(generations):
        each(generation, population)
        young = list(vary(population))
        if not young:
            break
        for stage in stages[:-1]:
            young = _fittest(young, stage)
        population = _fittest(dict.fromkeys([*population, *young]), stages[-1])
    best = population[0]
    value = stages[-1].value(best)
    if not math.isfinite(value):
        raise LaminaError("what is judged is not a number for any candidate", hint="try --dtype float32")
    each(generations, population)
    return best, value


def _fittest(plans: Sequence[Genome] | dict[Genome, None], stage: Stage) -> list[Genome]:
    ranked = sorted((_finite(stage.value(g)), tuple(-x for x in g), g) for g in plans)
    return [g for _, _, g in ranked[: stage.survivors]]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _with(genome: Genome, place: int, level: int) -> Genome:
    return (*genome[:place], level, *genome[place + 1 :])


def _shuffled(order: Sequence[int], draw: Random) -> list[int]:
    found = list(order)
    draw.shuffle(found)
    return found
