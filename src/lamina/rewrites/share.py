"""Share: blocks of a group use the same linear maps, stored once; a map of low rank may set each depth apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.papers import Card, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import SUBLAYERS, Cost, Kind
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab

PAPER = Paper(
    key="bae2024relaxed",
    title="Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA",
    authors=(
        "Sangmin Bae",
        "Adam Fisch",
        "Hrayr Harutyunyan",
        "Ziwei Ji",
        "Seungyeon Kim",
        "Tal Schuster",
    ),
    year=2024,
    arxiv="2410.20672",
)
BY = ("first", "mean")
Groups = Sequence[Sequence[str]]
"""Linear maps that become one: their sites, depth by depth."""
Made = Mapping[str, Mapping[str, "Tensor"]]
"""Path of a map → name of a parameter of what stands there → its numbers."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What rewrites have in common by which linear maps of several depths become one, stored once and loaded tied.

    `group` sites of a step, one after the other, share their maps (0: all of them); a single one that is left over
    stays as it is. A method says by `common` what the map becomes, by `spec` what else stands in its place, and by
    `made` which numbers come there.
    """

    card: ClassVar[Card]

    group: int = 0

    def __post_init__(self) -> None:
        if self.group < 0 or self.group == 1:
            raise ValueError(f"group is 0 for all, or at least 2, not {self.group}")

    def spec(self, anatomy: Anatomy, site: str) -> Mapping[str, Any] | None:
        """The module that comes in a map's place, in plain data (see `lamina_parts`); None where the map stays.

        Its parameter `base.weight` is what is shared; of a plain map it is `weight`.
        """
        return None if _stored_plainly(anatomy, site) else {"type": "linear"}

    def common(self, maps: Sequence[Tensor]) -> Tensor:
        """The map that stands for all [outputs, inputs], given them in the step's order; float64. Here the mean."""
        import torch

        return torch.stack([w.double() for w in maps]).mean(0)

    def made(self, step: Step, lab: Lab, groups: Groups) -> Made:
        """The numbers of each map, found before the structure changes."""
        return {p: {"weight": common} for held, common in self.shared(lab.anatomy, groups) for p in held}

    def shared(self, anatomy: Anatomy, groups: Groups) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Of each group path → the map [outputs, inputs], a copy; and the common map, of their type."""
        for group in groups:
            held = {anatomy.site(s).path: anatomy.weight(s).detach().clone() for s in group}
            maps = list(held.values())
            yield held, self.common(maps).to(maps[0].dtype)

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        known = {s.id for s in anatomy.sites}
        problems = [Problem(s, "the model has no such site") for s in step.sites if s not in known]
        if problems or len(set(step.sites)) < 2:
            return problems or [Problem(self.card.name, "sharing takes two sites at least")]
        if len(set(step.sites)) < len(step.sites):
            return [Problem(self.card.name, "the step names a site twice")]
        for sites in self._together(step):
            problems += _unlike(anatomy, sites)
        if problems:
            return problems
        maps = [s for group in self._groups(step, anatomy) for s in group]
        uses = Counter(id(p) for _, p in anatomy.model.named_parameters(remove_duplicate=False))
        held = [s for s in maps if uses[id(_parameter(anatomy, s))] > 1]
        if held:
            return [Problem(held[0], "it shares its weights already", "share all of its depths in one step")]
        if self._less(step, anatomy) <= 0:
            what = "what each depth has of its own takes more than sharing saves"
            return [Problem(step.sites[0], what, "a lower rank")]
        return []

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        groups = self._groups(step, anatomy)
        less = self._less(step, anatomy)
        each = anatomy.weight(groups[0][0]).element_size()
        more = sum(products(self._described(anatomy, s)) for group in groups for s in group)
        return anatomy.total() - Cost(less, less * each, macs=-more)

    def _less(self, step: Step, anatomy: Anatomy) -> int:
        """Parameters that sharing saves."""
        less = 0
        for group in self._groups(step, anatomy):
            less += (len(group) - 1) * anatomy.weight(group[0]).numel()
            less -= sum(own(self._described(anatomy, s)) for s in group)
        return less

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Tie the maps of `lab.model`. Raises UnsupportedError for the first problem, before anything is changed."""
        import torch

        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        anatomy = lab.anatomy
        before, after = anatomy.total(), self.forecast(step, anatomy)
        groups = self._groups(step, anatomy)
        made = self.made(step, lab, groups)
        receipt = Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
            structure={"steps": self._steps(anatomy, groups)},
        )  # fmt: skip
        biases = {p: _bias(lab.model, p) for p in made}
        self.replay(receipt, lab.model)
        with torch.no_grad():
            for path, numbers in made.items():
                module: Any = lab.model.get_submodule(path)
                if biases[path] is not None:
                    module.bias.copy_(biases[path])
                for name, tensor in numbers.items():
                    module.get_parameter(name).copy_(tensor)
        lab.renew()
        return receipt

    def _steps(self, anatomy: Anatomy, groups: Groups) -> list[dict[str, Any]]:
        """How the structure changes: modules that come in the maps' places, then which weights are one."""
        specs = {s: self._described(anatomy, s) for group in groups for s in group}
        paths = {s: anatomy.site(s).path for s in specs}
        swapped = {paths[s]: spec for s, spec in specs.items() if spec}
        ends = {s: "base.weight" if spec and spec["type"] != "linear" else "weight" for s, spec in specs.items()}
        tied = [[f"{paths[s]}.{ends[s]}" for s in group] for group in groups]
        swap = {"format": 1, "kind": "swap", "modules": swapped}
        return [*([swap] if swapped else []), {"format": 1, "kind": "share", "groups": tied}]

    def _described(self, anatomy: Anatomy, site: str) -> dict[str, Any]:
        """The module that comes in a map's place, with its sizes; empty where the map stays."""
        spec = self.spec(anatomy, site)
        if spec is None:
            return {}
        outputs, inputs = anatomy.weight(site).shape
        rank = {"rank": min(spec["rank"], outputs, inputs)} if "rank" in spec else {}
        bias = {"bias": True} if _bias(anatomy.model, anatomy.site(site).path) is not None else {}
        return {**spec, "inputs": inputs, "outputs": outputs, **rank, **bias}

    def _together(self, step: Step) -> list[tuple[str, ...]]:
        """The sites, group by group."""
        size = self.group or len(step.sites)
        groups = [step.sites[n : n + size] for n in range(0, len(step.sites), size)]
        return [g for g in groups if len(g) > 1]

    def _groups(self, step: Step, anatomy: Anatomy) -> list[list[str]]:
        """The linear maps that become one."""
        found = []
        for sites in self._together(step):
            maps = [_maps(anatomy, s) for s in sites]
            found += [[m[name] for m in maps] for name in maps[0]]
        return found

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @classmethod
    def examples(cls, anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: two neighbours, and three last sublayers where it takes these."""
        blocks = anatomy.stacks[0].blocks
        sites = [[b.site.id for b in blocks[1:3]]]
        if len(cls.card.on) > 1:
            sites.append([b.branches[-1].site.id for b in blocks[1:4]])
        steps = [Step(rewrite=cls.card.name, sites=tuple(s)) for s in sites]
        return tuple(s for s in steps if not cls().check(s, anatomy))


@rewrite(
    "share",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    status="stable",
    deviations=(
        "groups are any sites that are built alike, not one loop over the depth",
        "norms and biases stay with each depth; without training",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Share(Sharing):
    """Let the linear maps of a step's sites be one: their first site's, or their mean (`by`).

    With `rank` r > 0 each depth adds its own map of rank r, the best for what its weights differ by: W_l ≈ W + B_l A_l
    from the truncated SVD. Each map is stored once, and loaded tied. `group` sites of the step, one after the other,
    share their maps; 0: all of them.
    """

    by: str = "mean"
    rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in BY:
            raise ValueError(f"by is one of {', '.join(BY)}, not {self.by!r}")
        if self.rank < 0:
            raise ValueError(f"rank is at least 0, not {self.rank}")

    def spec(self, anatomy: Anatomy, site: str) -> Mapping[str, Any] | None:
        """The shared map and one of low rank."""
        return {"type": "corrected", "rank": self.rank} if self.rank else super().spec(anatomy, site)

    def common(self, maps: Sequence[Tensor]) -> Tensor:
        """The first, or the mean."""
        return maps[0].double() if self.by == "first" else super().common(maps)

    def made(self, step: Step, lab: Lab, groups: Groups) -> Made:
        """The shared map, and what is each depth's own."""
        from lamina.rewrites.factorise import factors_of

        if not self.rank:
            return super().made(step, lab, groups)
        found = {}
        for held, common in self.shared(lab.anatomy, groups):
            for path, weight in held.items():
                first, second = factors_of(weight.double() - common.double(), self.rank)
                found[path] = {"base.weight": common, "down.weight": first, "up.weight": second}
        return found


def own(spec: Mapping[str, Any]) -> int:
    """Parameters that a depth has beside the shared map and its bias."""
    return products(spec) + (spec.get("type") == "scaled")


def products(spec: Mapping[str, Any]) -> int:
    """Products for a token, beside those of the shared map."""
    return spec.get("rank", 0) * (spec.get("inputs", 0) + spec.get("outputs", 0))


def _unlike(anatomy: Anatomy, sites: Sequence[str]) -> list[Problem]:
    """Sites that are not built like the first one, which has linear maps."""
    found = [{n: anatomy.weight(s).shape for n, s in _maps(anatomy, site).items()} for site in sites]
    if not found[0]:
        return [Problem(sites[0], "it has no linear maps")]
    what = f"it is not built like {sites[0]}"
    return [
        Problem(site, what, "share sites of one kind")
        for site, shapes in zip(sites, found, strict=True)
        if shapes != found[0]
    ]


def _maps(anatomy: Anatomy, site: str) -> dict[str, str]:
    """Name inside the site → linear map."""
    return {s.id.removeprefix(f"{site}."): s.id for s in anatomy.linears(site)}


def _parameter(anatomy: Anatomy, site: str) -> Any:
    return anatomy.model.get_submodule(anatomy.site(site).path).weight


def _stored_plainly(anatomy: Anatomy, site: str) -> bool:
    """Whether it is an nn.Linear: of other maps transformers would fit the bias to the weight's first dimension."""
    from torch import nn

    return isinstance(anatomy.model.get_submodule(anatomy.site(site).path), nn.Linear)


def _bias(model: nn.Module, path: str) -> Tensor | None:
    bias: Any = getattr(model.get_submodule(path), "bias", None)
    return None if bias is None else bias.detach().clone()
