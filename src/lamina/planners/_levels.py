"""Plans from a priced menu as places at levels, and what they really cost on a part of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from lamina.core.errors import InputError, did_you_mean
from lamina.core.menu import Option
from lamina.lab.judge import METRICS
from lamina.lab.rows import real
from lamina.planners._evolve import Genome, Space, brood

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.planners._solve import Problem
    from lamina.planners._trials import Trials


class Levels(Space):
    """For each place a ladder of options: each frees more of the first resource than the one before, and costs more.

    Options that free none of it, or less than another one at no lower price, are left out. Places take their sublayer's
    kind as their group. Raises InputError where no plan meets the budget.
    """

    def __init__(self, problem: Problem, budget: Budget, anatomy: Anatomy) -> None:
        self.needs = dict(problem.needs)
        first = next(iter(self.needs))
        rows: dict[str, list[Option]] = {}
        for option in problem.options:
            rows.setdefault(option.groups[0], []).append(option)
        ladders = {s: _ladder(row, first) for s, row in rows.items()}
        self.ladders = {s: row for s, row in ladders.items() if row}
        some = [[problem.options[i] for i in held] for held in problem.some]
        super().__init__(
            groups=[anatomy.site(s).kind.value for s in self.ladders],
            tops=[len(row) for row in self.ladders.values()],
            met=self._meets,
            allowed=lambda genome: _together(self.chosen(genome), some),
        )
        exact = problem.cheapest()
        if exact is None:
            raise problem.refuse(budget)
        taken = {o.groups[0]: o for o in (problem.options[i] for i in exact)}
        guess = tuple(row.index(taken[s]) + 1 if taken.get(s) in row else 0 for s, row in self.ladders.items())
        self.guess = guess if self.met(guess) else None

    def chosen(self, genome: Genome) -> list[Option]:
        """The options of a plan, in depth order."""
        return [row[level - 1] for row, level in zip(self.ladders.values(), genome, strict=True) if level]

    def _meets(self, genome: Genome) -> bool:
        options = self.chosen(genome)
        return all(sum(o.saves.get(n, 0.0) for o in options) >= x * (1 - 1e-12) for n, x in self.needs.items())

    def firsts(self, count: int, draw: Random) -> list[Genome]:
        """The exact choice by prices, where the ladders have it, and random plans."""
        known = [self.guess] if self.guess else []
        found = [*known, *brood(lambda: self.drawn(draw), count, known)]
        if not found:
            raise InputError("no random plan from the menu meets the budget", hint="keep more, or take mixed")
        return found


def _ladder(row: Sequence[Option], resource: str) -> list[Option]:
    kept: list[Option] = []
    for option in sorted(row, key=lambda o: (-o.saves.get(resource, 0.0), o.damage)):
        if option.saves.get(resource, 0.0) > 0 and (not kept or option.damage < kept[-1].damage):
            kept.append(option)
    return kept[::-1]


def _together(options: Sequence[Option], some: Sequence[Sequence[Option]]) -> bool:
    """Whether no place is taken twice, and of each set one option stays out."""
    places = Counter(g for o in options for g in o.groups)
    taken = {(o.groups, o.name) for o in options}
    full = any(all((o.groups, o.name) in taken for o in held) for held in some)
    return not full and max(places.values(), default=0) <= 1


class Measured:
    """The metric of plans on at most `sequences` of the trials' text, cut to `length`; what was tried is remembered.

    `metric`: a divergence from the dense model, or "loss" (its rise); mean per token, in nats.
    """

    def __init__(self, trials: Trials, metric: str, sequences: int, length: int, batch_size: int) -> None:
        if metric != "loss" and metric not in METRICS:
            raise InputError(f"no metric named {metric!r}", hint=did_you_mean(metric, [*METRICS, "loss"]))
        self.trials, self.metric = trials, metric
        part = trials.lab.part(sequences, length)
        ids = [b["input_ids"] for b in part.batches if set(b) == {"input_ids"}]
        alike = len(ids) == len(part.batches) and len({i.shape for i in ids}) == 1
        self.lab = part.on(torch.cat(ids), batch_size=batch_size) if alike else part
        self.lab.counts = trials.lab.counts
        self.known: dict[tuple[tuple[str, str], ...], float] = {}
        with torch.no_grad():
            self._dense: Any = self.lab.loss() if metric == "loss" else [self._compare(b) for b in self.lab.batches]

    def _compare(self, batch: Any) -> Any:
        return METRICS[self.metric](self.lab.forward(batch))

    @torch.no_grad()
    def value(self, options: Sequence[Option]) -> float:
        """One forward over the part."""
        key = tuple((o.groups[0], o.name) for o in options)
        if key not in self.known:
            with self.trials.on(options):
                self.known[key] = self.lab.loss() - self._dense if self.metric == "loss" else self._divergence()
        return self.known[key]

    def _divergence(self) -> float:
        total, count = 0.0, 0
        for batch, compare in zip(self.lab.batches, self._dense, strict=True):
            mask = real(batch).to(self.lab.device)
            total += float((compare(self.lab.forward(batch)).double() * mask).sum())
            count += int(mask.sum())
        return total / count
