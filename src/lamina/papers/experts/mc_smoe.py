"""M-SMoE: experts that are asked alike become one, weighted by how often each is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lamina.core.documents import Receipt, Step
from lamina.core.errors import InputError, LaminaError, UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import planner, recipe, rewrite
from lamina.core.sites import Cost, Kind
from lamina.planners._widths import FAILS, NARROWS, expect_counted, sites_of
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.anatomy._units_routes import Routed
    from lamina.core.documents import Budget
    from lamina.core.scores import Array, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.bench import Bench

PAPER = Paper(
    key="li2023merge",
    title="Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
    authors=(
        "Pingzhi Li",
        "Zhenyu Zhang",
        "Prateek Yadav",
        "Yi-Lin Sung",
        "Yu Cheng",
        "Mohit Bansal",
        "Tianlong Chen",
    ),
    year=2023,
    arxiv="2310.01334",
)


@rewrite(
    "merge-experts",
    PAPER,
    on=Kind.EXPERT,
    needs=Need.FORWARD,
    deviations=(
        "neurons are aligned within each group, to its most used expert, and not to one expert of the whole layer",
        "at least as many groups as a token has experts; no capacity of groups, no distillation",
        "merged experts are not decomposed further: rewrites of low rank take no stacked tensors",
    ),
)
@dataclass(frozen=True, kw_only=True)
class MergeExperts:
    """Merge each mixture's experts into `options["groups"]` (site → number) of them.

    The most used stay as heads of groups; every other joins the one whose router scores are most like its own by
    cosine over tokens. A group becomes the mean of its experts by their use, neurons aligned. The router stays: it
    still tells all experts apart, and several of its numbers lead to one expert. One forward over the text.
    """

    card: ClassVar[Card]
    each: ClassVar[tuple[str, ...]] = ("groups",)
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_refuses_unknown_sites": "the tiny llama has no experts: there is no step to vary",
    }

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        given = step.options.get("groups")
        if not step.sites or not isinstance(given, Mapping):
            return [Problem("merge-experts", "the step names no groups", "options: {groups: {site: number}}")]
        problems = []
        for name in step.sites:
            try:
                site = anatomy.site(name)
            except LaminaError:
                problems.append(Problem(name, "the model has no such experts"))
                continue
            if site.kind is not Kind.EXPERT:
                problems.append(Problem(name, "merging takes experts", "name a site of experts"))
                continue
            least, count = anatomy.active(site), given.get(name)
            if not isinstance(count, int) or not least <= count < site.width:
                problems.append(Problem(name, f"groups are from {least} to {site.width - 1}, not {count}"))
                continue
            try:
                _path(anatomy, site)
            except UnsupportedError as error:
                problems.append(Problem(name, error.what))
        return problems

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        parameters, total = dict(anatomy.model.named_parameters()), anatomy.total()
        for name in step.sites:
            site = anatomy.site(name)
            gone = site.width - step.options["groups"][name]
            own = [parameters[n] for n in _names(anatomy, site)]
            less = sum(p.numel() // site.width * gone for p in own)
            total -= Cost(less, sum(p.numel() // site.width * gone * p.element_size() for p in own))
        return total

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Merge experts of `lab.model`. Raises UnsupportedError for the first problem, before anything is changed."""
        from lamina.rewrites._narrow_config import undone_on_error
        from lamina.rewrites.structure import replay

        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        anatomy = lab.anatomy
        before, after = anatomy.total(), self.forecast(step, anatomy)
        use = usage(lab, step.sites)
        steps: list[dict[str, Any]] = []
        values: dict[str, Tensor] = {}
        for name in step.sites:
            site = anatomy.site(name)
            groups = use[name].groups(step.options["groups"][name])
            steps += _structure(anatomy, site, groups)
            values |= _values(anatomy, site, groups, use[name].frequency)
        with undone_on_error(lab.model):
            replay(lab.model, steps)
            _write(lab.model, values)
            lab.renew()
        return Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
            structure={"steps": steps},
        )  # fmt: skip

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: two mixtures."""
        sites = [s for s in anatomy.of_kind(Kind.EXPERT) if s.width - 1 > anatomy.active(s)][1:3]
        groups = {s.id: s.width - 1 - n for n, s in enumerate(sites)}
        step = Step(rewrite="merge-experts", sites=tuple(groups), options={"groups": groups})
        return (step,) if groups and not MergeExperts().check(step, anatomy) else ()


@dataclass
class Usage:
    """Of one mixture: how many choices fell on each expert [experts], and Σ z zᵀ of the router's scores z."""

    counts: Array = field(default_factory=lambda: np.zeros(0))
    scores: Array = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def frequency(self) -> Array:
        """The share of all choices that fell on each expert."""
        return self.counts / max(self.counts.sum(), 1.0)

    @property
    def likeness(self) -> Array:
        """(cosine + 1) / 2 of the scores of two experts over tokens, [experts, experts]."""
        sizes = np.sqrt(self.scores.diagonal())
        return (self.scores / np.maximum(np.outer(sizes, sizes), 1e-300) + 1) / 2

    def groups(self, count: int) -> list[list[int]]:
        """The most used `count` experts, each followed by those that join it; ties to the first."""
        order = sorted(range(len(self.counts)), key=lambda e: (-self.counts[e], e))
        heads = order[:count]
        found = {h: [h] for h in heads}
        for expert in sorted(order[count:]):
            found[max(heads, key=lambda h: self.likeness[expert, h])].append(expert)
        return [found[h] for h in sorted(heads)]


