"""Minitron: neurons, heads and channels that are large stay, in widths that are the same in every block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.errors import InputError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import REWRITES, measure, planner, recipe
from lamina.core.sites import Kind
from lamina.maths.moments import Mean
from lamina.planners._widths import FAILS, NARROWS, Shape, even, expect_counted, sites_of, steps_of, uniform, widest

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.rows import Rows
    from lamina.planners._target import Target
    from lamina.planners._widths import Counts

PAPER = Paper(
    key="muralidharan2024compact",
    title="Compact Language Models via Pruning and Knowledge Distillation",
    authors=(
        "Saurav Muralidharan",
        "Sharath Turuvekere Sreenivas",
        "Raviraj Joshi",
        "Marcin Chochowski",
        "Mostofa Patwary",
        "Mohammad Shoeybi",
        "Bryan Catanzaro",
        "Jan Kautz",
        "Pavlo Molchanov",
    ),
    year=2024,
    arxiv="2407.14679",
)
INPUTS = (Kind.NEURON, Kind.HEAD, Kind.KV_GROUP)


@measure(
    "minitron",
    PAPER,
    on=(*INPUTS, Kind.CHANNEL),
    needs=Need.FORWARD,
    deviations=(
        "squares are averaged over sequences and not summed, which ranks alike and does not grow with the text",
        "padding does not count",
        "depth is scored by block-influence, a measure of its own",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Minitron:
    """Keep units whose activations are large: √ of the mean over sequences of (mean over tokens of |x|)².

    x of neurons and heads is what enters their sublayer's last map, a head's columns together as a vector's length; of
    a channel, what comes out of the blocks' norms, summed over norms.
    """

    card: ClassVar[Card]

    def measure(self, lab: Lab) -> Scores:
        """One forward over the text."""
        from lamina.core.scores import Scores

        sites = {s.id: s for s in lab.anatomy.of_kind(*INPUTS)}
        streams = {c: k for k in lab.anatomy.stacks if (c := lab.anatomy.channels(k)) is not None}
        norms = {c.id: lab.anatomy.stream(k).norms(k) for c, k in streams.items()}
        seen = _Seen({s.id: [list(c) for c in lab.anatomy.columns(s)] for s in sites.values()})
        for site in sites.values():
            seen.wanted.setdefault(lab.anatomy.tail(site), []).append(site.id)
        seen.norms = tuple(p for paths in norms.values() for p in paths)
        seen.run(lab)
        values = {s: np.sqrt(seen.means[s].value) for s in sites if s in seen.means}
        errors = {s: seen.means[s].stderr / (2 * np.maximum(v, 1e-300)) for s, v in values.items()}
        missing = {s: "its last map does not see every token" for s in sites if s not in seen.means}
        for name, paths in norms.items():
            found = [np.sqrt(seen.means[p].value) for p in paths if p in seen.means]
            values |= {name: np.sum(found, axis=0)} if found else {}
            missing |= {} if found else {name: "no norm of its blocks scales the stream"}
        return Scores(measure=self.card.name, values=values, stderr=errors, missing=missing)


class _Seen:
    """Means over sequences of squared sizes: of each site of units [units], and of each norm's path [channels]."""

    def __init__(self, columns: Mapping[str, Sequence[Sequence[int]]]) -> None:
        self.columns = columns
        self.wanted: dict[str, list[str]] = {}
        self.norms: tuple[str, ...] = ()
        self.means: dict[str, Mean] = {}

    def run(self, lab: Lab) -> None:
        """One forward over the text."""
        import torch

        for rows in lab.rows():
            with torch.no_grad(), self._hooked(lab, rows):
                lab.forward(rows.batch, head=False)
            lab.progress("sizes", rows.offset - lab.offset + rows.sequences, lab.sequences)

    @contextmanager
    def _hooked(self, lab: Lab, rows: Rows) -> Iterator[None]:
        handles = []
        for path in self.wanted:
            hook = lambda m, args, p=path: self._note(p, args[0], rows)  # noqa: E731
            handles.append(lab.model.get_submodule(path).register_forward_pre_hook(hook))
        for path in self.norms:
            hook = lambda m, args, out, p=path: self._note(p, out, rows)  # noqa: E731
            handles.append(lab.model.get_submodule(path).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, path: str, x: Tensor, rows: Rows) -> None:
        here = rows.on(x) if x.ndim > 2 else rows
        if x.shape[:-1].numel() != here.mask.numel():
            return
        squares = sizes(here.strip(x), here.sequence.to(x.device), here.sequences).square().cpu().numpy()
        ones = np.ones(len(squares))
        for site in self.wanted.get(path, ()):
            units = np.stack([squares[:, c].sum(1) for c in self.columns[site]], 1)
            self.means.setdefault(site, Mean()).add(units, ones)
        if path not in self.wanted:
            self.means.setdefault(path, Mean()).add(squares, ones)


