"""EvoPress: one plan, its offspring by switched levels, and a selection that hears more text the fewer are left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import PLANNERS, planner, recipe
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Scores
    from lamina.lab.bench import Bench
    from lamina.planners._evolve import Genome, Space
    from lamina.planners._target import Target

PAPER = Paper(
    key="sieberling2024evopress",
    title="EvoPress: Accurate Dynamic Model Compression via Evolutionary Search",
    authors=("Oliver Sieberling", "Denis Kuznedelev", "Eldar Kurtic", "Dan Alistarh"),
    year=2024,
    arxiv="2410.14649",
)
LESS_TEXT = (
    "by default 16 offspring of 32 first plans, heard on 512 and 2048 tokens in sequences of 256, for a machine "
    "without an accelerator (published for dropping: 32 of 64, on 2048 and 32768 tokens in sequences of 8192)"
)
SAME_TEXT = "a stage hears the same text in all generations, so that what was judged once is known; the code draws anew"


@planner(
    "evopress",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.ABLATION,
    deviations=(
        LESS_TEXT,
        SAME_TEXT,
        "a budget of parameters or bytes decides how many sites go; where a switch leaves it unmet or slack, random "
        "sites go or stay until it is just met (the code drops as many attentions as MLPs; its sites are of one size)",
        "where there are scores, the sites of lowest score are one of the first plans",
        "every switch of blocks counts; in the code's mode of whole blocks half of the switches are without effect",
        "over a menu the first plans are random, with the exact choice by prices among them; places are sublayers",
    ),
)
@dataclass(frozen=True, kw_only=True)
class EvoPress:
    """Search plans by a (1 + λ) evolution with level-switch mutation and multi-step selection (alg. 1).

    `levels`: "drop" takes sites of `kinds` out (none: sublayers; blocks, where the budget counts them); "menu" chooses
    among all options of the planner knapsack (with `menu_options`) for each sublayer, ordered by what they free.
    In each of the `generations` (None: two thirds of the k(n - k) switches of a kind, as published) `offspring` plans
    are made: up to `mutations` sites, fewer more often, swap levels with others, of the same kind (`switch`="kind") or
    of any. Stage by stage `survivors` of them are left, judged by the `metric` on so many `tokens`; the parents join
    in the last. The first population is the best of `first` plans in the first stage. Sequences are cut to `length`.
    """

    card: ClassVar[Card]

    levels: Literal["drop", "menu"] = "drop"
    kinds: tuple[Kind, ...] = ()
    metric: str = "kl"
    generations: int | None = None
    offspring: int = 16
    first: int = 32
    survivors: tuple[int, ...] = (2, 1)
    tokens: tuple[int, ...] = (512, 2048)
    mutations: int = 3
    switch: Literal["kind", "any"] = "kind"
    length: int = 256
    batch_size: int = 2
    seed: int | None = None
    menu_options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.levels not in ("drop", "menu") or self.switch not in ("kind", "any"):
            raise ValueError(f"levels are drop or menu, switch is kind or any, not {self.levels} and {self.switch}")
        if not self.survivors or len(self.survivors) != len(self.tokens):
            raise ValueError("each stage of selection has its survivors and its tokens")
        counts = (self.offspring, self.first, self.mutations, self.length, self.batch_size)
        if min(*counts, *self.survivors, *self.tokens) < 1 or (self.generations or 0) < 0:
            raise ValueError("offspring, first, mutations, survivors, tokens, length and batch_size are at least 1")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """The steps in depth order; each says what the whole plan costs by the metric (of a menu: its own price, too).

        What was judged of drops is in the bench's journal, so that a killed search goes on.
        """
        from lamina.planners._target import Target, required

        bench = required(bench, self.card.name)
        if self.levels == "menu":
            return self._of_menu(budget, bench)
        target = Target(budget, anatomy)
        return () if target.met(()) else self._of_drops(scores, target, bench)

    def _of_drops(self, scores: Scores | None, target: Target, bench: Bench) -> tuple[Step, ...]:
        from lamina.planners._evolve import Drops

        space, draw = Drops(target, self.kinds), self._draw(bench)
        judges = [
            bench.judge(self.metric, sequences=n, length=self.length, batch_size=self.batch_size)
            for n in self._sequences(bench.lab.sequences)
        ]

        def settled(parent: Genome) -> None:
            for judge in judges:
                judge.rebase(space.sites(parent))
            bench.note()

        values = [lambda genome, judge=judge: judge.value(space.sites(genome)) for judge in judges]
        first = space.firsts(self.first, draw, scores)
        best, value = self._evolved(space, first, values, draw, bench, settled)
        return space.steps(best, {self.metric: value})

    def _of_menu(self, budget: Budget, bench: Bench) -> tuple[Step, ...]:
        from lamina.planners._levels import Levels, Measured

        menu = PLANNERS.make("knapsack", {"kinds": self.kinds, **self.menu_options})
        problem, draw = menu.problem(budget, bench), self._draw(bench)
        if not problem.needs:
            return ()
        space, trials = Levels(problem, budget, bench.lab.anatomy), menu.trials(bench.lab)
        counts = self._sequences(trials.lab.sequences)
        heard = {n: Measured(trials, self.metric, n, self.length, self.batch_size) for n in counts}
        values = [lambda genome, n=n: heard[n].value(space.chosen(genome)) for n in counts]
        best, value = self._evolved(space, space.firsts(self.first, draw), values, draw, bench)
        chosen = space.chosen(best)
        true, told = trials.rise(chosen), sum(o.damage for o in chosen)
        level = true / told if true > 0 and told > 0 else 1.0
        steps = []
        for option in chosen:
            extra = {k: v for k, v in option.saves.items() if "@" in k}
            for n, step in enumerate(option.steps):
                why = {**step.why, **({} if n else extra), "damage": step.why["damage"] * level, self.metric: value}
                steps.append(replace(step, why=why))
        return tuple(steps)

    def _evolved(
        self,
        space: Space,
        first: Sequence[Genome],
        values: Sequence[Callable[[Genome], float]],
        draw: Random,
        bench: Bench,
        settled: Callable[[Genome], None] = lambda _: None,
    ) -> tuple[Genome, float]:
        """The fittest plan and its value; `settled` is told the best one of each generation before the next is made."""
        from lamina.planners._evolve import Stage, brood, evolve

        across = self.switch == "any"
        ahead = space.pairs(first[0], across=False) / len(set(space.groups)) / 1.5
        generations = math.ceil(ahead) if self.generations is None else self.generations

        def vary(population: Sequence[Genome]) -> list[Genome]:
            make = lambda: space.switched(draw.choice(population), draw, self.mutations, across)  # noqa: E731
            return brood(make, self.offspring, population)

        def each(done: int, population: Sequence[Genome]) -> None:
            settled(population[0])
            bench.lab.progress("plan", done, generations)

        stages = [Stage(survivors=n, value=v) for n, v in zip(self.survivors, values, strict=True)]
        return evolve(first, stages, vary, generations, each)

    def _sequences(self, most: int) -> list[int]:
        """Of how many sequences each stage hears."""
        return [min(max(1, round(t / self.length)), most) for t in self.tokens]

    def _draw(self, bench: Bench) -> Random:
        return Random(bench.lab.seed if self.seed is None else self.seed)


recipe(
    "evopress",
    PAPER,
    summary="EvoPress: an evolution of sets of sublayers by the divergence from the dense model.",
    measure="",
    planner="evopress",
    deviations=(LESS_TEXT, SAME_TEXT),
)
recipe(
    "evopress-blocks",
    PAPER,
    summary="EvoPress over whole blocks.",
    measure="",
    planner="evopress",
    kinds=(Kind.BLOCK,),
    deviations=(LESS_TEXT, SAME_TEXT),
)