def usage(lab: Lab, sites: Sequence[str]) -> dict[str, Usage]:
    """One forward over the text."""
    import torch

    from lamina.anatomy._units_routes import router_of, routes_watched

    found = {s: Usage() for s in sites}
    for rows in lab.rows():
        real = rows.mask.flatten()

        def note(site: Site, routed: Routed, real: Tensor = real) -> None:
            if site.id not in found:
                return
            real = real.to(routed.tokens.device)
            scores = routed.tokens[real].double() @ router_of(lab.anatomy, site).double().T
            chosen = torch.bincount(routed.experts[real].flatten(), minlength=site.width)[: site.width]
            mine = found[site.id]
            new = mine.counts.size == 0
            mine.counts = chosen.double().cpu().numpy() + (0 if new else mine.counts)
            mine.scores = (scores.T @ scores).cpu().numpy() + (0 if new else mine.scores)

        with torch.no_grad(), routes_watched(lab.anatomy, note):
            lab.forward(rows.batch, head=False)
        lab.progress("routes", rows.offset - lab.offset + rows.sequences, lab.sequences)
    return found


def _path(anatomy: Anatomy, site: Site) -> str:
    from lamina.anatomy._units_routes import experts_path

    return experts_path(anatomy, site)


def _names(anatomy: Anatomy, site: Site) -> list[str]:
    """The stacked tensors of a mixture, by name."""
    path = _path(anatomy, site)
    return [f"{path}.{n}" for n, _ in anatomy.model.get_submodule(path).named_parameters(recurse=False)]


def _structure(anatomy: Anatomy, site: Site, groups: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """The steps that leave a place for each group, and let the router's numbers lead there."""
    path, names = _path(anatomy, site), set(_names(anatomy, site))
    heads = [group[0] for group in groups]
    told = anatomy.without_units(site, [e for e in range(site.width) if e not in heads])
    cut = {"cuts": {n: c for n, c in told["cuts"].items() if n in names}}
    cut["numbers"] = {p: held for p, held in told.get("numbers", {}).items() if p == path}
    table = [next(n for n, group in enumerate(groups) if e in group) for e in range(site.width)]
    alias = {"format": 1, "kind": "layout", "modules": {path: {"way": "aliased", "table": table}}}
    return [{"format": 1, "kind": "narrow", **cut}, alias]


def _values(anatomy: Anatomy, site: Site, groups: Sequence[Sequence[int]], frequency: Array) -> dict[str, Tensor]:
    """Name → the merged experts [groups, …]."""
    import torch

    from lamina.rewrites._experts import layout, merged, tensors

    made = layout(anatomy, site)
    held = tensors(anatomy.model, made.path)
    parts = [merged(made, held, group, [float(frequency[e]) for e in group]) for group in groups]
    return {f"{made.path}.{n}": torch.stack([p[n] for p in parts]) for n in held}


def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)


@planner(
    "mc-smoe",
    PAPER,
    on=Kind.EXPERT,
    needs=Need.FORWARD,
    deviations=("the number of groups in all is the largest within the budget",),
)
@dataclass(frozen=True, kw_only=True)
class McSmoe:
    """More groups where use is even: experts whose use, over that of their mixture's most used, is among the highest.

    Each mixture keeps at least as many groups as a token has experts. Any scores will do: none are read.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (*FAILS, "check_planner_leaves_the_model_untouched"),
        f"{NARROWS}, of models with experts alone",
    )

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step. Raises InputError for a model without experts, or a budget that merging can't meet."""
        from lamina.planners._target import Target, required

        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        expect_counted(budget, self.card.name)
        sites = sites_of(anatomy, (Kind.EXPERT,), target)
        if not sites:
            raise InputError("the model has no experts that may be merged", hint="take a recipe of neurons")
        use = usage(required(bench, self.card.name).lab, [s.id for s in sites])
        least = {s.id: anatomy.active(s) for s in sites}
        whole, freed = getattr(anatomy.total(), budget.metric), 0
        for total in range(sum(s.width for s in sites) - 1, sum(least.values()) - 1, -1):
            counts = groups_of({s: u.counts for s, u in use.items()}, least, total)
            step = _step(anatomy, counts)
            freed = max(freed, whole - getattr(MergeExperts().forecast(step, anatomy), budget.metric))
            if freed >= target.need:
                return (step,)
        raise target.refuse(freed)


def groups_of(counts: Mapping[str, Array], least: Mapping[str, int], total: int) -> dict[str, int]:
    """How many groups each mixture keeps, `total` in all where `least` allows: of highest use relative to its most."""
    ranked = sorted(
        ((-float(c) / max(float(held.max()), 1e-300), place, rank) for place, held in enumerate(counts.values())
         for rank, c in enumerate(sorted(held, reverse=True))),
    )  # fmt: skip
    names = list(counts)
    kept = {n: least[n] for n in names}
    for _, place, rank in ranked:
        if sum(kept.values()) >= total:
            break
        kept[names[place]] += 1 if rank >= least[names[place]] else 0
    return kept


def _step(anatomy: Anatomy, counts: Mapping[str, int]) -> Step:
    fewer = {s: n for s, n in counts.items() if n < anatomy.site(s).width}
    stay, whole = sum(fewer.values()), sum(anatomy.site(s).width for s in fewer)
    return Step(rewrite="merge-experts", sites=tuple(fewer), options={"groups": fewer}, why={"keeps": stay / whole})


recipe(
    "mc-smoe",
    PAPER,
    summary="Experts that the router scores alike become one, weighted by how often each is asked.",
    measure="",
    planner="mc-smoe",
    rewrite="merge-experts",
)
