"""Share: blocks of a group use the same linear maps, stored once; a map of low rank may set each depth apart."""

from __future__ import annotations

from collections.abc import Sequence
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
class Share:
    """Let the linear maps of a step's sites be one: their first site's, or their mean (`by`).

    With `rank` r > 0 each depth adds its own map of rank r, the best for what its weights differ by: W_l ≈ W + B_l A_l
    from the truncated SVD. Each map is stored once, and loaded tied.
    """

    card: ClassVar[Card]

    by: str = "mean"
    rank: int = 0

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"by is one of {', '.join(BY)}, not {self.by!r}")
        if self.rank < 0:
            raise ValueError(f"rank is at least 0, not {self.rank}")

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        known = {s.id for s in anatomy.sites}
        problems = [Problem(s, "the model has no such site") for s in step.sites if s not in known]
        if problems or len(set(step.sites)) < 2:
            return problems or [Problem("share", "sharing takes two sites at least")]
        first = _maps(anatomy, step.sites[0])
        if not first:
            return [Problem(step.sites[0], "it has no linear maps")]
        for site in step.sites[1:]:
            mine = _maps(anatomy, site)
            if {n: anatomy.weight(s).shape for n, s in mine.items()} != {
                n: anatomy.weight(s).shape for n, s in first.items()
            }:
                problems.append(Problem(site, f"it is not built like {step.sites[0]}", "share sites of one kind"))
        if not problems and self.rank and self._less(anatomy, step.sites) <= 0:
            problems.append(Problem(step.sites[0], f"rank {self.rank} takes more than sharing saves", "a lower rank"))
        return problems

    def _less(self, anatomy: Anatomy, sites: Sequence[str]) -> int:
        """Parameters that sharing saves."""
        shapes = [anatomy.weight(s).shape for s in _maps(anatomy, sites[0]).values()]
        return sum((len(sites) - 1) * o * i - len(sites) * self.rank * (o + i) for o, i in shapes)

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        less = self._less(anatomy, step.sites)
        maps = _maps(anatomy, step.sites[0]).values()
        more = sum(len(step.sites) * self.rank * sum(anatomy.weight(s).shape) for s in maps)
        each = anatomy.weight(next(iter(maps))).element_size()
        return anatomy.total() - Cost(less, less * each, macs=-more)

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Tie the maps of `lab.model`. Raises UnsupportedError for the first problem, before anything is changed."""
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        anatomy = lab.anatomy
        before, after = anatomy.total(), self.forecast(step, anatomy)
        groups = [
            [anatomy.site(maps[name]).path for maps in (_maps(anatomy, s) for s in step.sites)]
            for name in _maps(anatomy, step.sites[0])
        ]
        weights = {path: _matrix(lab.model, path) for paths in groups for path in paths}
        steps = [*([self._swapped(lab.model, groups)] if self.rank else [])]
        end = "base.weight" if self.rank else "weight"
        steps.append({"format": 1, "kind": "share", "groups": [[f"{p}.{end}" for p in paths] for paths in groups]})
        biases = {p: getattr(lab.model.get_submodule(p), "bias", None) for p in weights}
        receipt = Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
            structure={"steps": steps},
        )  # fmt: skip
        self.replay(receipt, lab.model)
        for paths in groups:
            self._fill(lab.model, paths, [weights[p] for p in paths], biases)
        lab.renew()
        return receipt

    def _swapped(self, model: nn.Module, groups: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The step that gives each depth a map of low rank beside the shared one."""
        modules = {}
        for path in (p for paths in groups for p in paths):
            outputs, inputs = _matrix(model, path).shape
            modules[path] = {"type": "corrected", "inputs": inputs, "outputs": outputs, "rank": self.rank}
            modules[path] |= {"bias": True} if getattr(model.get_submodule(path), "bias", None) is not None else {}
        return {"format": 1, "kind": "swap", "modules": modules}

    def _fill(self, model: nn.Module, paths: Sequence[str], weights: Sequence[Tensor], biases: dict[str, Any]) -> None:
        """Write the shared map, and what is each depth's own."""
        import torch

        from lamina.rewrites.factorise import factors_of
        from lamina.rewrites.narrow import write

        common = weights[0] if self.by == "first" else torch.stack([w.double() for w in weights]).mean(0)
        with torch.no_grad():
            for path, weight in zip(paths, weights, strict=True):
                module: Any = model.get_submodule(path)
                if not self.rank:
                    write(module, common)
                    continue
                write(module.base, common)
                if biases[path] is not None:
                    module.base.bias.copy_(biases[path])
                first, second = factors_of(weight.double() - module.base.weight.double(), self.rank)
                module.down.weight.copy_(first)
                module.up.weight.copy_(second)

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: two neighbours, and three last sublayers."""
        blocks = anatomy.stacks[0].blocks
        sites = ([b.site.id for b in blocks[1:3]], [b.branches[-1].site.id for b in blocks[1:4]])
        steps = [Step(rewrite="share", sites=tuple(s)) for s in sites]
        return tuple(s for s in steps if not Share().check(s, anatomy))


def _maps(anatomy: Anatomy, site: str) -> dict[str, str]:
    """Name inside the site → linear map."""
    return {s.id.removeprefix(f"{site}."): s.id for s in anatomy.linears(site)}


def _matrix(model: nn.Module, path: str) -> Tensor:
    from lamina.anatomy.linears import matrix

    return matrix(model.get_submodule(path)).detach().clone()
