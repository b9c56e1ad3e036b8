"""Damage: the expected rise of the loss when a site goes, from one forward and two backwards.

Optimal Brain Damage expands the loss in what is taken away: a first-order term plus half the curvature along it. Here
all that a branch adds, f, is taken away, and both terms come from gradients along the stream: the first-order term is
-g·f, the curvature that of the Gauss-Newton matrix, F = ½ E[(z·f)²] with random probes z. A whole branch is no small
step, and F overstates it the more the larger it is: √F, weighted with the share of the stream that goes, ‖f‖/‖x‖,
follows the true rise. Its factor κ is fitted to a few true ablations of the model at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from lamina.core.papers import Need, Paper
from lamina.core.registry import measure, recipe
from lamina.core.scores import Array, Scores
from lamina.core.sites import SUBLAYERS, Kind, Site

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.papers import Card
    from lamina.lab import Lab, Taps
    from lamina.lab.lab import Batch
    from lamina.lab.trials import Trial

PAPER = Paper(
    key="lecun1990obd",
    title="Optimal Brain Damage",
    authors=("Yann LeCun", "John S. Denker", "Sara A. Solla"),
    year=1990,
    venue="Advances in Neural Information Processing Systems 2",
    url="https://papers.nips.cc/paper/250-optimal-brain-damage",
)

PROBES = {"loss": ("loss",), "fisher": ("loss", "fisher"), "both": ("loss", "fisher")}
KAPPA = {"loss": 1.7, "fisher": 2.0, "both": 1.85}
"""Of SmolLM2-135M, by the probes in use: where the model at hand can't be asked."""
FLOOR = 1e-4
"""The least score, in nats, which what adds nothing has: no branch is predicted to do harm."""
REMAINS = 0.1
"""The share of the second-order term that no first-order gain outweighs: what adds something is never free."""
TRIALS, EACH = 4, 2
"""κ is fitted on at most so many sequences, to so many true ablations on each."""
BOUNDS = 8.0
"""κ stays within this factor of its default."""


@dataclass(frozen=True)
class Parts:
    """Of each sequence: the first-order term `slope` and the saturated second-order term `bend` without κ, in nats
    summed over tokens, and the count of predicted tokens; all float64 [sequences]. `owner` has the sequences' keys.
    """  # fmt: skip

    slope: Array = field(default_factory=lambda: np.zeros(0))
    bend: Array = field(default_factory=lambda: np.zeros(0))
    count: Array = field(default_factory=lambda: np.zeros(0))
    owner: Any = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    def __add__(self, other: Parts) -> Parts:
        parts = (*zip(self.rows, other.rows, strict=True), (self.owner, other.owner))
        return Parts(*(np.concatenate(p) for p in parts))

    def of(self, key: np.uint64) -> tuple[float, float, float]:
        """The three numbers of the sequence with this key."""
        place = int(np.flatnonzero(self.owner == key)[0])
        return float(self.slope[place]), float(self.bend[place]), float(self.count[place])

    @property
    def rows(self) -> tuple[Array, Array, Array]:
        """The three arrays."""
        return self.slope, self.bend, self.count

    def rise(self, kappa: float) -> Array:
        """Predicted rise of the loss, summed over each sequence's tokens."""
        return self.slope + kappa * self.bend


