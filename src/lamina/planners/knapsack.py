"""One plan of everything: sublayers dropped, narrowed, of lower rank and of fewer bits, chosen together and exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.menu import Frontier, Menu, Option, Reason, Solved, Times
from lamina.core.papers import Card, Need
from lamina.core.registry import planner, recipe
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Limit
    from lamina.core.scores import Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.moments import InputMoments
    from lamina.planners._moves import Move
    from lamina.planners._solve import Problem
    from lamina.planners._trials import Trials

MOVES = ("drop", "narrow", "rank", "bits")


@planner(
    "knapsack",
    None,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.GRADIENT,
)
@dataclass(frozen=True, kw_only=True)
class Knapsack:
    """Choose for each sublayer one of its options so that the damage is least within all budgets, exactly.

    As in Puzzle (arXiv 2411.19146), but priced by what an option changes where it is made, times the loss's gradient
    and curvature there, and not by a run of the whole network with each.

    `moves`: "drop" the sublayer; "narrow" it to `shares` of its neurons or KV groups, the last map refitted; "rank":
    its maps by `rank_rewrite`, at `shares` of their parameters; "bits": its maps on the grids `types` by
    `bits_rewrite`; bits combine with a narrower sublayer. Prices are taken on the last quarter of the lab's text (at
    most `sequences` of `length` tokens), maps fitted on the rest: one forward and two backwards, one run of its
    sublayer for each option. Then `rounds` times the plan is tried, whole and without each rewrite in turn; prices of a
    rewrite are multiplied by what it really costs beside the others, and the choice is made anew. The plan that is
    truly cheapest is taken; 0 takes the prices as they are. With `probe` those trials are of copies that were healed
    for so many steps first, since what seems dear at once may be cheap then. Latency is measured on this machine.
    """

    card: ClassVar[Card]
    mixes: ClassVar[bool] = True
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "check_budget_is_met_and_not_overshot",
            "check_planner_is_deterministic",
            "check_something_is_left",
            "check_ties_go_in_depth_order",
            "check_steps_are_explicit",
            "check_planner_takes_every_model",
        ),
        "the check counts what dropping frees, and takes budgets of blocks and sublayers; here much else is done",
    )

    moves: tuple[str, ...] = MOVES
    kinds: tuple[Kind, ...] = ()
    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    types: tuple[str, ...] = ("Q8_0", "Q5_0", "Q4_0")
    rank_rewrite: str = "svd-llm"
    bits_rewrite: str = "round"
    sequences: int = 8
    length: int = 256
    rounds: int = 2
    probe: int = 0

    def __post_init__(self) -> None:
        unknown = [m for m in self.moves if m not in MOVES]
        if unknown or not self.moves:
            raise ValueError(f"moves are {', '.join(MOVES)}, not {', '.join(unknown) or 'none'}")
        if any(not 0 < s < 1 for s in self.shares):
            raise ValueError(f"shares lie between 0 and 1, not {self.shares}")

    def menu(self, bench: Bench) -> Menu:
        """Every option of every sublayer, priced; taken from the bench's folder where it is there."""
        from lamina.planners._menu import priced
        from lamina.planners._trials import parted

        found = bench.recall("menu.json", Menu)
        if found is None:
            fitting, judged = parted(bench.lab, self.sequences, self.length)
            found = bench.keep("menu.json", priced(bench.lab, fitting, judged, self._moves))
        return found

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """The steps, sublayer by sublayer in depth order; each says its price and what it frees.

        Raises InputError for a budget that no choice meets, or that counts blocks or sublayers.
        """
        from lamina.planners._rounds import settled
        from lamina.planners._target import required

        bench = required(bench, self.card.name)
        if budget.drop == 0 or (budget.drop is None and all(r.keep == 1 for r in budget.limits)):
            return ()
        problem = self.problem(budget, bench)
        if not problem.needs:
            return ()
        chosen = problem.cheapest()
        if chosen is None:
            raise problem.refuse(budget)
        trials = self.trials(bench.lab)
        trials.expect(problem.options)
        settling = settled(problem, trials, chosen, self.rounds)
        taken, level = [problem.options[i] for i in settling.chosen], settling.level
        told = tuple((o.groups[0], o.name) for o in taken)
        solved = Solved(
            needs=problem.needs, taken=told, factors=settling.factors, level=level, rises=settling.rises
        )  # fmt: skip
        bench.keep("solved.json", solved)
        steps = []
        for option in taken:
            extra = {k: v for k, v in option.saves.items() if "@" in k}
            for n, step in enumerate(option.steps):
                price = step.why["damage"] * settling.factors.get(step.rewrite, 1.0) * level
                steps.append(replace(step, why={**step.why, **({} if n else extra), "damage": price}))
        return tuple(steps)

    def trials(self, lab: Lab) -> Trials:
        """The bench on which sets of options can be tried."""
        from lamina.planners._trials import Healed, Trials, parted

        text = parted(lab, self.sequences, self.length)
        return Healed(*text, self.probe) if self.probe else Trials(*text)

    def problem(self, budget: Budget, bench: Bench) -> Problem:
        """What may be chosen from, and what must be freed. Raises InputError for what no option has a price in."""
        from lamina.planners._menu import RESOURCES, unlike
        from lamina.planners._solve import Problem

        for limit in budget.limits:
            if limit.metric not in (*RESOURCES, "latency"):
                what = f"the planner {self.card.name} takes no budget of {limit.metric}"
                raise InputError(what, hint="parameters, bytes, macs, kv or latency")
        menu, anatomy = self.menu(bench), bench.lab.anatomy
        kept = anatomy.expand(budget.protect)
        options = [o for o in menu.options if not kept & {*o.groups} and self._wanted(anatomy, o)]
        whole = dict(menu.whole)
        for limit in (r for r in budget.limits if r.metric == "latency"):
            options, whole[limit.resource] = self._timed(bench, menu, options, limit)
        needs = {r.resource: r.need(whole[r.resource]) for r in budget.limits}
        return Problem(options, {k: v for k, v in needs.items() if v > 0}, unlike(anatomy, options), whole)

    def _wanted(self, anatomy: Anatomy, option: Option) -> bool:
        return not self.kinds or all(anatomy.site(g).kind in self.kinds for g in option.groups)

    def _timed(self, bench: Bench, menu: Menu, options: Sequence[Option], limit: Limit) -> tuple[list[Option], float]:
        """The options with the seconds that they free, and those that the dense model takes."""
        from lamina.planners._latency import measured, saved

        resource, anatomy = limit.resource, bench.lab.anatomy
        times = bench.recall(Times.name(resource), Times)
        if times is None:
            made = measured(bench.lab, menu.options, resource.partition("@")[2])
            times = bench.keep(Times.name(resource), made)
        return [replace(o, saves={**o.saves, resource: saved(times, o, anatomy)}) for o in options], times.total

    def frontier(self, budget: Budget, bench: Bench, points: int = 12) -> Frontier:
        """Cheapest plans for ever smaller budgets of the first resource, the others as they are asked for."""
        from lamina.planners._solve import frontier

        problem, resource = self._known(budget, bench), budget.resource
        found = tuple(frontier(problem, resource, points))
        return Frontier(resource=resource, whole=problem.whole[resource], points=found)

    def explain(self, budget: Budget, bench: Bench) -> list[Reason]:
        """Why each option of the last plan was taken; the exact cheapest plan without it is what came second."""
        from lamina.planners._solve import reasons

        solved = bench.recall("solved.json", Solved)
        problem = self._known(budget, bench)
        if solved is None or dict(solved.needs) != dict(problem.needs):
            raise InputError("no plan of this budget was chosen here", hint="lamina plan RUN --keep … first")
        places = {(o.groups[0], o.name): n for n, o in enumerate(problem.options)}
        return reasons(problem, [places[key] for key in solved.taken if key in places])

    def _known(self, budget: Budget, bench: Bench) -> Problem:
        """The problem at the prices that the last plan's trials led to."""
        solved, problem = bench.recall("solved.json", Solved), self.problem(budget, bench)
        return problem if solved is None else problem.at(solved.factors, solved.level)

    def _moves(self, anatomy: Anatomy, site: Site, seen: InputMoments) -> Iterator[Move]:
        from lamina.planners import _moves as made

        if "drop" in self.moves and made.droppable(anatomy, site):
            yield made.dropped(anatomy, site)
        if "narrow" in self.moves:
            yield from made.narrowed(anatomy, site, seen, self.shares)
        if "rank" in self.moves:
            yield from made.factorised(anatomy, site, seen, self.shares, self.rank_rewrite)
        if "bits" in self.moves:
            yield from made.rounded(anatomy, site, seen, self.types, self.bits_rewrite)


recipe(
    "mixed",
    None,
    summary="Sublayers dropped, narrowed, of lower rank and of fewer bits in one plan, chosen exactly by their prices.",
    measure="",
    planner="knapsack",
)
