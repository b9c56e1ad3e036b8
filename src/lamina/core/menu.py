"""Menus: everything that can be done to a model, priced in damage and in resources; a plan is a choice from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lamina.core.documents import FORMAT, Document, Step


@dataclass(frozen=True, kw_only=True)
class Option(Document):
    """One thing that can be done: its steps, what it frees of each resource, and what it should cost in nats.

    `groups` are the places that it takes: no place is taken by two options of a plan.
    """

    name: str
    groups: tuple[str, ...]
    steps: tuple[Step, ...]
    damage: float = field(metadata={"always": True})
    saves: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The rewrites that it uses."""
        return tuple(dict.fromkeys(s.rewrite for s in self.steps))


@dataclass(frozen=True, kw_only=True)
class Menu(Document):
    """`menu.json`: every option of a model, priced on a text. `of` is the fingerprint of what it was made from.

    `whole` is what the dense model takes of each resource; `passes` forwards over `tokens` tokens were spent.
    """

    lamina: int = field(default=FORMAT, metadata={"always": True})
    of: str = ""
    whole: Mapping[str, float] = field(default_factory=dict[str, float])
    options: tuple[Option, ...] = field(default=(), metadata={"always": True})
    passes: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Times(Document):
    """`latency-decode-1x512.json`: seconds of one work (decode: per token; prefill: per pass), medians over rounds.

    `total`: of the whole dense model; `sites`: of each sublayer in it; `left`: a change, by the shape of what it
    changes → the share of the sublayer's time that it leaves. `of` as of the menu.
    """

    lamina: int = field(default=FORMAT, metadata={"always": True})
    of: str = ""
    work: str = ""
    total: float = field(default=0.0, metadata={"always": True})
    sites: Mapping[str, float] = field(default_factory=dict[str, float])
    left: Mapping[str, float] = field(default_factory=dict[str, float])

    @staticmethod
    def name(resource: str) -> str:
        """The file of a resource `latency@decode:1x512`."""
        return resource.replace("@", "-").replace(":", "-") + ".json"


@dataclass(frozen=True, kw_only=True)
class Solved(Document):
    """`solved.json`: what a planner took from a menu. `of` as of the menu.

    `taken`: (place, option's name); `needs`: what had to go of each resource; `factors`: rewrite → what its prices
    were multiplied by, once plans with it were tried; `level`: what the plan's true rise was to the sum of these;
    `rises`: the true rise of the loss of each round's plan, in nats.
    """

    lamina: int = field(default=FORMAT, metadata={"always": True})
    of: str = ""
    needs: Mapping[str, float] = field(default_factory=dict[str, float])
    taken: tuple[tuple[str, str], ...] = field(default=(), metadata={"always": True})
    factors: Mapping[str, float] = field(default_factory=dict[str, float])
    level: float = 1.0
    rises: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Point:
    """One plan of a frontier: what it frees of the resource, what it should cost, and how much of which rewrite."""

    freed: float
    damage: float
    uses: Mapping[str, int]
    knee: bool = False


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Plans that free ever more of a resource, of which the dense model takes `whole`; none is dominated."""

    resource: str
    whole: float
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why an option was taken: without it the cheapest plan costs `more` nats, and does `second` there instead.

    `more` is infinite where no plan within the budget does without it.
    """

    option: Option
    damage: float
    more: float
    second: str


def repriced(options: Sequence[Option], factors: Mapping[str, float]) -> list[float]:
    """Prices with those of each rewrite multiplied; of an option that uses several, step by step."""
    prices = list[float]()
    for option in options:
        told = [s.why.get("damage", 0.0) for s in option.steps]
        shares = told if sum(told) else [1.0] * len(told)
        parts = [w * factors.get(s.rewrite, 1.0) for s, w in zip(option.steps, shares, strict=True)]
        prices.append(option.damage * (sum(parts) / sum(shares) if shares else 1.0))
    return prices