class DamageTally:
    """Slope and bend of every site and sequence; curvature from `probes`, in chunks of positions inside windows."""

    def __init__(self, measure: str, probes: str, chunk: int, window: int, kappa: float) -> None:
        self.settings = (measure, probes, chunk, window, kappa)
        self.probes = PROBES[probes]
        self.parts: dict[str, Parts] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one site on one batch."""
        assert taps.gradient is not None
        _, probes, chunk, window, _ = self.settings
        along = (taps.gradient.float() * taps.f).sum(-1).double()
        from lamina.lab.bends import bends

        numbers = bends(taps, -along[0], along[1:] if probes == "fisher" else along, chunk, window)
        found = Parts(*numbers, taps.rows.owners)
        self.parts[site.id] = self.parts.get(site.id, Parts()) + found

    def merge(self, other: Self) -> Self:
        """The tally of both parts."""
        both = type(self)(*self.settings)
        for key in {**self.parts, **other.parts}:
            both.parts[key] = self.parts.get(key, Parts()) + other.parts.get(key, Parts())
        return both

    def scores(self) -> Scores:
        """Predicted damage in nats per predicted token, [1] per site; errors over sequences take κ as known."""
        from lamina.maths.moments import Mean

        name, *_, kappa = self.settings
        values, errors = {}, {}
        for site, parts in self.parts.items():
            mean = Mean()
            mean.add(parts.rise(kappa), parts.count)
            least = FLOOR + REMAINS * kappa * parts.bend.sum() / max(parts.count.sum(), 1.0)
            values[site] = np.maximum(np.atleast_1d(mean.value), least)
            errors[site] = np.atleast_1d(mean.stderr)
        return Scores(measure=name, values=values, stderr=errors, unit="nats")

    def at(self, kappa: float) -> DamageTally:
        """The same sums under another κ."""
        other = DamageTally(*self.settings[:-1], kappa)
        other.parts = self.parts
        return other


@measure(
    "damage",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.GRADIENT,
    status="stable",
    deviations=(
        "what is taken away is all that a branch adds, at every position, not a weight",
        "the first-order term is kept: on the text at hand it is not zero",
        "the curvature is the Gauss-Newton matrix's, from one random probe (Martens, 2020) and, unless probes=fisher, "
        "from the gradient of the loss itself, not the Hessian's diagonal",
        "lamina's own: its square root, weighted with |f|/|x|, stands for the second-order term, since a branch is no "
        "small step; so do chunks and windows of positions and the factor kappa",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Damage:
    """Keep what the loss would rise without: -g·f + κ‖f‖/‖x‖·√F, from one forward and two backwards, in nats.

    `probes`: whose gradients make F: "loss" (the text's own, one backward fewer), "fisher" (random, unbiased for the
    Gauss-Newton matrix) or "both". z·f is summed over `chunk` positions before it is squared, F is averaged over
    `window` positions before its root is taken. `kappa`: None fits it to eight true ablations of late sublayers, two
    on each of four sequences, at most one forward in all: fewer where there are fewer sequences. With one or two
    sequences it is that of SmolLM2-135M. `seed`: of the random probe; None takes the lab's.
    `sequences`: so many of the text, evenly chosen, and their first `length` tokens; None takes all.
    """

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "errors take kappa as known, while leaving a sequence out fits it to "
        "others; with a given kappa the check holds"
    }

    card: ClassVar[Card]
    probes: str = "both"
    chunk: int = 8
    window: int = 64
    kappa: float | None = None
    seed: int | None = None
    sequences: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        if self.probes not in PROBES:
            raise ValueError(f"probes is one of {', '.join(PROBES)}, not {self.probes!r}")
        if self.chunk < 1 or self.window < self.chunk or self.window % self.chunk:
            raise ValueError(f"window is a multiple of chunk, both at least 1, not {self.window} and {self.chunk}")
        if self.kappa is not None and self.kappa < 0:
            raise ValueError(f"kappa is at least 0, not {self.kappa}")

    @property
    def alone(self) -> bool:
        """Whether it asks for a text or a seed of its own, and so for a pass of its own."""
        return self.sequences is not None or self.seed is not None

    def tally(self, anatomy: Anatomy) -> DamageTally:
        """The sums behind the scores, under the κ that is given or usual."""
        default = KAPPA[self.probes] if self.kappa is None else self.kappa
        return DamageTally(self.card.name, self.probes, self.chunk, self.window, default)

    def finish(self, lab: Lab, tally: DamageTally) -> Scores:
        """Fit κ, where none is given, to a few ablations of late sublayers."""
        return self.fitted(lab, tally).scores()

    def measure(self, lab: Lab) -> Scores:
        """One forward, one or two backwards, and to fit κ, a few ablations of late sublayers."""
        part = lab if self.sequences is None else lab.part(self.sequences, self.length)
        return self.tallied(part).scores()

    def tallied(self, lab: Lab) -> DamageTally:
        """The sums behind the scores, κ fitted."""
        from lamina.lab.gradients import stream_gradients

        tally = self.tally(lab.anatomy)
        stream_gradients(lab, [tally], seed=self.seed)
        return self.fitted(lab, tally)

    def fitted(self, lab: Lab, tally: DamageTally) -> DamageTally:
        """The same sums under κ fitted to the lab's model, or the given κ."""
        return tally.at(fitted(lab, tally, tally.settings[-1])) if self.kappa is None else tally