def sizes(x: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Mean over each sequence's tokens of |x|, float64 [sequences, columns], of x [tokens, columns]."""
    import torch

    total = torch.zeros(sequences, x.shape[1], dtype=torch.float64, device=x.device)
    total.index_add_(0, sequence, x.abs().double())
    return total / torch.bincount(sequence, minlength=sequences).clamp_min(1).unsqueeze(1)


@planner(
    "minitron",
    PAPER,
    on=(*INPUTS, Kind.EXPERT, Kind.CHANNEL),
    needs=Need.FORWARD,
    deviations=(
        "what stays keeps its order and is not sorted by importance",
        "depth stays; without `trials` all kinds of units keep one share, and no architectures are compared",
        "architectures are compared by the loss on the lab's text and not by a benchmark's score; without training",
    ),
)
@dataclass(frozen=True, kw_only=True)
class MinitronPlan:
    """Units of highest score stay, as many in every block: one share for all `kinds`, the largest within the budget.

    What is left over then goes to the kinds in turn. With `trials` n > 1 that many architectures are tried: kinds but
    the first keep `shares` of their own, the first what the budget then allows, those of least spread first; the one of
    least loss wins. Widths of neurons and channels stay multiples of `multiple`, all that is split over `parallel`
    devices multiples of it.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys((*FAILS, "check_something_is_left"), NARROWS)

    kinds: tuple[Kind, ...] = (Kind.NEURON, Kind.HEAD, Kind.CHANNEL)
    multiple: int = 32
    parallel: int = 1
    trials: int = 1
    shares: tuple[float, ...] = (1.0, 0.875, 0.75, 0.625, 0.5)

    def __post_init__(self) -> None:
        Shape(multiple=self.multiple, parallel=self.parallel)
        if self.trials < 1:
            raise ValueError(f"trials is at least 1, not {self.trials}")
        if any(not 0 < s <= 1 for s in self.shares):
            raise ValueError(f"shares lie above 0 and up to 1, not {self.shares}")
        if {Kind.HEAD, Kind.KV_GROUP} <= set(self.kinds):
            raise ValueError("heads and KV groups can't go at once: name one of both")

    def plan(self, scores: Scores, budget: Budget, anatomy: Anatomy, bench: Bench | None = None) -> tuple[Step, ...]:
        """A narrow step for each kind; without scores of units they get this paper's own.

        Raises InputError for a budget that no such widths meet.
        """
        from lamina.planners._target import Target, required

        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        expect_counted(budget, self.card.name)
        if not any(s in scores for s in anatomy.of_kind(*self.kinds)):
            scores = Minitron().measure(required(bench, self.card.name).lab)
        sites = [s for s in sites_of(anatomy, self.kinds, target) if s in scores]
        if not sites:
            raise InputError("the model has no units that may go", hint="protect less, or name other kinds")
        if self.trials == 1:
            shape = Shape(multiple=self.multiple, parallel=self.parallel)
            groups = [[s for s in sites if s.kind is k] for k in self.kinds]
            return steps_of(anatomy, scores.values, even(anatomy, target, groups, shape))
        lab = required(bench, self.card.name).lab
        plans = [steps_of(anatomy, scores.values, counts) for counts in self._architectures(anatomy, sites, target)]
        return min(plans[: self.trials], key=lambda steps: loss_after(lab, steps))

    def _architectures(self, anatomy: Anatomy, sites: Sequence[Site], target: Target) -> list[Counts]:
        """Counts within the budget, those first whose kinds keep shares most alike. Raises InputError for none."""
        shape = Shape(multiple=self.multiple, parallel=self.parallel)
        kinds = [k for k in self.kinds if any(s.kind is k for s in sites)]
        mine = {k: [s for s in sites if s.kind is k] for k in kinds}
        found: list[tuple[float, Counts]] = []
        refusals: list[InputError] = []
        for shares in itertools.product(self.shares, repeat=len(kinds) - 1):
            fixed: dict[str, int] = {}
            for kind, share in zip(kinds[1:], shares, strict=True):
                fixed |= uniform(anatomy, mine[kind], shape, share)

            def make(share: float, fixed: Counts = fixed) -> Counts:
                return {**uniform(anatomy, mine[kinds[0]], shape, share), **fixed}

            try:
                counts = widest(anatomy, target, make)
            except InputError as error:
                refusals.append(error)
                continue
            kept = [sum(counts[s.id] for s in mine[k]) / sum(s.width for s in mine[k]) for k in kinds]
            if all(counts != known for _, known in found):
                found.append((max(kept) - min(kept), counts))
        if not found:
            raise refusals[0]
        return [counts for _, counts in sorted(found, key=lambda f: f[0])]


def loss_after(lab: Lab, steps: Sequence[Step]) -> float:
    """Mean loss on the lab's text of a copy of its model that the steps were done to."""
    import copy

    from lamina.lab import Lab

    other = Lab(copy.deepcopy(lab.model), lab.batches, seed=lab.seed)
    for step in steps:
        REWRITES.make(step.rewrite).apply(step, other)
    lab.counts.blocks += other.tokens * other.depth
    return other.loss()


recipe(
    "minitron",
    PAPER,
    summary="Neurons, heads and channels of small activations go, the same number in every block.",
    measure="minitron",
    planner="minitron",
    rewrite="narrow",
    status="experimental",
)
