"""A budget on one model: how much must go, and how much a set of sites frees."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lamina.core.errors import InputError
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.lab.bench import Bench


def required(bench: Bench | None, planner: str) -> Bench:
    """The bench of a planner that can't do without one."""
    if bench is None:
        raise InputError(f"the planner {planner} judges on a text and needs a bench", hint="pass bench=Bench(lab)")
    return bench


class Target:
    """What a budget asks of one model, in the budget's own unit.

    `need` is how much must be freed (parameters, bytes, blocks or sublayers).
    """

    def __init__(self, budget: Budget, anatomy: Anatomy) -> None:
        if budget.also or budget.metric == "latency":
            what = "several resources" if budget.also else "latency"
            raise InputError(f"this planner takes no budget of {what}", hint="--recipe mixed does")
        self.budget, self.anatomy = budget, anatomy
        self.protected = anatomy.expand(budget.protect)
        self.blocks = {s.id: anatomy.expand([s.id]) for s in anatomy.of_kind(Kind.BLOCK)}
        self.free = frozenset(s.id for s in anatomy.sublayers) - self.protected
        self.need = self._need()
        self._last_caches = frozenset(s.id for s in anatomy.sublayers if anatomy.branch(s).cached)

    def _whole(self) -> int:
        metric = self.budget.metric
        if metric == "blocks":
            return len(self.blocks)
        if metric == "sublayers":
            return len(self.anatomy.sublayers)
        return getattr(self.anatomy.total(), metric)

    def _need(self) -> int:
        whole = self._whole()
        if self.budget.drop is not None:
            return self.budget.drop
        if self.budget.keep is not None and self.budget.metric in ("blocks", "sublayers"):
            return round(whole * (1 - self.budget.keep))
        return math.ceil(self.budget.need(whole))

    def amount(self, gone: Iterable[str]) -> int:
        """What dropping these sites frees, in the budget's unit."""
        sublayers = self.anatomy.expand(gone)
        if self.budget.metric == "sublayers":
            return len(sublayers)
        if self.budget.metric == "blocks":
            return sum(parts <= sublayers for parts in self.blocks.values())
        return getattr(self.anatomy.freed(sublayers), self.budget.metric)

    def met(self, gone: Iterable[str]) -> bool:
        """Whether dropping these sites meets the budget."""
        return self.amount(gone) >= self.need

    def allowed(self, gone: Iterable[str]) -> bool:
        """Whether the sites are free to go and something is left: of every stack, and of what holds a cache."""
        sublayers = self.anatomy.expand(gone)
        if sublayers & self.protected:
            return False
        if self._last_caches and self._last_caches <= sublayers:
            return False
        return all(
            not all(x.site.id in sublayers for b in stack.blocks for x in b.branches) for stack in self.anatomy.stacks
        )

    def units(self, kinds: Iterable[Kind]) -> list[str]:
        """The sites of these kinds (none: all sublayers) that may go, in depth order."""
        wanted = tuple(kinds)
        sites = self.anatomy.of_kind(*wanted) if wanted else self.anatomy.sublayers
        return [s.id for s in sites if self.allowed([s.id])]

    def refuse(self, freed: int) -> InputError:
        """The error for a budget that these sites can't meet."""
        unit = self.budget.metric
        whole = self._whole()
        return InputError(
            f"the budget asks to drop {self.need:,} of {whole:,} {unit}, but at most {freed:,} may go this way",
            hint="keep more, protect less, or take a recipe that drops other kinds of sites",
        )
