"""Adaptive MLP Pruning: neurons matter as far as the entropy of the model's own predictions hangs on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, planner, recipe
from lamina.core.sites import Kind
from lamina.planners._widths import FAILS, NARROWS, Shape, best, expect_counted, sites_of, steps_of, taken

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.resume import Resumed
    from lamina.lab.taps import Taps
    from lamina.maths.moments import Mean

PAPER = Paper(
    key="shen2026adaptive",
    title="Adaptive MLP Pruning for Large Vision Transformers",
    authors=("Chengchao Shen",),
    year=2026,
    arxiv="2603.08100",
)


@measure(
    "entropy-taylor",
    PAPER,
    on=Kind.NEURON,
    needs=Need.GRADIENT,
    status="stable",
    deviations=(
        "the entropy is that of the distributions that the model gives; the paper makes its own, of an image's "
        "features against those of the other images in the batch",
        "a model that predicts tokens gives one at each position: their entropies are summed over a sequence, but for "
        "the last position's",
    ),
)
@dataclass(frozen=True, kw_only=True)
class EntropyTaylor:
    """How much the entropy H of the model's predictions would change, to first order, without a neuron.

    |Σ over tokens of a · ∂H/∂a|, averaged over sequences, in nats; a is the neuron's activation, as it enters the MLP's
    last map. `signed`: the sum without its size, as the paper's other score.
    """

    card: ClassVar[Card]

    signed: bool = False

    def tally(self, anatomy: Anatomy) -> EntropyTerms:
        """First-order terms of all neurons."""
        columns, missing = {}, {}
        for sublayer in anatomy.of_kind(Kind.MLP):
            site = next(iter(anatomy.units(sublayer, Kind.NEURON)), None)
            name = f"{sublayer.id}.{Kind.NEURON.value}"
            if site is None:
                missing[name] = anatomy.refused_units(sublayer).get(name, "its neurons were not found")
            else:
                columns[sublayer.id] = [c for run in anatomy.columns(site) for c in run]
        return EntropyTerms(self.card.name, self.signed, columns, missing)

    def measure(self, lab: Lab) -> Scores:
        """One forward and one backward over the text."""
        from lamina.lab.gradients import stream_gradients

        return stream_gradients(lab, [self.tally(lab.anatomy)])[0]


class EntropyTerms:
    """Means over sequences of |Σ a · ∂H/∂a|, [neurons] per MLP; `columns` are its neurons' of the last map's input."""

    wants = frozenset({"inner"})
    probes = ("entropy",)

    def __init__(self, measure: str, signed: bool, columns: dict[str, list[int]], missing: dict[str, str]) -> None:
        self.settings = (measure, signed, columns, missing)
        self.means: dict[str, Mean] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one MLP on one batch."""
        import torch

        from lamina.maths.moments import Mean

        _, signed, columns, _ = self.settings
        if site.id not in columns or taps.inner is None or taps.inner_gradient is None:
            return
        terms = taps.inner.float() * taps.inner_gradient[0].float()
        lengths = torch.bincount(taps.sequence, minlength=taps.sequences).tolist()
        sums = torch.stack([t.sum(0) for t in terms[:, columns[site.id]].split(lengths)]).double()
        found = (sums if signed else sums.abs()).cpu().numpy()
        self.means.setdefault(f"{site.id}.{Kind.NEURON.value}", Mean()).add(found, [1.0] * len(found))

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        from lamina.maths.moments import Mean

        both = type(self)(*self.settings)
        for key in {**self.means, **other.means}:
            both.means[key] = self.means.get(key, Mean()).merge(other.means.get(key, Mean()))
        return both

    def scores(self) -> Scores:
        """Values and standard errors so far, [neurons] per MLP."""
        from lamina.core.scores import Scores

        measure, _, _, missing = self.settings
        return Scores(
            measure=measure,
            values={k: m.value for k, m in self.means.items()},
            stderr={k: m.stderr for k, m in self.means.items()},
            missing=missing,
        )


