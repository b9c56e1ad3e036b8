"""Beam search with a judge: several sets grow side by side, and what looked best first need not win."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.documents import Step
from lamina.core.papers import Card, Need
from lamina.core.registry import planner, recipe
from lamina.core.sites import SUBLAYERS, Kind, depth_key
from lamina.planners.greedy import Greedy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.core.scores import Scores
    from lamina.lab.bench import Bench
    from lamina.lab.judge import Judge
    from lamina.planners._target import Target


@dataclass(frozen=True)
class _Branch:
    """A set on its way: its sites in the order of dropping, and the judge's value after each."""

    sites: tuple[str, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        return self.values[-1] if self.values else 0.0

    def grown(self, site: str, value: float) -> _Branch:
        """One site more."""
        return _Branch((*self.sites, site), (*self.values, value))


@planner("beam", None, on=(Kind.BLOCK, *sorted(SUBLAYERS)), needs=Need.ABLATION)
@dataclass(frozen=True, kw_only=True)
class Beam(Greedy):
    """As greedy, but the `width` best sets of each round go on, and the best of those that meet the budget is taken.

    Each set is grown by the `width` sites that greedy would take first, one after the other; all that come of a round
    are ranked by the judge's metric over what they free of what the budget asks (per="site": by the metric alone).
    Width 1 is greedy. All other options are those of greedy; the `shortlist` counts for each set.
    """

    card: ClassVar[Card]

    width: int = 4

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is at least 1, not {self.width}")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step per site, in the order of dropping."""
        from lamina.planners._target import Target, required

        bench = required(bench, self.card.name)
        target = Target(budget, anatomy)
        if target.met(()):
            return ()
        judge = bench.judge(self.metric, sequences=self.sequences, length=self.length, batch_size=self.batch_size)
        hint = {u: scores[u] for u in target.units(self.kinds) if scores is not None and u in scores}
        open_, done, most = [_Branch()], list[_Branch](), 0
        while open_:
            most = max([most, *(target.amount(b.sites) for b in open_)])
            pool: dict[frozenset[str], _Branch] = {}
            for branch in open_:
                for child in self._children(branch, target, judge, hint, set(pool)):
                    pool[anatomy.expand(child.sites)] = child
                bench.note()
            kept = sorted(pool.values(), key=lambda b: self._rank(b, target))[: self.width]
            done += [b for b in kept if target.met(b.sites)]
            open_ = [b for b in kept if not target.met(b.sites)]
            freed = max((_freed(target, b) for b in kept), default=target.need)
            bench.lab.progress("plan", int(freed), int(target.need))
        if not done:
            raise target.refuse(most)
        best = min(done, key=lambda b: (b.value, [depth_key(s) for s in sorted(b.sites, key=depth_key)]))
        return tuple(self._steps(best))

    def _children(
        self, branch: _Branch, target: Target, judge: Judge, hint: dict[str, float], known: set[frozenset[str]]
    ) -> Iterator[_Branch]:
        """The set grown by one site, by the `width` that rise least per weight, the least first; none that is known."""
        anatomy, gone = target.anatomy, list(branch.sites)
        options = self._options(target, gone)
        worth = {u: hint[u] / self._weight(target, gone, u) for u in options if u in hint}
        options = self._listed(options, worth, gone, anatomy)
        options = [u for u in options if anatomy.expand([*gone, u]) not in known]
        if options:
            judge.rebase(gone)
        for _ in range(min(self.width, len(options))):
            weights = [self._weight(target, gone, u) for u in options]
            order = [hint.get(u, 0.0) / w for u, w in zip(options, weights, strict=True)]
            place, value = judge.least(options, weights=weights, hint=order, margin=self.margin)
            found = {u: judge.estimates.get(judge.base | anatomy.expand([u])) for u in options}
            hint.update({u: v - branch.value for u, v in found.items() if v is not None})
            yield branch.grown(options.pop(place), value)

    def _rank(self, branch: _Branch, target: Target) -> tuple[float, list[object]]:
        """The price of what a set frees, as far as it is needed; of equals the one of earlier sites is first."""
        price = branch.value if self.per == "site" else branch.value / _freed(target, branch)
        return price, [depth_key(s) for s in sorted(branch.sites, key=depth_key)]

    def _steps(self, branch: _Branch) -> Iterator[Step]:
        before = 0.0
        for site, value in zip(branch.sites, branch.values, strict=True):
            yield Step(rewrite="drop", sites=(site,), why={self.metric: value, "rise": value - before})
            before = value


def _freed(target: Target, branch: _Branch) -> float:
    """What a set frees of what is needed, in the budget's unit."""
    return min(target.amount(branch.sites), target.need)


recipe(
    "beam",
    None,
    summary="Beam search over blocks by the divergence from the dense model, then a closed-form refit of what stays.",
    measure="damage",
    measure_options={"sequences": 8, "length": 256},
    planner="beam",
    kinds=(Kind.BLOCK,),
    refit=True,
)
