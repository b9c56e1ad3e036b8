"""D-Rank: groups of maps whose whitened spectra are flatter get more of the ranks, and values some of the queries'."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import planner, recipe
from lamina.core.sites import Kind
from lamina.planners._ranks import FACTORS, FAILS, Asked, asked

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.anatomy.makers import Makers
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Scores
    from lamina.lab.bench import Bench
    from lamina.lab.moments import InputMoments

PAPER = Paper(
    key="mi2025drank",
    title="Layer-wise dynamic rank for compressing large language models",
    authors=("Zhendong Mi", "Bian Sun", "Grace Li Zhang", "Shaoyi Huang"),
    year=2025,
    arxiv="2509.25622",
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Maps that share a basis, or one map.

    `spread` is the effective rank of their whitened weights, `unit` what one rank takes in the budget's unit, `whole`
    what the maps take as they are, `count` how many they are.
    """

    sites: tuple[str, ...]
    spread: float
    unit: int
    whole: int
    count: int = 1

    @property
    def most(self) -> int:
        """The largest rank that takes less than the maps as they are."""
        return -(-self.whole // self.unit) - 1


@planner(
    "d-rank",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    deviations=(
        "a group whose share would buy it whole stays whole, and the others share what that leaves; the paper caps "
        "ranks at full rank, which takes more than the map did",
        "what rounding leaves goes to the group whose R/k falls most for it; the code goes by R/ω",
        "moved ranks are counted in parameters, as in the code's variant for grouped queries; elsewhere it is the same",
        "the inputs that cut maps give those behind them are not taken into account",
    ),
)
@dataclass(frozen=True, kw_only=True)
class DRank:
    """Ranks that make Σ R/k least for each kind of map, R the effective rank of a group's whitened weights.

    Maps with the same name in `size` neighbouring blocks make a group (0: two, or one where queries share keys), which
    then shares a basis. All kinds of maps give up the same share of what they take. Of groups that cost ω per rank,
    k goes with √(R/ω). Then queries and keys hand the share `beta` of their ranks to the values, where the three are
    maps of their own. The budget's parameters or bytes are all taken from maps that are not protected; one pass.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(FAILS, FACTORS)

    size: int = 0
    beta: float = 0.3

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size is at least 0, not {self.size}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta is at least 0 and below 1, not {self.beta:g}")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step over all maps that get a rank. Raises InputError where rank one everywhere is not enough."""
        from lamina.anatomy.neighbours import parts
        from lamina.lab.moments import input_moments
        from lamina.planners._target import required

        lab = required(bench, self.card.name).lab
        wanted = asked(budget, anatomy)
        if wanted is None:
            return ()
        heads = _attentions(anatomy)
        size = self.size or (1 if any(h.group > 1 for h in heads.values()) else 2)
        kinds = _kinds(wanted, anatomy, input_moments(lab, wanted.shapes), size)
        budgets = _budgets(wanted, kinds)
        ranks = {kind: shared_out(held, budgets[kind]) for kind, held in kinds.items()}
        for made in heads.values():
            names = [part for m in (made.query, made.key, made.value) for part in parts(anatomy, [m]).values()]
            if made.apart and all(n in kinds for n in names):
                moved = rebalanced([kinds[n] for n in names], [ranks[n] for n in names], self.beta)
                ranks |= dict(zip(names, moved, strict=True))
        found = {
            site: rank
            for kind, held in kinds.items()
            for group, rank in zip(held, ranks[kind], strict=True)
            for site in group.sites
            if rank
        }
        told = {s: found[s] for s in wanted.shapes if s in found}
        rewrite, options = ("svd-llm", {}) if size == 1 else ("basis-sharing", {"size": size})
        return (wanted.step(rewrite, told, {"groups": float(sum(map(len, kinds.values())))}, **options),)


def _kinds(wanted: Asked, anatomy: Anatomy, seen: InputMoments, size: int) -> dict[str, list[Group]]:
    """Part of a block → its groups, in depth order."""
    import torch

    from lamina.anatomy.neighbours import groups, parts
    from lamina.maths.spectra import effective_rank
    from lamina.maths.whitening import whitened_energies

    part = parts(anatomy, wanted.shapes)
    kinds: dict[str, list[Group]] = {}
    for sites in groups(anatomy, wanted.shapes, size):
        (outputs, inputs), each, count = wanted.shapes[sites[0]], wanted.each[sites[0]], len(sites)
        weight = torch.cat([anatomy.weight(s).detach() for s in sites])
        energies = whitened_energies(weight, torch.stack([seen.of(s)[0] for s in sites]).sum(0))
        made = Group(
            sites=sites, spread=effective_rank(energies), count=count,
            unit=each * (inputs + count * outputs), whole=each * count * outputs * inputs,
        )  # fmt: skip
        kinds.setdefault(part[sites[0]], []).append(made)
    return kinds


def _budgets(wanted: Asked, kinds: Mapping[str, Sequence[Group]]) -> dict[str, float]:
    """What each kind of map may take: the same share of what it takes, or where that is too little, rank one each."""
    whole = {k: sum(g.whole for g in held) for k, held in kinds.items()}
    least = {k: sum(g.unit for g in held) for k, held in kinds.items()}
    left = wanted.whole - wanted.need
    if sum(least.values()) > left:
        raise wanted.target.refuse(wanted.whole - sum(least.values()))
    bare: set[str] = set()
    while True:
        share = (left - sum(least[k] for k in bare)) / max(sum(whole[k] for k in whole if k not in bare), 1)
        short = {k for k in whole if k not in bare and least[k] > share * whole[k]}
        if not short:
            return {k: least[k] if k in bare else share * whole[k] for k in whole}
        bare |= short


def shared_out(groups: Sequence[Group], budget: float) -> list[int]:
    """A rank for each group so that Σ R/k is least and Σ k ω at most `budget`; 0 for a group that stays whole.

    k = λ √(R/ω), at least 1, with the one λ that spends the budget; a group whose k ω reaches what it takes as it is
    stays so. Then k is rounded down, and what is left goes rank by rank to where R/k falls most per cost.
    """

    def cost(scale: float) -> float:
        return sum(min(g.whole, max(g.unit, scale * math.sqrt(g.spread * g.unit))) for g in groups)

    low, high = 0.0, 1.0
    while cost(high) < min(budget, sum(g.whole for g in groups if g.spread > 0)) and high < 1e300:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    exact = [max(1.0, low * math.sqrt(g.spread / g.unit)) for g in groups]
    ranks = [0 if k * g.unit >= g.whole else int(k + 1e-9) for k, g in zip(exact, groups, strict=True)]
    left = budget - sum(g.unit * k if k else g.whole for k, g in zip(ranks, groups, strict=True))
    while True:
        open_ = [i for i, (k, g) in enumerate(zip(ranks, groups, strict=True)) if 0 < k < g.most and g.unit <= left]
        if not open_:
            return ranks
        best = max(open_, key=lambda i: groups[i].spread / (ranks[i] * (ranks[i] + 1) * groups[i].unit))
        ranks[best] += 1
        left -= groups[best].unit


def rebalanced(
    groups: Sequence[Sequence[Group]], ranks: Sequence[Sequence[int]], beta: float
) -> tuple[list[int], list[int], list[int]]:
    """Ranks of queries, keys and values once the first two have given the share `beta` of theirs to the third.

    What is given is shared among the values' groups by how many maps they hold, and counts by what it takes. Of a group
    of values that would take as much as its maps do, the maps stay whole (0); what is too much goes back. Groups
    that are whole neither give nor get.
    """
    q, k, v = (list(r) for r in ranks)
    givers: list[tuple[list[int], int, Group]] = []
    pool = 0.0
    for held, own in ((q, groups[0]), (k, groups[1])):
        for place, group in enumerate(own):
            given = min(round(beta * held[place]), max(held[place] - 1, 0))
            held[place] -= given
            pool += given * group.unit
            givers += [(held, place, group)] * given
    takers = [i for i, rank in enumerate(v) if rank]
    count, carried = sum(groups[2][i].count for i in takers), 0.0
    for place in takers:
        group = groups[2][place]
        have = carried + pool * group.count / count
        more = min(int(have / group.unit + 1e-9), group.most - v[place])
        fills = v[place] * group.unit + have >= group.whole
        carried = have - (group.whole - v[place] * group.unit if fills else more * group.unit)
        v[place] = 0 if fills else v[place] + more
    left = carried if takers else pool
    for held, place, group in givers:
        if group.unit <= left + 1e-9:
            held[place] += 1
            left -= group.unit
    return q, k, v


def _attentions(anatomy: Anatomy) -> dict[str, Makers]:
    """Stack → the maps of its first attention whose maps can be told."""
    from lamina.anatomy.makers import makers

    found: dict[str, Makers] = {}
    for stack in anatomy.stacks:
        sites = (x.site for b in stack.blocks for x in b.branches if x.site.kind is Kind.ATTENTION)
        first = next((m for s in sites if (m := makers(anatomy, s))), None)
        found |= {stack.name: first} if first else {}
    return found


recipe(
    "d-rank",
    PAPER,
    summary="Ranks by the effective rank of whitened weights; maps as factors, neighbours with a basis in common.",
    measure="",
    planner="d-rank",
    rewrite="basis-sharing",
    deviations=("see the planner d-rank",),
)
