"""Adaptive MLP Pruning: neurons matter as far as the entropy of the model's own predictions hangs on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
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
        "no search for how many of each MLP's neurons stay",
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
