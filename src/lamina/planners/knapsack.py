"""One plan of everything: sublayers dropped, narrowed, of lower rank and of fewer bits, chosen together and exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.menu import Option
from lamina.core.papers import Card, Need
from lamina.core.registry import planner, recipe
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.pricing import Pricing
    from lamina.planners._moves import Move

MOVES = ("drop", "narrow", "rank", "bits")
RESOURCES = ("parameters", "bytes", "macs", "kv_bytes")
"""What options free, by the names of `Cost`."""
FLOOR = 1e-5
"""The least price of an option, in nats: none is predicted to help."""


@planner(
    "knapsack",
    None,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.GRADIENT,
)
@dataclass(frozen=True, kw_only=True)
class Knapsack:
    """Choose for each sublayer one of its options so that the damage is least within the budget, exactly.

    As in Puzzle (arXiv 2411.19146), but priced by what an option changes where it is made, times the loss's gradient
    and curvature there, and not by a run of the whole network with each.

    `moves`: "drop" the sublayer; "narrow" it to `shares` of its neurons or KV groups, the last map refitted; "rank":
    its maps by `rank_rewrite`, at `shares` of their parameters; "bits": its maps on the grids `types` by
    `bits_rewrite`; bits combine with a narrower sublayer. Prices are taken on the last quarter of the lab's text (at
    most `sequences` of `length` tokens), maps fitted on the rest: one forward and two backwards, one run of its block
    for each option. `trials` true evaluations of plans on the way set the prices' level; 0 takes them as they are.
    """

    card: ClassVar[Card]
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
    trials: int = 4

    def __post_init__(self) -> None:
        unknown = [m for m in self.moves if m not in MOVES]
        if unknown or not self.moves:
            raise ValueError(f"moves are {', '.join(MOVES)}, not {', '.join(unknown) or 'none'}")
        if any(not 0 < s < 1 for s in self.shares):
            raise ValueError(f"shares lie between 0 and 1, not {self.shares}")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """The steps, sublayer by sublayer in depth order; each says its price and what it frees.

        Raises InputError for a budget that no choice meets, or that counts blocks or sublayers.
        """
        from lamina.planners._solve import cheapest
        from lamina.planners._target import Target, required

        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        if budget.metric not in RESOURCES:
            raise InputError(f"the planner knapsack takes no budget of {budget.metric}", hint="parameters or bytes")
        options, trials = self.menu(required(bench, self.card.name).lab, budget.protect)
        chosen = cheapest(options, {budget.metric: target.need}, unlike(anatomy, options))
        if chosen is None:
            most = sum(max(s) for s in _by_group(options, budget.metric).values())
            raise target.refuse(int(most))
        level = self._level(trials, options, [options[i] for i in chosen]) if self.trials else 1.0
        steps = (s for i in chosen for s in options[i].steps)
        return tuple(replace(s, why={**s.why, "damage": s.why["damage"] * level}) for s in steps)

    def menu(self, lab: Lab, protect: Sequence[str] = ()) -> tuple[list[Option], Trials]:
        """Every option of every sublayer, priced; and the bench on which plans of them can be tried."""
        from lamina.lab.moments import input_moments
        from lamina.lab.pricing import Pricing

        anatomy = lab.anatomy
        cut = max(1, len(lab.batches) * 3 // 4) if len(lab.batches) > 1 else 1
        fitting, judged = lab.on(lab.batches[:cut]), lab.on(lab.batches[cut:] or lab.batches)
        fitting.counts = judged.counts = lab.counts
        judged = judged.part(self.sequences, self.length)
        kept = anatomy.expand(protect)
        sites = [s for s in anatomy.sublayers if s.id not in kept and (not self.kinds or s.kind in self.kinds)]
        seen = input_moments(fitting, [s.id for x in sites for s in anatomy.linears(x)])
        moves = {s.id: list(self._moves(anatomy, s, seen)) for s in sites}
        pricing = Pricing(judged)
        trials = Trials(judged, {(m.site, m.name): m for row in moves.values() for m in row})
        prices = pricing.price({s: {m.name: trials.trial(m) for m in row if m.weights} for s, row in moves.items()})
        options: list[Option] = []
        for row in moves.values():
            damage = {m.name: price(pricing, prices, m) for m in row}
            options += [_option(m, damage[m.name]) for m in row]
            options += _combined([m for m in row if m.keeps < 1 and "narrow" in m.name], row, damage)
        return options, trials

    def _moves(self, anatomy: Anatomy, site: Any, seen: Any) -> Iterator[Move]:
        from lamina.planners import _moves as made

        if "drop" in self.moves and made.droppable(anatomy, site):
            yield made.dropped(anatomy, site)
        if "narrow" in self.moves:
            yield from made.narrowed(anatomy, site, seen, self.shares)
        if "rank" in self.moves:
            yield from made.factorised(anatomy, site, seen, self.shares, self.rank_rewrite)
        if "bits" in self.moves:
            yield from made.rounded(anatomy, site, seen, self.types, self.bits_rewrite)

    def _level(self, trials: Trials, options: Sequence[Option], chosen: Sequence[Option]) -> float:
        """What true damage is to the sum of prices: the geometric mean over parts of the plan that are tried."""
        import math

        found = []
        for n in range(1, self.trials + 1):
            some = chosen[n % 2 :: 2] if n < self.trials else chosen
            some = some[: max(1, len(some) * n // self.trials)]
            true, predicted = trials.rise(some), sum(o.damage for o in some)
            if true > 0 and predicted > 0:
                found.append(math.log(true / predicted))
        return math.exp(sum(found) / len(found)) if found else 1.0


class Trials:
    """Plans on trial: their maps written into the model, what they drop silenced; afterwards all is as before.

    Of a sublayer that gets narrower and of fewer bits the last map is tried as the narrower one, not rounded.
    """

    def __init__(self, lab: Lab, moves: Mapping[tuple[str, str], Move]) -> None:
        self.lab, self.moves = lab, moves
        self._dense: float | None = None

    def trial(self, move: Move) -> Any:
        """What puts one move on trial."""
        from lamina.lab.pricing import written

        return lambda: written(self.lab.model, move.weights)

    @contextmanager
    def on(self, options: Sequence[Option]) -> Iterator[None]:
        """Inside, the model has these options."""
        from lamina.lab.pricing import written

        weights: dict[str, Tensor] = {}
        gone = []
        for option in options:
            for move in (self.moves[option.groups[0], name] for name in option.name.split(" + ")):
                gone += [] if move.weights else [move.site]
                weights = {**move.weights, **weights}
        with ExitStack() as held:
            held.enter_context(written(self.lab.model, weights))
            held.enter_context(self.lab.ablate(gone))
            yield

    def rise(self, options: Sequence[Option]) -> float:
        """The true rise of the loss on the trials' text, in nats; one forward over it."""
        if self._dense is None:
            self._dense = self.lab.loss()
        with self.on(options):
            return self.lab.loss() - self._dense


def price(pricing: Pricing, prices: Mapping[tuple[str, str], Any], move: Move) -> float:
    """What a move should cost, in nats per token: slope plus the mean, in logarithms, of two second-order terms.

    The Gauss-Newton form is right for small changes and too low for those of whole sublayers; its damped form, which is
    right for these, is too high for others.
    """
    priced = prices[move.site, move.name] if move.weights else pricing.silence(move.site)
    slope, curve, damped = priced.mean()
    second = (curve * KAPPA * damped) ** 0.5
    return max(slope + second, LEAST * second, FLOOR)


KAPPA = 1.85
"""As of the measure `damage`."""
LEAST = 0.3
"""The share of the second-order term that no first-order gain outweighs: on other text it is another one."""


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


def _by_group(options: Sequence[Option], resource: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for option in options:
        found.setdefault(option.groups[0], []).append(option.saves[resource])
    return found


recipe(
    "mixed",
    None,
    summary="Sublayers dropped, narrowed, of lower rank and of fewer bits in one plan, chosen exactly by their prices.",
    measure="",
    planner="knapsack",
)
