"""Sparsify linear maps: weights are set to zero, the structure stays."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lamina.core.documents import Receipt, Step
from lamina.core.errors import UnsupportedError, did_you_mean
from lamina.core.papers import Card
from lamina.core.registry import rewrite
from lamina.core.scores import Scores
from lamina.core.sites import Kind
from lamina.rewrites._maps import linear_problems, number_for, shape_of
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Stack
    from lamina.core.sites import Cost, Site
    from lamina.lab import Lab
    from lamina.lab.moments import InputMoments
    from lamina.lab.taps import Taps
    from lamina.lab.walk import Walk

AMOUNTS = ("sparsity", "pattern")
"""The options that say how much is to be zero: one of them in each step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """A linear map as a method sees it.

    `weight` [outputs, inputs] float64 is the method's own copy. `share` of it shall be zero; where `group` is not 0,
    `zeros` of every `group` consecutive inputs. A method that looks at inputs gets `second`, float64: Σ x xᵀ
    [inputs, inputs] or Σ x² [inputs] over `tokens` inputs. `seed` is the lab's.
    """

    site: str
    weight: Tensor
    share: float
    zeros: int = 0
    group: int = 0
    second: Tensor | None = None
    tokens: int = 0
    seed: int = 0

    def lowest(self, scores: Tensor, *, rows: bool) -> Tensor:
        """Which weights go [outputs, inputs], bool: the lowest scores of each group, of each row, or of the whole map.

        Of n weights int(n · share) go, ties in order.
        """
        if self.group:
            return lowest(scores.unflatten(1, (-1, self.group)), self.zeros).flatten(1)
        parts = scores if rows else scores.reshape(1, -1)
        return lowest(parts, int(parts.shape[1] * self.share)).reshape(scores.shape)


def lowest(scores: Tensor, count: int) -> Tensor:
    """A mask, bool, of the `count` lowest scores along the last dimension [..., n]; of equal ones the first."""
    import torch

    if count < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    edge = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, level = scores < edge, scores == edge
    return below | (level & (level.cumsum(-1) <= count - below.sum(-1, keepdim=True)))


