"""FlattenGPT: neighbouring blocks side by side as one, which then loses width instead of the network depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.errors import UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Cost, Kind
from lamina.rewrites.drop import Drop, Problem

if TYPE_CHECKING:
    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block
    from lamina.lab import Lab
    from lamina.rewrites._flat import Sublayer

PAPER = Paper(
    key="xu2026flattengpt",
    title="FlattenGPT: Depth Compression for Transformer with Layer Flattening",
    authors=("Ruihan Xu", "Qingpei Guo", "Yao Zhu", "Xiangyang Ji", "Ming Yang", "Shiliang Zhang"),
    year=2026,
    arxiv="2602.08858",
)


@rewrite(
    "flatten",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.FORWARD,
    deviations=(
        "which blocks become one is the plan's; the paper joins the most alike by the cosine of their inputs",
        "a head's score is one norm over the whole text, and heads that share keys and values go together",
        "each sublayer is measured in the network as it is flattened so far, attentions before MLPs",
        "without the training that may follow",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Flatten:
    """Each `of` neighbours become one block: their attentions read what enters the first, then so do their MLPs.

    Heads and neurons of all stand side by side, with the norms' gains and biases in the maps. `options["width"]`, one
    number or one for each site, says how many times as wide as one block that is: 1, the default, prunes it to the
    shape of the others, so that the checkpoint is a plain one; `of` prunes nothing. Heads stay by ‖softmax(·) X W_V
    diag(W_O W_Oᵀ)^½‖; neurons by the ridge leverage diag C (C + λ)⁻¹ of their outputs' second moment C, λ `ridge`
    times C's mean singular value, and those that stay make up for the others by ridge regression with this λ.
    Blocks behind it get other numbers: steps that name these belong in a plan of their own.
    """

    card: ClassVar[Card]
    removes: ClassVar[bool] = True
    each: ClassVar[tuple[str, ...]] = ("width",)
    """Options that may differ from site to site."""

    of: int = 2
    ridge: float = 10.0

    def __post_init__(self) -> None:
        if self.of < 2:
            raise ValueError(f"of is at least 2, not {self.of}")
        if self.ridge <= 0:
            raise ValueError(f"ridge is above 0, not {self.ridge:g}")

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights, and where there are some looks at what the blocks compute."""
        return self._unfit(step, anatomy) or self._trials(step, anatomy)

    def _unfit(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What shows without running a block."""
        from lamina.rewrites._flat_step import unfit

        blocks = {b.site.id for k in anatomy.stacks for b in k.blocks}
        problems = [Problem(s, "the model has no such block") for s in step.sites if s not in blocks]
        if problems or not step.sites or len(step.sites) % self.of or len(set(step.sites)) < len(step.sites):
            return problems or [Problem(self.card.name, f"the step names no runs of {self.of} blocks")]
        for sites in self._groups(step):
            if not 0 < self._width(step, sites[0]) <= self.of:
                return [Problem(sites[0], f"its width is above 0 and at most {self.of}", "options: {width: 1}")]
            problems += unfit(anatomy, sites)
        return problems or Drop().check(self.rest(step), anatomy)

    def _groups(self, step: Step) -> list[tuple[str, ...]]:
        return [step.sites[n : n + self.of] for n in range(0, len(step.sites), self.of)]

    def rest(self, step: Step) -> Step:
        """The drop of all blocks but the first of each run."""
        return Step(rewrite="drop", sites=tuple(s for sites in self._groups(step) for s in sites[1:]))

    def _width(self, step: Step, site: str) -> float:
        given = step.options.get("width", 1)
        return float(given.get(site, 1) if isinstance(given, Mapping) else given)

    def runs(self, step: Step, anatomy: Anatomy) -> Iterator[tuple[list[Block], list[Sublayer]]]:
        """The blocks of each run, and their sublayers."""
        from lamina.rewrites._flat import sublayers

        for sites in self._groups(step):
            blocks = [anatomy.block(s) for s in sites]
            parts = sublayers(anatomy, blocks, self._width(step, sites[0]))
            if parts is None:
                raise UnsupportedError("not all of its sublayers have units", where=sites[0])
            yield blocks, parts

    def _trials(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What shows where the blocks run."""
        if next(anatomy.model.parameters()).is_meta:
            return []
        from lamina.rewrites._flat_step import Change

        try:
            Change(self, step, anatomy)
        except UnsupportedError as error:
            return [Problem(error.where or step.sites[0], error.what, error.hint or "")]
        return []

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        from lamina.rewrites._wide import growth

        total = Drop().forecast(self.rest(step), anatomy)
        for _, parts in self.runs(step, anatomy):
            total += sum((growth(anatomy, p.units[0], p.count) for p in parts), Cost())
        return total

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Flatten in `lab.model`. Raises UnsupportedError for the first problem, before anything is changed."""
        for problem in self._unfit(step, lab.anatomy):
            raise problem.error()
        from lamina.rewrites._flat_step import Change, fill
        from lamina.rewrites._wide import said_by_config
        from lamina.rewrites.structure import replay

        change = Change(self, step, lab.anatomy)
        before, after = lab.anatomy.total(), self.forecast(step, lab.anatomy)
        change.choose(lab)
        filled, steps = change.tensors(), change.steps()
        receipt = Receipt(rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
                          structure={"steps": steps})  # fmt: skip
        self.replay(receipt, lab.model)
        fill(filled)
        if said := said_by_config(lab.model, change.numbers):
            replay(lab.model, [said])
            steps.append(said)
        lab.renew()
        return receipt

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @classmethod
    def examples(cls, anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: a pair pruned to one block's shape; two pairs of other widths."""
        blocks = [b.site.id for b in anatomy.stacks[0].blocks]
        wide: Any = {blocks[0]: 2, blocks[2]: 1.5}
        steps = [
            Step(rewrite=cls.card.name, sites=tuple(blocks[1:3])),
            Step(rewrite=cls.card.name, sites=tuple(blocks[:4]), options={"width": wide}),
        ]
        return () if cls().check(steps[1], anatomy) else tuple(steps)
