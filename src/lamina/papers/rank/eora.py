"""EoRA: beside each map that was rounded, sparsified or cut, a map of low rank for the outputs that were lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core import registry
from lamina.core.documents import Receipt, Step
from lamina.core.errors import InputError, UnsupportedError, did_you_mean
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Cost, Kind
from lamina.rewrites._maps import linear_problems, number_for, shape_of
from lamina.rewrites.drop import Problem
from lamina.rewrites.factorise import Factorise, factors_of, fill
from lamina.rewrites.quantise import Quantise
from lamina.rewrites.sparsify import Sparsify

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab
    from lamina.lab.moments import InputMoments

PAPER = Paper(
    key="liu2024eora",
    title="EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
    authors=(
        "Shih-Yang Liu",
        "Maksim Khadkevich",
        "Nai Chit Fung",
        "Charbel Sakr",
        "Chao-Han Huck Yang",
        "Chien-Yi Wang",
        "Saurav Muralidharan",
        "Hongxu Yin",
        "Kwang-Ting Cheng",
        "Jan Kautz",
        "Yu-Chiang Frank Wang",
        "Pavlo Molchanov",
        "Min-Hung Chen",
    ),
    year=2024,
    arxiv="2410.21271",
)
HINT = "options: {over: {rewrite: round, options: {type: Q4_0}}, rank: 16}"


@rewrite(
    "eora",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    deviations=(
        "inputs are those of the dense network; the paper goes layer by layer, behind those that it has corrected",
        "eigenvalues below 1e-9 of the largest are raised to that; the paper raises those that are not positive to the "
        "smallest that is",
        "factors stay in the type of the weights: the paper can round them too",
        "over factors of rank k the correction makes them factors of rank k + r: no second map stands beside them",
    ),
)
@dataclass(frozen=True, kw_only=True)
class EoRA:
    """Do another rewrite of linear maps, then let a map of rank r beside each make up for it: least ‖(D - B A) X‖.

    `options["over"]` tells the other one: {"rewrite": name, "options": {…}}; it rounds, sparsifies or factorises.
    D is what the map's weights lost by it, X what enters the map. `options["rank"]` is one number, or one for each
    site.
    """

    card: ClassVar[Card]
    each: ClassVar[tuple[str, ...]] = ("rank",)
    stage: ClassVar[int] = 2
    """As of what rounds: what is corrected is what other rewrites have made."""
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_costs_do_not_grow": "what rounds and sparsifies takes no parameter away, and the correction adds some"
    }

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way, of the other rewrite too; needs no weights."""
        from lamina.anatomy.neighbours import tied

        problems = linear_problems(step, anatomy, "rank")
        if problems:
            return problems
        try:
            inner = under(step)
            problems = registry.rewrite_of(inner).check(inner, anatomy)
        except InputError as error:
            return [Problem(step.rewrite, error.what, error.hint or HINT)]
        shared = tied(anatomy)
        for site in step.sites:
            rank, most = number_for(step, "rank", site), min(shape_of(anatomy, site))
            if not 1 <= rank <= most:
                problems.append(Problem(site, f"a correction has ranks from 1 to {most}, not {rank}"))
            if site in shared:
                problems.append(Problem(site, "shares its weights with another map", "leave it"))
        return problems

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take: as after the other rewrite, and the corrections."""
        inner = under(step)
        total = registry.rewrite_of(inner).forecast(inner, anatomy)
        for site in step.sites:
            more = number_for(step, "rank", site) * sum(shape_of(anatomy, site))
            total += Cost(more, more * anatomy.weight(site).element_size(), macs=more)
        return total

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Do the other rewrite, and put the corrections beside the maps.

        Raises UnsupportedError for the first problem that `check` names, before anything is changed.
        """
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        from lamina.lab.moments import input_moments
        from lamina.rewrites.structure import replay

        anatomy, inner = lab.anatomy, under(step)
        before, after = anatomy.total(), self.forecast(step, anatomy)
        seen = input_moments(lab, step.sites)
        paths = {s: anatomy.site(s).path for s in step.sites}
        dense = {s: anatomy.weight(s).detach().clone() for s in step.sites}
        done = registry.rewrite_of(inner).apply(inner, lab)
        made: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
        for site, path in paths.items():
            module = lab.model.get_submodule(path)
            lost = dense[site].double() - _matrix(module).detach().double()
            made[path] = module, *correction(lost, number_for(step, "rank", site), seen.of(site)[0])
            lab.progress("corrections", len(made), len(paths))
        beside = {path: _described(module, len(first)) for path, (module, first, _) in made.items()}
        swap = {"format": 1, "kind": "swap", "modules": beside}
        replay(lab.model, [swap])
        for path, (module, first, second) in made.items():
            _fill(lab.model.get_submodule(path), module, first, second)
        lab.renew()
        return Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after,
            options={**step.options, "over": {"rewrite": done.rewrite, "options": done.options}},
            structure={"steps": [*done.structure.get("steps", ()), swap]},
        )  # fmt: skip

    def weights(self, step: Step, anatomy: Anatomy, seen: InputMoments | None) -> dict[str, Tensor]:
        """Path → both maps as one matrix [outputs, inputs], as they would be; `seen` are the inputs' moments.

        Raises UnsupportedError where the other rewrite can't tell its weights before it is done.
        """
        assert seen is not None
        inner = under(step)
        method = registry.rewrite_of(inner)
        if not hasattr(method, "weights"):
            raise UnsupportedError(f"{inner.rewrite} can't be tried without being done", where=step.rewrite)
        found = dict(method.weights(inner, anatomy, seen))
        for site in step.sites:
            path = anatomy.site(site).path
            lost = anatomy.weight(site).detach().double() - found[path].double()
            first, second = correction(lost, number_for(step, "rank", site), seen.of(site)[0])
            found[path] = found[path].double() + second @ first
        return found

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: beside maps with zeros, and beside factors, each with its rank."""
        found = [[s.id for s in anatomy.linears(x)] for x in anatomy.sublayers]
        some = [maps for maps in found if maps][1:3]
        mixed = {s: 2 + n for n, s in enumerate(maps[-1] for maps in some)}
        zeros = {"rewrite": "magnitude", "options": {"sparsity": 0.5}}
        return (
            _step(some[0], 3, zeros),
            _step(tuple(mixed), mixed, {"rewrite": "svd-llm", "options": {"rank": 4}}),
        )


def _step(sites: Sequence[str], rank: int | Mapping[str, int], over: Mapping[str, Any]) -> Step:
    return Step(rewrite="eora", sites=tuple(sites), options={"over": over, "rank": rank})


def under(step: Step) -> Step:
    """The other rewrite's step. Raises InputError where none is told, or one whose error is no map of its own."""
    over = step.options.get("over")
    if not isinstance(over, Mapping) or not isinstance(over.get("rewrite"), str):
        raise InputError("the step does not tell over which rewrite", hint=HINT)
    if unknown := [k for k in over if k not in ("rewrite", "options")]:
        raise InputError(f"over has no {unknown[0]!r}", hint=did_you_mean(unknown[0], ("rewrite", "options")))
    kind = registry.REWRITES.method(over["rewrite"])
    if not issubclass(kind, Quantise | Sparsify | Factorise):
        kinds = (registry.REWRITES.method(n) for n in registry.REWRITES)
        able = ", ".join(k.card.name for k in kinds if issubclass(k, Quantise | Sparsify | Factorise))
        raise InputError(
            f"{over['rewrite']} neither rounds, sparsifies nor factorises maps", hint=f"over one of {able}"
        )
    return Step(rewrite=over["rewrite"], sites=step.sites, options=over.get("options") or {})


