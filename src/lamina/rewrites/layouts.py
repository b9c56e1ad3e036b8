"""Layouts: the same sublayers at the same cost, which read the stream as it was earlier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.errors import UnsupportedError
from lamina.core.papers import Card
from lamina.core.registry import rewrite
from lamina.core.sites import Cost, Kind
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block, Branch
    from lamina.lab import Lab

NEAR = {"torch.float64": 1e-9, "torch.float32": 1e-4}
"""How far what a sublayer reads may be from the stream, relative to it; of other types 2e-2."""


@rewrite("parallel", on=Kind.BLOCK)
@dataclass(frozen=True, kw_only=True)
class Parallel:
    """All sublayers of a block read what enters it, as in PaLM's blocks: the MLP no longer waits for the attention.

    x + A(n₁(x)) + M(n₂(x)) in the place of h + M(n₂(h)), h = x + A(n₁(x)). Parameters, products and cache are the
    same; what it gains is latency, where both run at once. It changes what the network computes: heal it.
    """

    card: ClassVar[Card]

    def seen(self, number: int) -> int:
        """How many of the block's sublayers have joined the stream that sublayer `number` reads; -1: one less than
        have joined where the block begins.
        """
        return 0

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        blocks = {b.site.id: b for k in anatomy.stacks for b in k.blocks}
        problems = [] if step.sites else [Problem(self.card.name, "the step names no block")]
        problems += [Problem(s, "the model has no such block") for s in step.sites if s not in blocks]
        touched = [b for s in step.sites for b in self.touched(anatomy, s)] if not problems else []
        for block in {b.path: b for b in touched}.values():
            what = _unfit(block)
            if what or len(block.branches) < self.least:
                problems.append(Problem(block.site.id, what or "it has one sublayer alone", "name other blocks"))
        if not problems and not next(anatomy.model.parameters()).is_meta:
            try:
                self.layout(step, anatomy)
            except UnsupportedError as error:
                problems.append(Problem(error.where or "", error.what, error.hint or ""))
        return problems

    least: ClassVar[int] = 2
    """Sublayers that a block must have."""

    def touched(self, anatomy: Anatomy, site: str) -> list[Block]:
        """The blocks that the layout of one block concerns."""
        return [anatomy.block(site)]

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """The same as before."""
        return anatomy.total()

    def layout(self, step: Step, anatomy: Anatomy) -> dict[str, dict[str, Any]]:
        """Path → how the block is laid out, for `lamina_layouts`. Runs the model once on the anatomy's sample."""
        blocks = [anatomy.block(s) for s in step.sites]
        found = readers(anatomy, blocks)
        return {b.path: laid_out(b, found, self.seen) for b in blocks}

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Lay the blocks out anew. Raises UnsupportedError for the first problem, before anything is changed.

        The new model's anatomy must tell that each sublayer reads what it should.
        """
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        total, made = lab.anatomy.total(), self.layout(step, lab.anatomy)
        receipt = Receipt(
            rewrite=self.card.name, sites=step.sites, before=total, after=total, options=step.options,
            structure={"steps": [{"format": 1, "kind": "layout", "modules": made}]},
        )  # fmt: skip
        self.replay(receipt, lab.model)
        lab.renew()
        for site in step.sites:
            for number, branch in enumerate(lab.anatomy.block(site).branches):
                if len(branch.reads) != max(self.seen(number), 0):
                    raise UnsupportedError("it reads the stream in other places too", where=branch.site.id)
        return receipt

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @classmethod
    def examples(cls, anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: one block, the first and its neighbour, the last two."""
        blocks = [b.site.id for b in anatomy.stacks[0].blocks]
        runs = (blocks[1:2], blocks[:2], blocks[-2:])
        steps: list[Any] = [Step(rewrite=cls.card.name, sites=tuple(r)) for r in runs]
        return tuple(s for s in steps if not cls().check(s, anatomy))


def _unfit(block: Block) -> str:
    """Why the sublayers of a block can't read elsewhere; '' where they can."""
    if not block.plain or block.turns > 1:
        return "it does more to the stream than to add what its sublayers make"
    if len(block.branches) > 1 and any(len(x.reads) < n for n, x in enumerate(block.branches)):
        return "its sublayers read an earlier stream already"
    if any(x.joins or x.way or x.bound or x.mutated or x.outlet_call is not None for x in block.branches):
        return "what a sublayer adds is made in the block itself"
    return ""


def readers(anatomy: Anatomy, blocks: Sequence[Block]) -> dict[str, list[list[Any]]]:
    """Sublayer → the modules that take the stream for it: [path in the block, position or keyword].

    From a run on the anatomy's sample. Raises UnsupportedError where a sublayer has none.
    """
    from lamina.anatomy.stacks import call, evaluating
    from lamina.anatomy.watch import watch_blocks

    met: dict[str, dict[tuple[str, int | str], Tensor]] = {}
    found: dict[str, list[list[Any]]] = {}
    wanted = {b.path: b for b in blocks}

    def watcher(block: Block, entering: Tensor, added: Mapping[str, Tensor], leaving: Tensor) -> None:
        for branch in block.branches if block.path in wanted else ():
            reads = [added[block.branches[n].site.id] for n in branch.reads]
            stream = sum(reads, start=entering)
            near = NEAR.get(str(stream.dtype), 2e-2) * float(stream.float().norm())
            found[branch.site.id] = [
                [path, place]
                for (path, place), taken in met[branch.site.id].items()
                if taken.shape == stream.shape and float((taken - stream).float().norm()) <= near
            ]

    handles = []
    for block in blocks:
        for branch in block.branches:
            handles += _listening(anatomy, block, branch, met.setdefault(branch.site.id, {}))
    try:
        with evaluating(anatomy.model), watch_blocks(anatomy.model, anatomy, watcher, sampled=True):
            call(anatomy.model, anatomy.sample)
    finally:
        for handle in handles:
            handle.remove()
    for site in (s for s, modules in found.items() if not modules):
        raise UnsupportedError("no module of its own takes the stream", where=site, hint="leave its block as it is")
    return found


def _listening(anatomy: Anatomy, block: Block, branch: Branch, met: dict[tuple[str, int | str], Tensor]) -> list[Any]:
    """Hooks that note what the core and the own modules of a sublayer take."""
    handles = []
    for path in (*branch.own, branch.core):
        place = branch.stream if path == branch.core else 0

        def note(_: nn.Module, args: Any, kwargs: Any, path: str = path, place: int | str = place) -> None:
            given = {**dict(enumerate(args)), **kwargs}
            if place in given:
                met[path, place] = given[place].detach().clone()

        module = anatomy.model.get_submodule(f"{block.path}.{path}")
        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    return handles


def laid_out(block: Block, found: Mapping[str, list[list[Any]]], seen: Any) -> dict[str, Any]:
    """How a block is laid out, where sublayer `number` reads the stream that `seen(number)` of them have joined."""
    sublayers = []
    for number, branch in enumerate(block.branches):
        moved = seen(number) != number
        outlet = [branch.outlet, branch.outlet_index, branch.scale]
        sublayers.append({
            "outlet": outlet, "reads": found[branch.site.id] if moved else [], "seen": seen(number),
        })  # fmt: skip
    returns = [list(r) for r in block.returns]
    return {"way": "early", "stream": block.stream, "returns": returns, "sublayers": sublayers}
