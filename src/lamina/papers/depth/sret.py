"""Sliced Recursive Transformer: blocks are passes of one, each with residual factors and a projection of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Kind
from lamina.rewrites.drop import Problem
from lamina.rewrites.share import Groups, Made, Sharing

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Step
    from lamina.lab import Lab

PAPER = Paper(
    key="shen2022sret",
    title="Sliced Recursive Transformer",
    authors=("Zhiqiang Shen", "Zechun Liu", "Eric Xing"),
    year=2022,
    arxiv="2111.05297",
)


@rewrite(
    "sret",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=(
        "the paper trains its network from scratch; here factors and projections are fitted to a pretrained one's "
        "streams in closed form, in depth order, and the shared maps are means",
        "what follows a pass, a norm and an MLP, is a map of low rank on the inputs of a branch's last map",
        "the stream's own factors are 1: before a norm they tell the same as the branches' factors",
        "attention is not sliced into groups of tokens: a pretrained one reads all of them",
    ),
)
@dataclass(frozen=True, kw_only=True)
class SReT(Sharing):
    """Blocks share their maps, `group` by `group`; each depth's branches get a factor and a map of rank `rank`.

    In depth order, with z the inputs of a branch's last map [tokens, features], f what the branch adds with the shared
    maps and r what is missing to the dense stream behind it [tokens, width]: b = argmin Σ_t ‖r - b f‖² / ‖y‖², then
    P = argmin over rank `rank` of Σ_t ‖r - b f - P z‖² / ‖y‖² + ridge · mean(diag G) ‖P‖², G = Σ_t z zᵀ / ‖y‖², y the
    dense stream. The branch then adds b f + P z.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_costs_do_not_grow": "each depth computes a map of low rank of its own, so that products grow"
    }

    group: int = 2
    rank: int = 8
    ridge: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0 or self.ridge < 0:
            raise ValueError("rank and ridge are at least 0")

    def spec(self, anatomy: Anatomy, site: str) -> Mapping[str, Any] | None:
        """A branch's last map gets a factor and a map of low rank beside it."""
        if anatomy.site(site).path in _tails(anatomy):
            return {"type": "scaled", "rank": self.rank}
        return super().spec(anatomy, site)

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        problems = super().check(step, anatomy)
        maps, tails = {s.path for s in anatomy.linears()}, _tails(anatomy)
        for site in step.sites if not problems else ():
            stack, block = anatomy.stack(site), anatomy.block(site)
            if site != block.site.id:
                problems.append(Problem(site, "it is no block", f"share {block.site.id}"))
            elif not stack.linked or stack.looped or stack.carries or not all(b.plain for b in stack.blocks):
                problems.append(Problem(site, "its stream is more than a sum of what branches add", "use share"))
            elif len(maps & {p for p in tails if p.startswith(f"{block.path}.")}) < len(block.branches):
                problems.append(Problem(site, "not all of its branches end in a linear map", "use share"))
        return problems

    def made(self, step: Step, lab: Lab, groups: Groups) -> Made:
        """The means, and what is fitted to the streams of the network that has them."""
        from lamina.rewrites._passes import fitted

        weights = {p: common for held, common in self.shared(lab.anatomy, groups) for p in held}
        places = range(len(lab.anatomy.stacks))
        fits = {p: f for n in places for p, f in fitted(lab, n, weights, self.rank, self.ridge).items()}
        found = {}
        for path, weight in weights.items():
            found[path] = {"weight": weight}
            if path in fits:
                bias: Any = getattr(lab.model.get_submodule(path), "bias", None)
                found[path] = {"base.weight": weight, **fits[path].numbers(bias)}
        return found


def _tails(anatomy: Anatomy) -> set[str]:
    """Paths of the linear maps that branches end in."""
    return {f"{b.path}.{x.tail}" for k in anatomy.stacks for b in k.blocks for x in b.branches if x.tail}
