"""Ladder Residual: every sublayer reads the stream without what the one before it added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Step
from lamina.core.papers import Card, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Kind
from lamina.rewrites.drop import Problem
from lamina.rewrites.layouts import Parallel, laid_out, readers

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block

PAPER = Paper(
    key="zhang2025ladder",
    title="Ladder-residual: parallelism-aware architecture for accelerating large model inference with communication "
    "overlapping",
    authors=(
        "Muru Zhang",
        "Mayank Mishra",
        "Zhongzhu Zhou",
        "William Brandon",
        "Jue Wang",
        "Yoon Kim",
        "Jonathan Ragan-Kelley",
        "Shuaiwen Leon Song",
        "Ben Athiwaratkun",
        "Tri Dao",
    ),
    year=2025,
    arxiv="2501.06589",
)


@rewrite(
    "ladder",
    PAPER,
    on=Kind.BLOCK,
    deviations=(
        "the layout alone: no tensor parallelism, and no overlap of its sums with the next sublayer",
        "without training; the paper trains a converted model on 3B tokens",
        "the first sublayer of a block subtracts what the block before added last, and does not get two streams",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Ladder(Parallel):
    """x_i = x_{i-1} + f_i(x_{i-2}) for all sublayers f_i of the step's blocks; x_{-1} = x_0 at the first block.

    Parameters, products and cache are the same; what it gains is latency, where a sublayer's sum over devices runs
    while the next sublayer does. It changes what the network computes: heal it. A block before those of the step only
    hands on what it added last; if it is dropped later, nothing is left out behind it.
    """

    card: ClassVar[Card]
    least: ClassVar[int] = 1

    def seen(self, number: int) -> int:
        """All but the sublayer before."""
        return number - 1

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        known = {b.site.id for k in anatomy.stacks for b in k.blocks}
        apart = [s for s in step.sites if s in known and not anatomy.stack(s).linked]
        what = "between its stack's blocks something else happens to the stream"
        return [Problem(s, what) for s in apart] or super().check(step, anatomy)

    def touched(self, anatomy: Anatomy, site: str) -> list[Block]:
        """The block, and the one before it."""
        before = _before(anatomy, site)
        told = before is not None and hasattr(anatomy.model.get_submodule(before.path), "lamina_layout")
        return [anatomy.block(site)] if before is None or told else [before, anatomy.block(site)]

    def layout(self, step: Step, anatomy: Anatomy) -> dict[str, dict[str, Any]]:
        """Path → how the block is laid out, for `lamina_layouts`. Runs the model once on the anatomy's sample."""
        blocks = {s: anatomy.block(s) for s in step.sites}
        found = readers(anatomy, list(blocks.values()))
        made = {b.path: laid_out(b, found, self.seen) for b in blocks.values()}
        for site, block in blocks.items():
            before = _before(anatomy, site)
            if before is None:
                continue
            if not hasattr(anatomy.model.get_submodule(before.path), "lamina_layout"):
                made.setdefault(before.path, laid_out(before, {}, lambda number: number))
            made.setdefault(before.path, {"way": "early"})["tells"] = before.path
            made[block.path]["behind"] = before.path
        return made


def _before(anatomy: Anatomy, site: str) -> Block | None:
    """The block before one, in its stack."""
    blocks = anatomy.stack(site).blocks
    place = next(n for n, b in enumerate(blocks) if b.site.id == site)
    return blocks[place - 1] if place else None
