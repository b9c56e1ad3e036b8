"""N2N: a recurrent policy learns by trial which layers to remove, rewarded for what is kept of size and of quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import planner, recipe
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Scores
    from lamina.lab.bench import Bench
    from lamina.planners._evolve import Drops, Genome

PAPER = Paper(
    key="ashok2017n2n",
    title="N2N Learning: Network to Network Compression via Policy Gradient Reinforcement Learning",
    authors=("Anubhav Ashok", "Nicholas Rhinehart", "Fares Beainy", "Kris M. Kitani"),
    year=2017,
    arxiv="1709.06030",
)
DEVIATIONS = (
    "the first stage alone, the removal of layers; no second policy shrinks those that stay",
    "a student is the thinned model as it is, not trained; its accuracy over the teacher's is exp(-rise of the "
    "metric), with the loss the ratio of the perplexities",
    "layers are drawn one after another by the policy's odds until the budget is met; in the paper each is drawn by "
    "itself, and a student outside the limits is rewarded with -1",
    "a layer is told by kind, place and costs, for want of kernels and strides",
)


@planner("n2n", PAPER, on=(Kind.BLOCK, *sorted(SUBLAYERS)), needs=Need.ABLATION, deviations=DEVIATIONS)
@dataclass(frozen=True, kw_only=True)
class N2N:
    """Remove the layers that a policy, trained by REINFORCE, was rewarded most for: R = accuracy · C(2 - C).

    C is the share of parameters that goes, accuracy that of the student relative to the teacher's. The policy is a
    bidirectional LSTM of two layers, `hidden` wide, over the layers; in each of `epochs` it draws `rollouts` students
    and takes one step of Adam at `rate` towards those above the mean reward so far. The best student drawn is taken.
    `kinds`: what is a layer (none: sublayers; blocks, where the budget counts them). The judge of the `metric` hears
    the first `length` tokens of `sequences` of the text, `batch_size` sequences at once.
    """

    card: ClassVar[Card]

    kinds: tuple[Kind, ...] = ()
    metric: str = "loss"
    epochs: int = 30
    rollouts: int = 5
    rate: float = 0.003
    hidden: int = 30
    sequences: int = 8
    length: int = 256
    batch_size: int = 2
    seed: int | None = None

    def __post_init__(self) -> None:
        if min(self.epochs, self.rollouts, self.hidden) < 1 or not self.rate > 0:
            raise ValueError("epochs, rollouts and hidden are at least 1, and rate is above 0")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step per layer, in depth order; each says the whole student's reward and metric."""
        from lamina.planners._evolve import Drops
        from lamina.planners._target import Target, required

        bench = required(bench, self.card.name)
        target = Target(budget, anatomy)
        if target.met(()):
            return ()
        seed = bench.lab.seed if self.seed is None else self.seed
        space, draw = Drops(target, self.kinds), Random(seed)
        space.firsts(1, draw)
        judge = bench.judge(self.metric, sequences=self.sequences, length=self.length, batch_size=self.batch_size)
        policy = Policy(features(anatomy, space.units), self.hidden, self.rate, seed)
        whole, found = anatomy.total().parameters, dict[Any, float]()

        def student(order: Sequence[int]) -> float:
            genome = space.trimmed(space.filled(order), order[::-1])
            gone = space.sites(genome)
            size = 1 - anatomy.freed(gone).parameters / whole
            value = reward(math.exp(-judge.value(gone)), 1 - size) if space.met(genome) else -1.0
            found[genome] = value
            return value

        for epoch in range(self.epochs):
            policy.learn(lambda: self._rollout(policy, space, draw), student, self.rollouts)
            best = max(found, key=lambda g: (found[g], g))
            judge.rebase(space.sites(best))
            bench.note()
            bench.lab.progress("plan", epoch + 1, self.epochs)
        if found[best] < 0:
            raise target.refuse(target.amount(space.sites(best)))
        return space.steps(best, {"reward": found[best], self.metric: judge.value(space.sites(best))})

    @staticmethod
    def _rollout(policy: Policy, space: Drops, draw: Random) -> tuple[list[int], Tensor]:
        """Layers in the order of drawing, until the budget is met or none may go; and the order's log-probability."""

        def may(order: Sequence[int]) -> list[int]:
            genome = space.filled(order)
            left = [p for p, level in enumerate(genome) if not level]
            return [] if space.met(genome) else [p for p in left if space.allowed(_raised(genome, p))]

        return policy.drawn(may, draw)


