"""Quantise linear maps: their weights go to the grid of a GGUF type, which the exporter then writes as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.errors import UnsupportedError, did_you_mean
from lamina.core.papers import Card
from lamina.core.registry import rewrite
from lamina.core.sites import Cost, Kind
from lamina.rewrites._maps import linear_problems, number_for, shape_of
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab
    from lamina.lab.moments import InputMoments
    from lamina.maths.grids import AnyGrid


@rewrite(
    "round",
    on=Kind.LINEAR,
    status="stable",
    deviations=(
        "weights in 16 bits get steps of few digits (see lamina.maths.grids): their bytes are not llama-quantize's",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Quantise:
    """Weights rounded to the numbers that `options["type"]` holds: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K … Q6_K.

    To nearest here, for types _K behind a search for scales; these take maps of whole blocks of 256 inputs, in float32.
    `type` is one name, or one for each site. In memory the weights stay floating point, of their own dtype, on the grid
    to the last digit; GGUF files hold them in their types, so that the engine runs the same numbers. Costs are those of
    the file. A method with another rounding says so by `rounded`; where it asks for the maps' inputs, one forward over
    the lab's text shows them.
    """

    card: ClassVar[Card]
    informed: ClassVar[bool] = False
    """Whether `rounded` looks at the inputs."""
    each: ClassVar[tuple[str, ...]] = ("type",)
    stage: ClassVar[int] = 2
    """What is rounded is what other rewrites have made."""
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_forecast_is_the_fact": "weights in memory are rounded, not packed: bytes are those of the engine's file"
    }

    def rounded(self, weight: Tensor, grid: AnyGrid, dtype: torch.dtype, moment: Tensor | None, tokens: int) -> Tensor:
        """Numbers of the grid that a tensor of type `dtype` holds, for a weight [outputs, inputs] in float64.

        `moment` Σ x xᵀ [inputs, inputs] is a sum over `tokens` inputs; None for a method that is not `informed`.
        """
        return grid.rounded(weight, dtype)

    def moments(self, lab: Lab, sites: Iterable[str]) -> InputMoments:
        """What `rounded` is told of the maps' inputs."""
        from lamina.lab.moments import input_moments

        return input_moments(lab, sites)

    def made(self, step: Step, lab: Lab, sites: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Each of the sites, in turn, with its weights [outputs, inputs] on the grid."""
        seen = self.moments(lab, sites) if self.informed else None
        for site in sites:
            weight = lab.anatomy.weight(site).detach()
            moment, _, tokens = (None, None, 0) if seen is None else seen.of(site)
            yield site, self.rounded(weight.double(), grid_of(step, site), weight.dtype, moment, tokens)

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        problems = linear_problems(step, anatomy, "type")
        return problems or [*_type_problems(step, anatomy), *_shared_problems(step, anatomy)]

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take in the engine's file; equals the receipt's `after`."""
        total = anatomy.total()
        for site in _each_once(step, anatomy):
            outputs, inputs = shape_of(anatomy, site)
            weights, grid = outputs * inputs, grid_of(step, site)
            total -= Cost(bytes=weights * anatomy.weight(site).element_size() - weights * grid.size // grid.block)
        return total

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Round the weights in place.

        Raises UnsupportedError for the first problem that `check` names, and, also before anything is changed, for
        weights that are beyond float16's range or not finite.
        """
        import torch

        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        anatomy = lab.anatomy
        before, after = anatomy.total(), self.forecast(step, anatomy)
        _expect_moderate(step, anatomy)
        sites = _each_once(step, anatomy)
        for done, (site, made) in enumerate(self.made(step, lab, sites)):
            held = anatomy.weight(site)
            with torch.no_grad():
                held.copy_(_held(made, held.dtype, site))
            lab.progress("rounding", done + 1, len(sites))
        return Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
            structure={"steps": []},
        )  # fmt: skip

    def weights(self, step: Step, anatomy: Anatomy, seen: InputMoments | None) -> dict[str, Tensor]:
        """Path → the map [outputs, inputs] as it would be; `seen` where the method is `informed`."""
        found = {}
        for site in step.sites:
            held = anatomy.weight(site)
            moment, _, tokens = (None, None, 0) if seen is None or not self.informed else seen.of(site)
            made = self.rounded(held.detach().double(), grid_of(step, site), held.dtype, moment, tokens)
            found[anatomy.site(site).path] = made.to(held.dtype)
        return found

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Nothing to rebuild: the structure is the same, the numbers come with the weights."""

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: all maps of one sublayer, and maps of two with types of their own."""
        return examples("round", anatomy)


def examples(name: str, anatomy: Anatomy) -> tuple[Step, ...]:
    """Steps of a rewrite of linear maps that takes a type."""
    found = [[s.id for s in anatomy.linears(x)] for x in anatomy.sublayers]
    some = [maps for maps in found if maps][1:3]
    mixed = dict(zip((maps[-1] for maps in some), ("Q8_0", "Q5_1"), strict=True))
    return (
        Step(rewrite=name, sites=tuple(some[0]), options={"type": "Q4_0"}),
        Step(rewrite=name, sites=tuple(mixed), options={"type": mixed}),
    )


def grid_of(step: Step, site: str) -> AnyGrid:
    """The grid that a step asks for at a site."""
    from lamina.maths.grids import GRIDS

    return GRIDS[number_for(step, "type", site)]


def _type_problems(step: Step, anatomy: Anatomy) -> Iterator[Problem]:
    """Types that are none, and sites that theirs does not fit."""
    from lamina.maths.grids import GRIDS
    from lamina.maths.kquants import INSTEAD

    for site in step.sites:
        name, dtype = str(number_for(step, "type", site)), anatomy.weight(site).dtype
        if name not in GRIDS:
            yield Problem(site, f"no type is named {name!r}", did_you_mean(name, GRIDS))
        elif shape_of(anatomy, site)[1] % GRIDS[name].block:
            what = f"its {shape_of(anatomy, site)[1]} inputs are no multiple of {GRIDS[name].block}"
            other = INSTEAD.get(name)
            yield Problem(site, what, f"llama.cpp takes {other} for it" if other else "leave it as it is")
        elif not GRIDS[name].fits(dtype):
            what = f"weights in {str(dtype).removeprefix('torch.')} can't hold the numbers of {name}"
            yield Problem(site, what, "load the model in float32, or take a type of one step a block: Q4_0")


def _parameter(anatomy: Anatomy, site: str) -> Any:
    return anatomy.model.get_submodule(anatomy.site(site).path).weight


def _each_once(step: Step, anatomy: Anatomy) -> list[str]:
    """The sites, of those with the same weights the first."""
    found: dict[int, str] = {}
    for site in step.sites:
        found.setdefault(id(_parameter(anatomy, site)), site)
    return list(found.values())


def _shared_problems(step: Step, anatomy: Anatomy) -> Iterator[Problem]:
    """Maps that share their weights and not their type."""
    groups: dict[int, list[str]] = {}
    for site in anatomy.linears():
        groups.setdefault(id(_parameter(anatomy, site.id)), []).append(site.id)
    for group in groups.values():
        inside = [s for s in group if s in step.sites]
        types = {str(number_for(step, "type", s)) for s in inside}
        if inside and (len(inside) < len(group) or len(types) > 1):
            yield Problem(inside[0], f"shares its weights with {', '.join(group)}", "give all of them one type")


def _expect_moderate(step: Step, anatomy: Anatomy) -> None:
    """Raise UnsupportedError for weights that no step can be found for."""
    from lamina.maths.grids import LARGEST

    for site in step.sites:
        if not bool(anatomy.weight(site).abs().max() <= LARGEST):
            raise UnsupportedError(f"its weights are not finite, or beyond {LARGEST:,.0f}", where=site)


def _held(made: Tensor, dtype: torch.dtype, site: str) -> Tensor:
    """The numbers in the type that is to hold them. Raises UnsupportedError where it does not."""
    import torch

    held = made.to(dtype)
    if not torch.equal(held.double(), made.double()):
        raise UnsupportedError(f"weights in {str(dtype).removeprefix('torch.')} can't hold the grid", where=site)
    return held