def fitted(lab: Lab, tally: DamageTally, default: float) -> float:
    """κ from true ablations: the median of (rise - slope) / bend over up to eight sublayers of the deeper half.

    They are those of median predicted damage; each of up to four sequences tries two of them. As many sequences as
    cost at most one forward over the text, prefixes reused; `default` where that is none.
    """
    from lamina.lab.rows import sequence_keys
    from lamina.lab.trials import Trials

    blocks = [b for k in lab.anatomy.stacks for b in k.blocks]
    scores = tally.scores()
    late = {x.site.id: n for n, b in enumerate(blocks) for x in b.branches if n >= len(blocks) // 2}
    ranked = sorted((s for s in late if tally.parts[s].bend.any()), key=lambda s: scores[s])
    found = []
    for batch, sites in _trials(lab, ranked, {s: 1 - n / len(blocks) for s, n in late.items()}):
        bench, rises = lab.on([batch]), _Rises()
        Trials(bench).run([rises], [lab.anatomy.site(s) for s in sites])
        (key,) = sequence_keys(batch)
        for site in sites:
            slope, bend, _ = tally.parts[site].of(key)
            found += [(rises.found[site] - slope) / bend] if bend > 0 else []
        lab.counts.blocks += bench.counts.blocks
        lab.counts.heads += bench.counts.heads
        lab.progress("ablations", len(found), TRIALS * EACH)
    return float(np.clip(np.median(found), default / BOUNDS, default * BOUNDS)) if found else default


class _Rises:
    """Notes what each trial costs, summed over positions."""

    kinds = tuple(SUBLAYERS)

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def add(self, site: Site, trial: Trial) -> None:
        self.found[site.id] = float(trial.rise[0].sum())


def _trials(lab: Lab, ranked: Sequence[str], shares: Mapping[str, float]) -> list[tuple[Batch, Sequence[str]]]:
    """(one sequence, sites to try on it): as many as cost at most one forward.

    `shares`: the part of a forward that ablating a site takes.
    """
    from lamina.lab.lab import real

    rows = [(int(n), batch, row) for batch in lab.batches for row, n in enumerate(real(batch).sum(1))]
    usual = sorted(n for n, _, _ in rows)[len(rows) // 2]
    fit = [place for place, (n, _, _) in enumerate(rows) if n >= max(usual, 2)]
    for count in range(min(TRIALS, len(fit)), 0, -1):
        chosen = fit[:: len(fit) // count][:count]
        first = max(0, (len(ranked) - EACH * count) // 2)
        middle = ranked[first : first + EACH * count]
        plan = [(place, middle[turn::count]) for turn, place in enumerate(chosen)]
        cost = sum(rows[place][0] * (1 + sum(shares[s] for s in sites)) for place, sites in plan)
        if cost <= sum(n for n, _, _ in rows):
            cut = {place: slice(rows[place][2], rows[place][2] + 1) for place in chosen}
            return [({k: v[cut[p]] for k, v in rows[p][1].items()}, sites) for p, sites in plan]
    return []


recipe(
    "damage",
    PAPER,
    summary="The sublayers with the least predicted rise of the loss go, scored once.",
    measure="damage",
    planner="lowest",
    deviations=("the score is lamina's own, see the measure",),
)