def _raised(genome: Genome, place: int) -> Genome:
    return (*genome[:place], 1, *genome[place + 1 :])


def reward(accuracy: float, compression: float) -> float:
    """R = accuracy · C(2 - C): `accuracy` relative to the teacher's, C the share of parameters that is gone."""
    return accuracy * compression * (2 - compression)


def features(anatomy: Anatomy, units: Sequence[str]) -> list[list[float]]:
    """Of each layer: which kind it is, its place from 0 to 1, and its shares of parameters, MACs and KV bytes."""
    kinds = sorted({anatomy.site(u).kind.value for u in units})
    costs = [anatomy.cost(u) for u in units]
    names = ("parameters", "macs", "kv_bytes")
    most = {n: max((getattr(c, n) for c in costs), default=0) or 1 for n in names}
    return [
        [
            *(float(anatomy.site(u).kind.value == k) for k in kinds),
            place / max(len(units) - 1, 1),
            *(getattr(cost, n) / most[n] for n in names),
        ]
        for place, (u, cost) in enumerate(zip(units, costs, strict=True))
    ]


class Policy:
    """A bidirectional LSTM over layers that gives each its odds of going; `inputs` [layers, features]."""

    def __init__(self, inputs: Sequence[Sequence[float]], hidden: int, rate: float, seed: int) -> None:
        import torch
        from torch import nn

        self.inputs = torch.tensor(inputs, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reads: Any = nn.LSTM(self.inputs.shape[1], hidden, num_layers=2, bidirectional=True)
            self.says: Any = nn.Linear(2 * hidden, 2)
        self.adam = torch.optim.Adam([*self.reads.parameters(), *self.says.parameters()], lr=rate)
        self.rewards: list[float] = []

    def odds(self) -> Tensor:
        """log(p(remove) / p(keep)) of each layer, [layers], with a graph."""
        keep, remove = self.says(self.reads(self.inputs)[0]).unbind(-1)
        return remove - keep

    def drawn(self, may: Callable[[Sequence[int]], Sequence[int]], draw: Random) -> tuple[list[int], Tensor]:
        """Layers drawn by their odds among those that `may` go, until there are none; and the log-probability."""
        import torch

        with torch.enable_grad():
            odds = self.odds()
            order, said = list[int](), odds.new_zeros(())
            while left := may(order):
                logs = torch.log_softmax(odds[list(left)], 0)
                place = draw.choices(range(len(left)), logs.detach().exp().tolist())[0]
                order.append(left[place])
                said = said + logs[place]
        return order, said

    def learn(
        self, rollout: Callable[[], tuple[Sequence[int], Tensor]], value: Callable[[Sequence[int]], float], count: int
    ) -> None:
        """One step up the gradient of the mean of (R - b) · log p over rollouts; b: the mean of all rewards before."""
        import torch

        drawn = [rollout() for _ in range(count)]
        rewards = [value(order) for order, _ in drawn]
        before = self.rewards or rewards
        base = sum(before) / len(before)
        self.rewards += rewards
        with torch.enable_grad():
            loss = -torch.stack([(r - base) * said for r, (_, said) in zip(rewards, drawn, strict=True)]).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()


recipe(
    "n2n",
    PAPER,
    summary="N2N: a recurrent policy learns by trial which blocks to remove.",
    measure="",
    planner="n2n",
    kinds=(Kind.BLOCK,),
    deviations=DEVIATIONS,
)
