"""What flattening does to a model: which blocks fit, tensors and structure, found before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lamina.core.documents import Step
from lamina.core.errors import UnsupportedError
from lamina.core.sites import Kind
from lamina.rewrites._flat import Sublayer, choose, columns
from lamina.rewrites._wide import expect_alike, folded, joined, recorded, resized, tail_of, ties_of, whole
from lamina.rewrites.drop import Problem, stack_sites, structure

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block
    from lamina.lab import Lab


class Flattening(Protocol):
    """What is asked of the method."""

    @property
    def ridge(self) -> float:
        """λ over the mean singular value."""
        ...

    def rest(self, step: Step) -> Step:
        """The drop of all blocks but the first of each run."""
        ...

    def runs(self, step: Step, anatomy: Anatomy) -> Iterator[tuple[list[Block], list[Sublayer]]]:
        """The blocks of each run, and their sublayers."""
        ...


def unfit(anatomy: Anatomy, sites: tuple[str, ...]) -> list[Problem]:
    """Why a run of blocks can't stand side by side, as far as it shows without running them."""
    stack, blocks = anatomy.stack(sites[0]), [anatomy.block(s) for s in sites]
    order = [b.site.id for b in stack.blocks]
    first = order.index(sites[0])
    if order[first : first + len(sites)] != list(sites) or stack.looped or not stack.linked:
        return [Problem(sites[0], "the blocks are no run of neighbours, in order", "name block.3, block.4, …")]
    for block in blocks:
        if not block.plain or block.tells or any(x.joins or x.way for x in block.branches):
            return [Problem(block.site.id, "it does more to the stream than to add what its sublayers make")]
        if [(x.site.kind, x.core, x.reads, x.scale) for x in block.branches] != [
            (x.site.kind, x.core, x.reads, x.scale) for x in blocks[0].branches
        ]:
            return [Problem(block.site.id, f"it is not built like {sites[0]}")]
    odd = [x.site.id for b in blocks for x in b.branches if not x.tail or x.site.kind not in (Kind.ATTENTION, Kind.MLP)]
    return [Problem(s, "it is no attention or MLP that ends in a linear map", "flatten other blocks") for s in odd]


class Change:
    """What a step does to a model; everything is found before anything is changed."""

    def __init__(self, how: Flattening, step: Step, anatomy: Anatomy) -> None:
        self.how, self.step, self.anatomy = how, step, anatomy
        self.runs = list(how.runs(step, anatomy))
        self.seen, self.sizes = [], list[dict[str, dict[str, Any]]]()
        self.numbers: list[tuple[int, int]] = []
        for blocks, parts in self.runs:
            seen = recorded(anatomy, blocks)
            expect_alike(anatomy, blocks, seen)
            self.seen.append(seen)
            for part in parts:
                site = part.units[0]
                if part.count != site.width:
                    self.sizes.append(resized(anatomy, site, part.count, seen.given[blocks[0].path]))
                    inner = anatomy.grouped(site)[1]
                    self.numbers += [(site.width, part.count), (site.width * inner, part.count * inner)]
        for number in range(len(self.runs)):
            self._tensors(number, [p.all for p in self.runs[number][1]])

    def choose(self, lab: Lab) -> None:
        """Which units stay, and the last maps; looks at the text where some go."""
        for place, stack in enumerate(self.anatomy.stacks):
            mine = [r for r in self.runs if r[0][0] in stack.blocks]
            if any(p.count < len(p.all) for _, parts in mine for p in parts):
                choose(lab, place, mine, self.how.ridge)
        for part in (p for _, parts in self.runs for p in parts):
            part.kept = part.kept or part.all

    def tensors(self) -> dict[nn.Module, dict[str, Tensor]]:
        """The first block of each run → its parameters as they will be, float64."""
        modules = [self.anatomy.model.get_submodule(blocks[0].path) for blocks, _ in self.runs]
        kept = [[p.kept for p in parts] for _, parts in self.runs]
        return {m: self._tensors(n, k) for n, (m, k) in enumerate(zip(modules, kept, strict=True))}

    def _tensors(self, number: int, kept: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
        """A flattened block's parameters. Raises UnsupportedError where one is neither a unit's nor alike in all."""
        blocks, parts = self.runs[number]
        modules = [self.anatomy.model.get_submodule(b.path) for b in blocks]
        readers = self.seen[number].readers
        own = [folded(m, readers[b.path], dict(m.named_parameters())) for m, b in zip(modules, blocks, strict=True)]
        made, summed = dict(own[0]), set[str]()
        for part, chosen in zip(parts, kept, strict=True):
            ties = ties_of(self.anatomy, part.units[0])
            if not whole(own[0], part.units[0], ties):
                raise UnsupportedError("its units do not make up its maps", where=part.units[0].id)
            made |= joined(own, ties, chosen)
            tail = tail_of(self.anatomy, part.units[0])[0].removeprefix(f"{blocks[0].path}.")
            if part.weight is not None:
                rows = part.weight[:, columns(self.anatomy, part, chosen)]
                made[f"{tail}.weight"] = rows if isinstance(modules[0].get_submodule(tail), nn.Linear) else rows.T
            if f"{tail}.bias" in made:
                made[f"{tail}.bias"] = sum((o[f"{tail}.bias"] for o in own[1:]), start=own[0][f"{tail}.bias"])
            summed |= {t.param for t in ties} | {f"{tail}.bias"}
        for name in (n for n in made if n not in summed):
            if any(bool((o[name] != made[name]).any()) for o in own[1:]):
                what = f"{name} serves all units of a block, and is another one in each"
                raise UnsupportedError(what, where=blocks[0].site.id, hint="flatten other blocks")
        return made

    def steps(self) -> list[dict[str, Any]]:
        """How the structure changes: tensors of other shapes, the numbers that follow, then the drop."""
        steps: list[dict[str, Any]] = []
        for number, (blocks, parts) in enumerate(self.runs):
            module = self.anatomy.model.get_submodule(blocks[0].path)
            made = self._tensors(number, [p.kept for p in parts])
            wide = {f"{blocks[0].path}.{n}": list(t.shape) for n, t in made.items()
                    if t.shape != module.get_parameter(n).shape}  # fmt: skip
            steps += [{"format": 1, "kind": "resize", "shapes": wide}] if wide else []
        steps += [{"format": 1, "kind": "narrow", "cuts": {}, **s} for s in self.sizes]
        gone = self.anatomy.expand(self.how.rest(self.step).sites)
        return steps + [
            structure(self.anatomy, k, gone) for k in self.anatomy.stacks if stack_sites(self.anatomy, k, gone)
        ]


def fill(made: Mapping[nn.Module, Mapping[str, Tensor]]) -> None:
    """Write what `tensors` gave, with the modules' own types."""
    with torch.no_grad():
        for module, tensors in made.items():
            for name, tensor in tensors.items():
                module.get_parameter(name).copy_(tensor)
