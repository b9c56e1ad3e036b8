"""REAP: an expert is worth what it adds, gate and all, to the tokens that go to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, planner, recipe
from lamina.core.sites import Kind
from lamina.planners._widths import FAILS, NARROWS, Shape, even, expect_counted, sites_of, steps_of

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.anatomy._units_routes import Routed
    from lamina.core.documents import Budget, Step
    from lamina.core.scores import Array, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.bench import Bench

PAPER = Paper(
    key="lasby2025reap",
    title="REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
    authors=(
        "Mike Lasby",
        "Ivan Lazarevich",
        "Nish Sinnadurai",
        "Sean Lie",
        "Yani Ioannou",
        "Vithursan Thangarasa",
    ),
    year=2025,
    arxiv="2510.13999",
)


@measure("reap", PAPER, on=Kind.EXPERT, needs=Need.FORWARD)
@dataclass(frozen=True, kw_only=True)
class Reap:
    """Mean over the tokens that go to an expert of gate × ‖output‖; 0 for one that no token goes to.

    The grid `tokens` has how many went to each, a row per mixture. Experts are run once more on their own tokens.
    """

    card: ClassVar[Card]

    def measure(self, lab: Lab) -> Scores:
        """One forward. Raises UnsupportedError for mixtures that don't say who gets which token."""
        from lamina.core.scores import Grid, Scores

        sums = _Sums()
        sites = lab.anatomy.of_kind(Kind.EXPERT)
        if sites:
            sums.run(lab)
        counts = {s.id: sums.counts[s.id] for s in sites}
        wide = max((len(c) for c in counts.values()), default=0)
        table = np.array([np.pad(c, (0, wide - len(c))) for c in counts.values()]).reshape(len(counts), wide)
        grid = Grid(values=table, rows=tuple(counts), columns=tuple(map(str, range(wide))))
        values = {s.id: sums.totals[s.id] / np.maximum(counts[s.id], 1) for s in sites}
        return Scores(measure=self.card.name, values=values, grids={"tokens": grid} if counts else {})


class _Sums:
    """Of each mixture Σ gate · ‖output‖ and the number of tokens, [experts] each."""

    def __init__(self) -> None:
        self.totals: dict[str, Array] = {}
        self.counts: dict[str, Array] = {}

    def run(self, lab: Lab) -> None:
        """One forward over the text."""
        import torch

        from lamina.anatomy._units_routes import routes_watched

        for rows in lab.rows():
            real = rows.mask.flatten()

            def note(site: Site, routed: Routed, real: torch.Tensor = real) -> None:
                self.add(site, routed, real.to(routed.gates.device))

            with torch.no_grad(), routes_watched(lab.anatomy, note, outputs=True):
                lab.forward(rows.batch, head=False)
            lab.progress("experts", rows.offset - lab.offset + rows.sequences, lab.sequences)

    def add(self, site: Site, routed: Routed, real: object) -> None:
        """Take in one mixture on one batch; `real` tells which tokens are no padding."""
        import torch

        assert isinstance(real, torch.Tensor)
        assert routed.outputs is not None
        sizes = routed.outputs.double().norm(dim=-1).T * routed.gates.double()
        experts, sizes = routed.experts[real].flatten().cpu(), sizes[real].flatten().cpu()
        total = torch.zeros(site.width, dtype=torch.float64).index_add_(0, experts, sizes).numpy()
        count = torch.bincount(experts, minlength=site.width)[: site.width].double().numpy()
        self.totals[site.id] = self.totals.get(site.id, 0) + total
        self.counts[site.id] = self.counts.get(site.id, 0) + count


@planner(
    "reap",
    PAPER,
    on=Kind.EXPERT,
    deviations=("as many experts leave each mixture as the budget asks for, and a multiple of `parallel` stays",),
)
@dataclass(frozen=True, kw_only=True)
class ReapPlan:
    """The experts of lowest score leave each mixture, the same number everywhere; a token's own number always stays.

    `parallel` is the number of devices that experts are split over.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (*FAILS, "check_planner_leaves_the_model_untouched"),
        f"{NARROWS}, of models with experts alone",
    )

    parallel: int = 1

    def __post_init__(self) -> None:
        Shape(parallel=self.parallel)

    def plan(self, scores: Scores, budget: Budget, anatomy: Anatomy, bench: Bench | None = None) -> tuple[Step, ...]:
        """One narrow step. Raises InputError for a model without experts, or a budget that they can't meet."""
        from lamina.core.errors import InputError
        from lamina.planners._target import Target

        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        expect_counted(budget, self.card.name)
        sites = [s for s in sites_of(anatomy, (Kind.EXPERT,), target) if s in scores]
        if not sites:
            raise InputError("the model has no experts that may go", hint="take a recipe of neurons or sublayers")
        counts = even(anatomy, target, [sites], Shape(parallel=self.parallel))
        return steps_of(anatomy, scores.values, counts)


recipe(
    "reap",
    PAPER,
    summary="The experts that add least to their tokens, gate and all, leave every mixture.",
    measure="reap",
    planner="reap",
    rewrite="narrow",
)
