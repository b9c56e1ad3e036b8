"""TraceNAS: what goes is judged by whether the gradients of all that stays still point the same way."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, planner, recipe
from lamina.core.scores import Array, Grid, Scores
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Step
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.rows import Rows

PAPER = Paper(
    key="malettira2026tracenas",
    title="TraceNAS: Zero-shot LLM Pruning via Gradient Trace Correlation",
    authors=("Prajna G. Malettira", "Manish Nagaraj", "Arjun Roy", "Shubham Negi", "Kaushik Roy"),
    year=2026,
    arxiv="2602.02891",
)


@measure(
    "gradient-trace",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.GRADIENT,
    status="stable",
    deviations=(
        "the paper's proxy, a sum of correlations, judges whole candidates; a site is scored by how much lower it is "
        "for the model without the site",
        "correlations are Pearson's; the code's are (n-1)/n of them, of n numbers",
        "rank 16 in the place of 64; the mean is over tokens, not over batches' means",
        "experts' matrices, which see routed tokens alone, take no part",
    ),
)
@dataclass(frozen=True, kw_only=True)
class GradientTrace:
    """Keep what others' gradients hang on: Σ over sublayers that stay of 1 - corr, and 1 for each that goes.

    corr is the correlation of a sublayer's mean gradients with and without the site, in the space of adapters of `rank`
    on its linear maps: gradients of B where y = Wx + BAx, A is random (of `seed`; None takes the lab's) and B = 0. The
    first `length` tokens of `sequences` sequences (None takes all). Grid `correlations`: a row per site.
    """

    card: ClassVar[Card]

    rank: int = 16
    sequences: int | None = 4
    length: int | None = 32
    seed: int | None = None

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "four sequences are run, however many there are, and correlations of sums "
        "over so few are far from linear in them"
    }

    def __post_init__(self) -> None:
        for name in ("rank", "sequences", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")

    def measure(self, lab: Lab) -> Scores:
        """One forward and one backward per site, beside those of the whole model."""
        from lamina.lab.resume import few

        part = few(lab, self.sequences, self.length)
        adapters = _adapters(lab, self.rank, lab.seed if self.seed is None else self.seed)
        whole = _traces(part, adapters)
        columns = tuple(whole)
        values, errors, found = {}, {}, []
        sites = [s for s in lab.anatomy.sites if s.kind in self.card.on]
        for done, site in enumerate(sites):
            gone = {p.id for p in lab.anatomy.parts(site)}
            with lab.ablate([site.id]):
                thinned = _traces(part, adapters)
            stay = [c for c in columns if c not in gone]
            values[site.id], errors[site.id], row = _drop(whole, thinned, stay, len(gone))
            found.append([row.get(c, 0.0) for c in columns])
            lab.progress("gradient traces", done + 1, len(sites))
        grid = Grid(values=np.array(found).reshape(len(sites), -1), rows=tuple(values), columns=columns)
        return Scores(measure=self.card.name, values=values, stderr=errors, grids={"correlations": grid})


def _drop(
    whole: Mapping[str, Tensor], thinned: Mapping[str, Tensor], stay: Sequence[str], gone: int
) -> tuple[Array, Array, dict[str, float]]:
    """How much lower the proxy is, [1], its error, and each correlation."""
    from lamina.maths.jackknife import jackknife

    products = {s: _products(whole[s], thinned[s]) for s in stay}
    count = max((len(g) for g in whole.values()), default=0)

    def lower(rows: NDArray[np.bool_]) -> float:
        return gone + sum(1 - _correlation(p, rows) for p in products.values())

    value, error = jackknife(lower, range(count), max(count, 1))
    row = {s: _correlation(p, np.ones(count, dtype=bool)) for s, p in products.items()}
    return np.atleast_1d(value), np.atleast_1d(error), row


def _products(one: Tensor, other: Tensor) -> Array:
    """Inner products of all sequences' gradients, each less its mean: [2 sequences, 2 sequences], `one` first."""
    import torch

    rows = torch.cat([one, other]).double()
    rows -= rows.mean(1, keepdim=True)
    return (rows @ rows.T).numpy()


def _correlation(products: Array, rows: NDArray[np.bool_]) -> float:
    """Pearson's, of the gradients summed over some sequences; 1 of two that do not vary, 0 of one that does not."""
    n = len(rows)
    size, both, other = (products[a : a + n, b : b + n][rows][:, rows].sum() for a, b in ((0, 0), (0, n), (n, n)))
    if size <= 0 or other <= 0:
        return float(size <= 0 and other <= 0)
    return float(both / np.sqrt(size * other))


class _Adapter(NamedTuple):
    """A map's place, the sublayer that it serves, its outputs, and the random A [rank, inputs]."""

    path: str
    sublayer: str
    outputs: int
    down: Tensor


def _adapters(lab: Lab, rank: int, seed: int) -> list[_Adapter]:
    """One for each linear map of the sublayers, uniform as Kaiming's."""
    import torch

    from lamina.lab.probes import noise_of

    found = []
    for sublayer in lab.anatomy.sublayers:
        for site in lab.anatomy.linears(sublayer):
            outputs, inputs = lab.anatomy.weight(site).shape
            drawn = torch.rand(rank, inputs, generator=noise_of(site.id, "adapter", seed))
            found.append(_Adapter(site.path, sublayer.id, outputs, (drawn * 2 - 1) / inputs**0.5))
    return found


def _traces(lab: Lab, adapters: Sequence[_Adapter]) -> dict[str, Tensor]:
    """By sublayer, the gradients of all its adapters' B, flat: float32 [sequences, numbers].

    Those of each sequence's share of the loss, summed over its tokens.
    """
    import torch

    parts = [_of_batch(lab, rows, adapters) for rows in lab.rows()]
    return {s: torch.cat([p[s] for p in parts]) for s in parts[0]}


def _of_batch(lab: Lab, rows: Rows, adapters: Sequence[_Adapter]) -> dict[str, Tensor]:
    import torch

    from lamina.core.errors import UnsupportedError
    from lamina.lab.gradients import frozen, graph_recorded
    from lamina.lab.objective import objective_of, output_of, token_losses

    with frozen(lab.model), torch.enable_grad():
        with graph_recorded(lab.model, lab.anatomy), _listening(lab, adapters) as seen:
            result = lab.result(rows.batch)
        if objective_of(lab.model, result).name != "next-token":
            raise UnsupportedError("the model predicts no next tokens, so there is no loss", where="gradient-trace")
        loss = token_losses(output_of(result), rows.batch)[0].sum()
        outs = {path: out for path, (_, out) in seen.items() if out.requires_grad}
        made = torch.autograd.grad(loss, list(outs.values()), allow_unused=True) if outs else ()
    lab.counts.backwards += int(rows.mask.sum()) * lab.depth
    gradients = dict(zip(outs, made, strict=True))
    found: dict[str, list[Tensor]] = {}
    for one in adapters:
        gradient = gradients.get(one.path)
        up = torch.zeros(rows.sequences, one.outputs * len(one.down))
        if gradient is not None:
            inputs = seen[one.path][0].detach().reshape(rows.sequences, -1, one.down.shape[1]).float()
            gradient = gradient.reshape(rows.sequences, -1, one.outputs).float()
            up = torch.einsum("bto,btr->bor", gradient, inputs @ one.down.T.to(inputs.device)).flatten(1).cpu()
        found.setdefault(one.sublayer, []).append(up)
    return {s: torch.cat(p, 1) for s, p in found.items()}


@contextmanager
def _listening(lab: Lab, adapters: Sequence[_Adapter]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside, notes what enters and leaves the maps, by path."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for one in adapters:

        def note(_: Any, args: Any, output: Any, path: str = one.path) -> None:
            seen[path] = args[0], output

        handles.append(lab.model.get_submodule(one.path).register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@planner(
    "tracenas",
    PAPER,
    on=tuple(sorted(SUBLAYERS)),
    needs=Need.GRADIENT,
    deviations=(
        "depth alone: no masks on neurons and heads, so a term's weight, the share of its sublayer that stays, is 1",
        "a candidate outside the budget is mended by random sites, where the paper throws it away",
        "one-point crossover at any sublayer, mutation of one; the population's size, too, is lamina's",
        "rank 16 in the place of 64, and four sequences of 32 tokens in that of 16 of 4096",
        "where there are scores, the sites of lowest score are one of the first candidates",
        "the proxy alone ranks: no front with latency, no training afterwards",
    ),
)
@dataclass(frozen=True, kw_only=True)
class TraceNAS:
    """Evolve sets of sublayers by the proxy Φ: Σ over what stays of corr(its gradients, those in the dense model).

    The gradients are those of the measure gradient-trace, whose `rank`, `sequences`, `length` and `seed` these are.
    `generations` times the `population` has as many young: with probability `crossover` the front of one parent and the
    rear of another, else one parent; with probability `mutation` one of its sublayers changes sides. The best of all
    live on. `first` times as many candidates are drawn at first. The first `early` of the blocks stay.
    """

    card: ClassVar[Card]

    population: int = 8
    generations: int = 10
    first: int = 2
    crossover: float = 0.7
    mutation: float = 0.2
    early: float = 0.0
    rank: int = 16
    sequences: int | None = 4
    length: int | None = 32
    seed: int | None = None
    kinds: tuple[Kind, ...] = ()

    def __post_init__(self) -> None:
        if self.population < 1 or self.first < 1 or self.generations < 0:
            raise ValueError("population and first are at least 1, generations at least 0")
        shares = (self.crossover, self.mutation, self.early)
        if not all(0 <= s <= 1 for s in shares):
            raise ValueError(f"crossover, mutation and early lie between 0 and 1, not {shares}")

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step per site, in depth order; each says the proxy of the whole set, and that of the dense model.

        One forward and one backward for each candidate that was not seen before, beside those of the dense model.
        """
        from random import Random

        from lamina.planners._evolve import Drops, Genome, Stage, brood, evolve
        from lamina.planners._target import Target, required

        lab = required(bench, self.card.name).lab
        target = Target(budget, anatomy)
        if target.met(()):
            return ()
        seed = lab.seed if self.seed is None else self.seed
        space, draw = Drops(target, self.kinds, self.early), Random(seed)
        first = space.firsts(self.first * self.population, draw, scores)
        proxy = Proxy(lab, self.rank, self.sequences, self.length, seed)

        def young(parents: Sequence[Genome]) -> Genome | None:
            one, other = draw.choice(parents), draw.choice(parents)
            if draw.random() < self.crossover:
                one = space.crossed(one, other, draw.randrange(len(one) + 1), draw) or one
            return space.flipped(one, draw) if draw.random() < self.mutation else one

        def vary(parents: Sequence[Genome]) -> list[Genome]:
            return brood(lambda: young(parents), self.population, parents)

        def each(done: int, _: object) -> None:
            lab.progress("plan", done, self.generations)

        stage = Stage(survivors=self.population, value=lambda genome: -proxy.of(space.sites(genome)))
        best, value = evolve(first, [stage], vary, self.generations, each)
        return space.steps(best, {"proxy": -value, "whole": float(len(proxy.whole))})


class Proxy:
    """Φ of sets of sites that are gone; the gradients of the dense model are taken once, each set's when it is new."""

    def __init__(self, lab: Lab, rank: int, sequences: int | None, length: int | None, seed: int) -> None:
        from lamina.lab.resume import few

        self.lab, self.part = lab, few(lab, sequences, length)
        self.adapters = _adapters(lab, rank, seed)
        self.whole = _traces(self.part, self.adapters)
        self.known: dict[frozenset[str], float] = {}

    def of(self, gone: Iterable[str]) -> float:
        """Σ of correlations over the sublayers that stay, to nine digits behind the point."""
        sublayers = self.lab.anatomy.expand(gone)
        if sublayers not in self.known:
            with self.lab.ablate(sublayers):
                thinned = _traces(self.part, self.adapters)
            pairs = [(self.whole[s], thinned[s]) for s in self.whole if s not in sublayers]
            every = np.ones(self.part.sequences, dtype=bool)
            found = sum(_correlation(_products(one, other), every) for one, other in pairs)
            self.known[sublayers] = round(found, 9)
        return self.known[sublayers]


recipe(
    "tracenas",
    PAPER,
    summary="TraceNAS: an evolution of sets of sublayers by how well the gradients of what stays keep their direction.",
    measure="",
    planner="tracenas",
    planner_options={"early": 0.4},
    deviations=("depth alone, no widths",),
)
