"""Factorise linear maps: two maps of a lower rank in the place of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.papers import Card
from lamina.core.registry import rewrite
from lamina.core.sites import Cost, Kind
from lamina.rewrites._maps import linear_problems, number_for, shape_of
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab
    from lamina.lab.moments import InputMoments


@rewrite("svd", on=Kind.LINEAR, status="stable")
@dataclass(frozen=True, kw_only=True)
class Factorise:
    """W [outputs, inputs] as B A of rank `options["rank"]`, the best one by the norm ‖(W - B A) S‖, S = I here.

    `rank` is one number, or one for each site. A method with another S says so by `scaling`. Where S asks for the
    maps' inputs, one forward over the lab's text shows them.
    """

    card: ClassVar[Card]
    informed: ClassVar[bool] = False
    """Whether `scaling` looks at the inputs."""
    each: ClassVar[tuple[str, ...]] = ("rank",)
    """Options that may differ from site to site."""

    def scaling(self, weight: Tensor, moment: Tensor, size: Tensor, tokens: int) -> tuple[Tensor, Tensor] | None:
        """S and its inverse, float64 [inputs, inputs] or, of a diagonal, [inputs]; None for the identity.

        `moment` Σ x xᵀ [inputs, inputs] and `size` Σ |x| [inputs] are sums over `tokens` inputs.
        """
        return None

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        problems = linear_problems(step, anatomy, "rank")
        for site in step.sites if not problems else ():
            outputs, inputs = shape_of(anatomy, site)
            rank, most = number_for(step, "rank", site), -(-outputs * inputs // (outputs + inputs)) - 1
            if not 1 <= rank <= most:
                hint = "keep the map, or take another rank"
                problems.append(Problem(site, f"rank {rank} saves nothing: it has ranks from 1 to {most}", hint))
        return problems

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        total = anatomy.total()
        for site in step.sites:
            outputs, inputs = shape_of(anatomy, site)
            less = outputs * inputs - number_for(step, "rank", site) * (outputs + inputs)
            each = anatomy.weight(site).element_size()
            total -= Cost(less, less * each, macs=less)
        return total

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Put the factors in the maps' places. Raises UnsupportedError for the first problem that `check` names."""
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        from lamina.lab.moments import input_moments

        anatomy = lab.anatomy
        before, after = anatomy.total(), self.forecast(step, anatomy)
        seen = input_moments(lab, step.sites) if self.informed else None
        factors = {}
        for done, site in enumerate(step.sites):
            factors[anatomy.site(site).path] = self._factors(anatomy, site, number_for(step, "rank", site), seen)
            lab.progress("factors", done + 1, len(step.sites))
        made = {p: _described(lab.model.get_submodule(p), len(a)) for p, (a, _) in factors.items()}
        biases = {p: getattr(lab.model.get_submodule(p), "bias", None) for p in factors}
        receipt = Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
            structure={"steps": [{"format": 1, "kind": "swap", "modules": made}]},
        )  # fmt: skip
        self.replay(receipt, lab.model)
        for path, (first, second) in factors.items():
            fill(lab.model.get_submodule(path), first, second, biases[path])
        lab.renew()
        return receipt

    def weights(self, step: Step, anatomy: Anatomy, seen: InputMoments | None) -> dict[str, Tensor]:
        """Path → the map as one matrix [outputs, inputs], as it would be; `seen` where the method is `informed`."""
        return {path: second @ first for path, first, second in self.factors(step, anatomy, seen).values()}

    def factors(self, step: Step, anatomy: Anatomy, seen: InputMoments | None) -> dict[str, tuple[str, Tensor, Tensor]]:
        """Site → its path, A and B; the first r rows of A and columns of B are the factors of rank r."""
        return {
            site: (anatomy.site(site).path, *self._factors(anatomy, site, number_for(step, "rank", site), seen))
            for site in step.sites
        }

    def factored(self, weight: Tensor, rank: int, seen: tuple[Tensor, Tensor, int] | None) -> tuple[Tensor, Tensor]:
        """A [rank, inputs] and B [outputs, rank], float64, of W; `seen` is what `scaling` is told of its inputs."""
        return factors_of(weight, rank, None if seen is None else self.scaling(weight, *seen))

    def _factors(self, anatomy: Anatomy, site: str, rank: int, seen: InputMoments | None) -> tuple[Tensor, Tensor]:
        told = seen.of(site) if seen is not None and self.informed else None
        return self.factored(anatomy.weight(site).detach().double(), rank, told)

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: all maps of one sublayer, and maps of two with ranks of their own."""
        return examples("svd", anatomy)


def examples(name: str, anatomy: Anatomy) -> tuple[Step, ...]:
    """Steps of a rewrite of linear maps that takes a rank."""
    found = [[s.id for s in anatomy.linears(x)] for x in anatomy.sublayers]
    some = [maps for maps in found if maps][1:3]
    mixed = {s: 2 + n for n, s in enumerate(maps[-1] for maps in some)}
    return (
        Step(rewrite=name, sites=tuple(some[0]), options={"rank": 3}),
        Step(rewrite=name, sites=tuple(mixed), options={"rank": mixed}),
    )


def factors_of(weight: Tensor, rank: int, scale: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """A [rank, inputs] and B [outputs, rank], float64, of the least ‖(W - B A) S‖; `scale` are S and its inverse.

    The error is √Σ_{j>rank} σ_j², σ the singular values of W S; A and B share them evenly.
    """
    import torch

    def times(left: Tensor, right: Tensor) -> Tensor:
        return left * right if right.ndim == 1 else left @ right

    scaled = weight if scale is None else times(weight, scale[0])
    u, s, v = torch.linalg.svd(scaled, full_matrices=False)
    root = s[:rank].sqrt()
    first = root.unsqueeze(1) * v[:rank]
    return first if scale is None else times(first, scale[1]), u[:, :rank] * root


def fill(module: Any, first: Tensor, second: Tensor, bias: Tensor | None) -> None:
    """Write the factors, and the bias of the map that was there, into a module that stands in its place."""
    import torch

    with torch.no_grad():
        module.down.weight.copy_(first)
        module.up.weight.copy_(second)
        if bias is not None:
            module.up.bias.copy_(bias)


def _described(module: nn.Module, rank: int) -> Mapping[str, Any]:
    """The module that stands for a map of low rank, in plain data."""
    from lamina.anatomy.linears import matrix

    outputs, inputs = matrix(module).shape
    found = {"type": "factors", "inputs": inputs, "outputs": outputs, "rank": rank}
    return found | ({"bias": True} if getattr(module, "bias", None) is not None else {})