@dataclass(frozen=True, kw_only=True)
class Sparsify(ABC):
    """Set weights of linear maps to zero, in place.

    A step tells either `sparsity`, a number between 0 and 1, or `pattern`, "N:M": N zeros of every M consecutive
    inputs. Either is one for all sites, or a mapping with one for each. A step may tell the method's own options too.
    The zeros are stored like other weights: no parameter, byte or multiply-add is saved, and no tool is faster by them,
    until a sparse format or kernel makes use of them. The receipt's option `zeros` says of each site which share of
    its weights is zero.
    """

    card: ClassVar[Card]
    each: ClassVar[tuple[str, ...]] = AMOUNTS
    stage: ClassVar[int] = 1

    @abstractmethod
    def sparse(self, given: Given) -> Tensor:
        """The map's weights [outputs, inputs] with zeros among them."""

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        told = [name for name in AMOUNTS if name in step.options]
        problems = linear_problems(step, anatomy, *told)
        if len(told) != 1:
            what = "sparsity and pattern exclude each other" if told else "the step tells neither sparsity nor pattern"
            problems.append(Problem(step.rewrite, what, 'options: {sparsity: 0.5}, or {pattern: "2:4"}'))
        return [*problems, *self._option_problems(step)] or _amount_problems(step, anatomy)

    def _option_problems(self, step: Step) -> list[Problem]:
        """Options that the method does not have or can't take, and sites that are named twice or for nothing."""
        known = [*AMOUNTS, *(f.name for f in dataclasses.fields(self))]
        unknown = [name for name in step.options if name not in known]
        problems = [Problem(step.rewrite, f"no option {name!r}", did_you_mean(name, known)) for name in unknown]
        try:
            self.told(step)
        except (TypeError, ValueError) as error:
            problems.append(Problem(step.rewrite, str(error)))
        problems += [Problem(s, "the step names it twice") for s, n in Counter(step.sites).items() if n > 1]
        for name in AMOUNTS:
            given = step.options.get(name)
            others = [s for s in given if s not in step.sites] if isinstance(given, Mapping) else []
            problems += [Problem(str(s), f"is told a {name} and is no site of the step") for s in others]
        return problems

    def told(self, step: Step) -> Self:
        """The method with the options that the step tells. Raises ValueError for those that make no sense."""
        given = {f.name: step.options[f.name] for f in dataclasses.fields(self) if f.name in step.options}
        for name, value in given.items():
            if isinstance(getattr(self, name), bool) and not isinstance(value, bool):
                raise ValueError(f"{name} is true or false, not {value!r}")
        return dataclasses.replace(self, **given)

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """The same as before: zeros are stored and multiplied. Raises InputError for a map that the model lacks."""
        for site in step.sites:
            shape_of(anatomy, site)
        return anatomy.total()

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Write the weights in place. Raises UnsupportedError for the first problem that `check` names."""
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        method = self.told(step)
        method.prune(step, lab)
        own = {f.name: v for f in dataclasses.fields(method) if (v := getattr(method, f.name)) != f.default}
        zeros = {s: float((lab.anatomy.weight(s) == 0).double().mean()) for s in step.sites}
        total = lab.anatomy.total()
        return Receipt(
            rewrite=self.card.name, sites=step.sites, before=total, after=total,
            options={**own, **step.options, "zeros": zeros},
        )  # fmt: skip

    def prune(self, step: Step, lab: Lab) -> None:
        """All maps, one after the other."""
        self.write(step, lab, step.sites)

    def write(self, step: Step, lab: Lab, sites: Iterable[str], seen: InputMoments | InputPowers | None = None) -> None:
        """Prune these maps; `seen` is what entered them."""
        import torch

        for site in sites:
            share, zeros, group = amount(step, site)
            second, *_, tokens = seen.of(site) if seen is not None else (None, 0)
            weight = lab.anatomy.weight(site)
            given = Given(
                site=site, weight=weight.detach().to(torch.float64, copy=True), share=share, zeros=zeros, group=group,
                second=second, tokens=tokens, seed=lab.seed,
            )  # fmt: skip
            with torch.no_grad():
                weight.copy_(self.sparse(given))
            lab.progress(self.card.name, step.sites.index(site) + 1, len(step.sites))

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:  # noqa: B027
        """Nothing to rebuild: the structure is the same, the numbers come with the weights."""

    @staticmethod
    def remarks(receipt: Receipt) -> Iterator[str]:
        """What the costs do not tell."""
        zeros = receipt.options.get("zeros", {})
        share = sum(zeros.values()) / len(zeros) if zeros else 0.0
        yield (
            f"{receipt.rewrite}: in {len(receipt.sites)} maps {share:.0%} of the weights are zero on average, and are "
            "stored and multiplied like others: masks are not a speed-up"
        )


@rewrite("magnitude", on=Kind.LINEAR, status="stable")
@dataclass(frozen=True, kw_only=True)
class Magnitude(Sparsify):
    """Set the smallest weights to zero: of the whole map, or of each output where `rows`.

    Reads no text. Zeros are stored like other weights: nothing is smaller or faster by them alone.
    """

    card: ClassVar[Card]

    rows: bool = False

    def sparse(self, given: Given) -> Tensor:
        """The weights without the smallest."""
        return given.weight.masked_fill(given.lowest(given.weight.abs(), rows=self.rows), 0.0)

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries."""
        return examples("magnitude", anatomy, {}, {"rows": True}, {})


@dataclass(frozen=True, kw_only=True)
class Informed(Sparsify):
    """A method that looks at what enters the maps.

    `in_turn` False: all inputs are those of the dense network, seen in one forward over the lab's text, which costs one
    pass and memory for the sums of all maps at once. True: block by block, a block's inputs are those of the network
    with the blocks before it pruned, the maps inside a block not yet; each block is run twice, but for the last one and
    those without maps of the step: at most two passes. The sums of one block and the text's stream are held.
    """

    powers: ClassVar[bool] = False
    """Whether the sums are Σ x² alone and not Σ x xᵀ."""

    in_turn: bool = False

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        problems = super().check(step, anatomy)
        if not problems and self.told(step).in_turn:
            stuck = [k for k in anatomy.stacks if _last(anatomy, k, step.sites) is not None and not _walkable(k)]
            what, hint = "its blocks can't be run one by one", "in_turn=False takes the inputs of the dense network"
            problems += [Problem(k.path, what, hint) for k in stuck]
        return problems

    def tally(self, sites: Iterable[str]) -> InputMoments | InputPowers:
        """Empty sums for these maps."""
        from lamina.lab.moments import InputMoments

        return InputPowers(sites) if self.powers else InputMoments(sites)

    def prune(self, step: Step, lab: Lab) -> None:
        """All maps by the dense network's inputs, or block by block."""
        if self.in_turn:
            for place, stack in enumerate(lab.anatomy.stacks):
                last = _last(lab.anatomy, stack, step.sites)
                if last is not None:
                    self._walk(step, lab, place, last)
            return
        seen = self.tally(step.sites)
        lab.stream([seen], "inputs", score=False)
        self.write(step, lab, step.sites, seen)

    def _walk(self, step: Step, lab: Lab, place: int, last: int) -> None:
        """One stack up to its block number `last`."""
        from lamina.lab.feed import feeding

        walks = [(rows, _alone(lab, rows.batch, place)) for rows in lab.rows()]
        for number, block in enumerate(lab.anatomy.stacks[place].blocks[: last + 1]):
            maps = [s.id for s in lab.anatomy.linears(block.site) if s.id in step.sites]
            if maps:
                seen = self.tally(maps)
                for rows, walk in walks:
                    with feeding(lab.anatomy, rows, [seen], only=block):
                        walk.look(block.branches[0])
                self.write(step, lab, maps, seen)
            for _, walk in walks if number < last else ():
                walk.step()