def correction(lost: Tensor, rank: int, moment: Tensor) -> tuple[Tensor, Tensor]:
    """A [rank, inputs] and B [outputs, rank], float64, of the least ‖(lost - B A) X‖, X Xᵀ the moment.

    The error is lost · Q √Λ cut to its first singular values, Q Λ Qᵀ the moment, and taken back by Λ^(-1/2) Qᵀ.
    """
    from lamina.maths.whitening import whitener

    return factors_of(lost, rank, whitener(moment))


def _matrix(module: Any) -> Tensor:
    """The map as one matrix [outputs, inputs]: of factors, or as a linear map stores it."""
    from lamina.anatomy.linears import is_linear, matrix

    return matrix(module) if is_linear(module) else module.weight


def _described(module: Any, rank: int) -> dict[str, Any]:
    """The module that stands for a map and its correction, in plain data."""
    outputs, inputs = _matrix(module).shape
    both = {"inputs": inputs, "outputs": outputs, **({"bias": True} if module.bias is not None else {})}
    if hasattr(module, "down"):
        return {"type": "factors", **both, "rank": module.down.weight.shape[0] + rank}
    return {"type": "corrected", **both, "rank": rank}


def _fill(made: Any, module: Any, first: Tensor, second: Tensor) -> None:
    """Write the map that was there and its correction."""
    import torch

    if hasattr(module, "down"):
        down, up = module.down.weight.double(), module.up.weight.double()
        fill(made, torch.cat([down, first]), torch.cat([up, second], 1), module.bias)
        return
    with torch.no_grad():
        made.base.weight.copy_(_matrix(module))
        made.down.weight.copy_(first)
        made.up.weight.copy_(second)
        if module.bias is not None:
            made.base.bias.copy_(module.bias)
