"""Merge: neighbouring blocks become one, whose linear maps are made of all of theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.papers import Card
from lamina.core.registry import rewrite
from lamina.core.sites import Cost, Kind
from lamina.rewrites.drop import Drop, Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab


@rewrite("merge", on=Kind.BLOCK, status="stable")
@dataclass(frozen=True, kw_only=True)
class Merge:
    """Let the first block of a run of neighbours stand for all: its maps become a weighted mean of theirs.

    `weights`: one number for each block of the step, as they are (they need not add up to 1); none: an even mean. What
    is no linear map (norms) stays the first block's. Experts count as maps. The others are dropped. A method that
    makes the maps otherwise says so by `combined`.
    """

    card: ClassVar[Card]
    removes: ClassVar[bool] = True

    weights: tuple[float, ...] = ()

    def combined(self, maps: Sequence[Tensor]) -> Tensor:
        """The weights that stand for those of all blocks of the run, given in depth order; float64."""
        import torch

        shares = self.weights or (1 / len(maps),) * len(maps)
        return sum((s * m for s, m in zip(shares, maps, strict=True)), start=torch.zeros_like(maps[0]))

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        blocks = {s.id: s for s in anatomy.of_kind(Kind.BLOCK)}
        problems = [Problem(s, "the model has no such block") for s in step.sites if s not in blocks]
        if problems or len(step.sites) < 2:
            return problems or [Problem(self.card.name, "merging takes two blocks at least")]
        if self.weights and len(self.weights) != len(step.sites):
            return [Problem(self.card.name, f"there are {len(self.weights)} weights for {len(step.sites)} blocks")]
        order = [b.site.id for b in anatomy.stack(step.sites[0]).blocks]
        places = [order.index(s) for s in step.sites if s in order]
        if places != list(range(places[0], places[0] + len(step.sites))):
            return [Problem(step.sites[0], "the blocks are no run of neighbours, in order", "name block.3, block.4, …")]
        shapes = [_shapes(anatomy, s) for s in step.sites]
        if held := tied(anatomy, step.sites):
            return [Problem(held[0], "it shares its weights with another block", "merge other blocks")]
        odd = [s for s, found in zip(step.sites, shapes, strict=True) if found != shapes[0]]
        if odd or not shapes[0]:
            return [Problem((odd or step.sites)[0], f"its maps are not those of {step.sites[0]}", "merge other blocks")]
        return Drop().check(_rest(step), anatomy)

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        return Drop().forecast(_rest(step), anatomy)

    def drops(self, step: Step) -> tuple[str, ...]:
        """The sites that go once `prepare` has been done."""
        return step.sites[1:]

    def prepare(self, step: Step, lab: Lab) -> None:
        """Write the maps of the block that stays."""
        import torch

        modules = [lab.model.get_submodule(lab.anatomy.site(s).path) for s in step.sites]
        with torch.no_grad():
            for name in _shapes(lab.anatomy, step.sites[0]):
                maps = [m.get_parameter(name).double() for m in modules]
                modules[0].get_parameter(name).copy_(self.combined(maps))

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Merge and drop, in `lab.model`. Raises UnsupportedError for the first problem, before anything is changed."""
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        self.prepare(step, lab)
        done = Drop().apply(_rest(step), lab)
        return replace(done, rewrite=self.card.name, sites=step.sites, options=step.options)

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @classmethod
    def examples(cls, anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: two runs of neighbours that are built alike."""
        blocks = [b.site.id for b in anatomy.stacks[0].blocks]
        runs = (blocks[1:3], blocks[1:4])
        steps: list[Any] = [Step(rewrite=cls.card.name, sites=tuple(r)) for r in runs]
        return tuple(s for s in steps if not cls().check(s, anatomy))


def _rest(step: Step) -> Step:
    """The drop of all blocks but the first."""
    return Step(rewrite="drop", sites=step.sites[1:])


def tied(anatomy: Anatomy, blocks: Iterable[str]) -> list[str]:
    """Those of the blocks that share a parameter with another: what is written into one would change the other."""
    uses = Counter(id(p) for _, p in anatomy.model.named_parameters(remove_duplicate=False))
    modules = {b: anatomy.model.get_submodule(anatomy.site(b).path) for b in blocks}
    return [b for b, m in modules.items() if any(uses[id(p)] > 1 for p in m.parameters())]


def _shapes(anatomy: Anatomy, block: str) -> dict[str, tuple[int, ...]]:
    """Name inside the block → shape of the parameters that are matrices, or stacks of them."""
    named = anatomy.model.get_submodule(anatomy.site(block).path).named_parameters()
    return {name: tuple(p.shape) for name, p in named if p.ndim > 1}