@planner(
    "adaptive-mlp",
    PAPER,
    on=Kind.NEURON,
    needs=Need.ABLATION,
    deviations=(
        "the entropy is that of the distributions that the model gives, a mean over positions",
        "without a `threshold` the least one is looked for, by bisection over its logarithm, that meets the budget",
        "the lab's text serves for scores and for the search; without distillation afterwards",
    ),
)
@dataclass(frozen=True, kw_only=True)
class AdaptiveMlp:
    """From the last MLP to the first, as few neurons stay as the entropy of predictions allows.

    `rounds` of bisection per MLP: those of highest score stay, and the mean entropy may rise by `threshold` nats from
    what the MLP before left. Widths are multiples of `multiple` and `parallel`. Searches run on `sequences` of `length`
    tokens; blocks before the one that changes are not run again.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(FAILS, NARROWS)

    threshold: float | None = None
    rounds: int = 6
    multiple: int = 32
    parallel: int = 1
    sequences: int = 8
    length: int = 128
    searches: int = 6
    refit: float = 0.0

    def __post_init__(self) -> None:
        Shape(multiple=self.multiple, parallel=self.parallel)
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"threshold is above 0, not {self.threshold:g}")
        for name in ("rounds", "sequences", "length", "searches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")

    def plan(self, scores: Scores, budget: Budget, anatomy: Anatomy, bench: Bench | None = None) -> tuple[Step, ...]:
        """One narrow step. Raises InputError for a budget that neurons, or that threshold, can't meet."""
        from lamina.planners._target import Target, required

        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        expect_counted(budget, self.card.name)
        lab = required(bench, self.card.name).lab
        sites = sites_of(anatomy, (Kind.NEURON,), target)
        if sites and not all(s in scores for s in sites):
            scores = EntropyTaylor().measure(lab)
        whole = getattr(anatomy.total(), budget.metric)
        shape = Shape(multiple=self.multiple, parallel=self.parallel)
        least = {s.id: shape.count(anatomy, s, 0.0) for s in sites}
        if (most := whole - taken(anatomy, least, budget.metric)) < target.need:
            raise target.refuse(most)
        search = _Search(lab.part(self.sequences, self.length), sites, scores, shape, self.rounds)

        def freed(counts: Mapping[str, int]) -> int:
            return whole - taken(anatomy, counts, budget.metric)

        if self.threshold is not None:
            counts = search.counts(self.threshold)
            if freed(counts) < target.need:
                what = f"a rise of {self.threshold:g} nats per MLP frees {freed(counts):,} {budget.metric}, not enough"
                raise InputError(what, hint="a higher threshold, or none")
            return steps_of(anatomy, scores.values, counts, refit=self.refit)
        low, high, counts = LOG_LEAST, LOG_MOST, least
        for _ in range(self.searches):
            middle = (low + high) / 2
            found = search.counts(10**middle)
            if freed(found) >= target.need:
                high, counts = middle, found
            else:
                low = middle
        return steps_of(anatomy, scores.values, counts, refit=self.refit)


LOG_LEAST, LOG_MOST = -5.0, 1.0
"""Between which powers of ten thresholds are looked for, in nats."""


class _Search:
    """Bisections of all MLPs' widths, the last first; the model is as it was before and after each."""

    def __init__(self, lab: Lab, sites: Sequence[Site], scores: Scores, shape: Shape, rounds: int) -> None:
        from lamina.lab.resume import Resumed

        self.lab, self.sites, self.scores, self.shape, self.rounds = lab, sites, scores, shape, rounds
        self.runs = [Resumed(lab, rows) for rows in lab.rows()]
        self.dense = mean_entropy(self.runs, [r.out for r in self.runs])

    def counts(self, threshold: float) -> dict[str, int]:
        """How many neurons of each MLP stay."""
        import torch

        from lamina.lab.pricing import written

        anatomy = self.lab.anatomy
        kept = {s.id: s.width for s in self.sites}
        weights: dict[str, Tensor] = {}
        base = self.dense
        for site in reversed(self.sites):
            block, path = anatomy.block(site.id.rpartition(".")[0]).site.id, anatomy.tail(site)
            low, high, found = 0, site.width, None
            for _ in range(self.rounds):
                middle = self.shape.count(anatomy, site, (low + high) // 2 / site.width)
                if not low < middle < high:  # no legal width lies between
                    break
                tried = {**weights, path: self._without(site, middle)}
                with torch.no_grad(), written(self.lab.model, tried):
                    entropy = mean_entropy(self.runs, [r.forward(block) for r in self.runs])
                if entropy - base <= threshold:
                    high, found = middle, (middle, entropy, tried)
                else:
                    low = middle
            if found is not None:
                kept[site.id], base, weights = found
        return kept

    def _without(self, site: Site, count: int) -> Tensor:
        """The last map's weights [outputs, inputs] with zeros for all but the best neurons."""
        from lamina.anatomy.linears import matrix

        anatomy = self.lab.anatomy
        weight = matrix(anatomy.model.get_submodule(anatomy.tail(site))).detach().clone()
        stays = set(best(anatomy, site, self.scores.values[site.id], count))
        weight[:, [c for n, cs in enumerate(anatomy.columns(site)) if n not in stays for c in cs]] = 0
        return weight


def mean_entropy(runs: Sequence[Resumed], outputs: Sequence[Tensor]) -> float:
    """-Σ p log p of the model's distributions, a mean over positions that are no padding, in nats.

    Raises UnsupportedError where outputs are no distributions.
    """
    total, count = 0.0, 0
    for run, out in zip(runs, outputs, strict=True):
        if run.objective.name == "output":
            raise UnsupportedError("the model's outputs are no distributions, so they have no entropy")
        flat = out.unsqueeze(1) if out.ndim == 2 else out.flatten(1, -2)
        logs = run.rows.on(flat).strip(flat).double().log_softmax(-1)
        total -= float((logs.exp() * logs).sum())
        count += len(logs)
    return total / max(count, 1)


recipe(
    "adaptive-mlp",
    PAPER,
    summary="Each MLP keeps as few neurons as the entropy of the model's predictions allows, the last one first.",
    measure="entropy-taylor",
    planner="adaptive-mlp",
    rewrite="narrow",
)