class InputPowers:
    """Of each map Σ x² [inputs], float64, and the number of tokens."""

    wants: ClassVar[frozenset[str]] = frozenset({"linears"})

    def __init__(self, sites: Iterable[str]) -> None:
        self.sites = frozenset(sites)
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one map on one batch."""
        if site.id in self.sites:
            self.sums[site.id] = self.sums.get(site.id, 0) + taps.entering.double().square().sum(0)
            self.tokens[site.id] = self.tokens.get(site.id, 0) + len(taps.entering)

    def merge(self, other: Self) -> Self:
        """The sums of both parts."""
        both = type(self)(self.sites | other.sites)
        for part in (self, other):
            for site, sums in part.sums.items():
                both.sums[site] = both.sums.get(site, 0) + sums
                both.tokens[site] = both.tokens.get(site, 0) + part.tokens[site]
        return both

    def of(self, site: str) -> tuple[Tensor, int]:
        """Σ x² and the number of tokens. Raises UnsupportedError where the input was not seen."""
        if site not in self.sums:
            raise UnsupportedError("no forward showed its input", where=site)
        return self.sums[site], self.tokens[site]

    def scores(self) -> Scores:
        """A tally's table; these sums score nothing."""
        return Scores.none("input-powers", "sums for rewrites, no scores")


def _alone(lab: Lab, batch: Any, place: int) -> Walk:
    """A walk of one batch through one stack, that counts as the lab's own."""
    from lamina.lab.walk import Walk

    part = lab.on([batch])
    part.counts = lab.counts
    return Walk(part, stack=place)


def _last(anatomy: Anatomy, stack: Stack, sites: Iterable[str]) -> int | None:
    """The number of a stack's last block with any of these maps."""
    wanted = frozenset(sites)
    having = [n for n, b in enumerate(stack.blocks) if any(s.id in wanted for s in anatomy.linears(b.site))]
    return max(having, default=None)


def _walkable(stack: Stack) -> bool:
    """Whether a block takes nothing from the one before but the stream."""
    alone = not stack.looped and stack.linked and not stack.carries
    return alone and not any(b.bound or b.tells for b in stack.blocks)


def amount(step: Step, site: str) -> tuple[float, int, int]:
    """What a step asks for at a site: share of zeros, and N and M of a pattern, else 0. Raises ValueError."""
    if "pattern" in step.options:
        given = number_for(step, "pattern", site)
        found = re.fullmatch(r"(\d+):(\d+)", given) if isinstance(given, str) else None
        zeros, group = (int(n) for n in found.groups()) if found else (0, 0)
        if not 0 < zeros < group:
            raise ValueError(f'pattern {given!r} is no "N:M", N zeros of every M inputs, with 0 < N < M')
        return zeros / group, zeros, group
    given = number_for(step, "sparsity", site)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < 1:
        raise ValueError(f"sparsity {given!r} is no number between 0 and 1")
    return float(given), 0, 0


def _amount_problems(step: Step, anatomy: Anatomy) -> list[Problem]:
    """Amounts that are none, and patterns that do not fit a map."""
    problems = []
    for site in step.sites:
        try:
            _, _, group = amount(step, site)
        except ValueError as error:
            problems.append(Problem(site, str(error), 'options: {sparsity: 0.5}, or {pattern: "2:4"}'))
            continue
        inputs = shape_of(anatomy, site)[1]
        if group and inputs % group:
            problems.append(Problem(site, f"its {inputs} inputs are no multiple of {group}", "tell a sparsity"))
    return problems


def examples(name: str, anatomy: Anatomy, *more: Mapping[str, Any]) -> tuple[Step, ...]:
    """Steps of a rewrite that sparsifies: maps of one sublayer, of two with shares of their own, and a pattern.

    `more`: further options of each of the three.
    """
    more = more or ({}, {}, {})
    found = [[s.id for s in anatomy.linears(x)] for x in anatomy.sublayers]
    some = [maps for maps in found if maps][1:3]
    mixed = {s: 0.3 + 0.4 * n for n, s in enumerate(maps[-1] for maps in some)}
    return (
        Step(rewrite=name, sites=tuple(some[0]), options={"sparsity": 0.5, **more[0]}),
        Step(rewrite=name, sites=tuple(mixed), options={"sparsity": mixed, **more[1]}),
        Step(rewrite=name, sites=tuple(some[-1]), options={"pattern": "2:4", **more[2]}),
    )
