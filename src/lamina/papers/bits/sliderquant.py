"""SliderQuant: rounding is learnt in windows of blocks that grow at the first, slide, and shrink at the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.documents import Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Kind
from lamina.rewrites.drop import Problem
from lamina.rewrites.quantise import Quantise, examples, grid_of

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block
    from lamina.lab import Lab

PAPER = Paper(
    key="wang2026sliderquant",
    title="SliderQuant: Accurate Post-Training Quantization for LLMs",
    authors=("Shigeng Wang", "Chao Li", "Yangyuxuan Kang", "Jiawei Fan", "Zhonghong Ou", "Anbang Yao"),
    year=2026,
    arxiv="2603.25284",
)
SHARES = (0.5, 1.0)
"""Of each map's inputs, which are rounded in the first and in the second slide."""
RATES = (5e-4, 1e-2)
"""Of the factors and of the clips, per sequence of a batch."""


@rewrite(
    "sliderquant",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.GRADIENT,
    deviations=(
        "weights alone are rounded, as in W2A16; scales of channels, for rounded activations, are not learnt",
        "grids are GGUF's: one clip for each 32 inputs, where the code has one for either end of a row's range",
        "ten epochs, the paper runs sixty at 2 bits; batches come in their order, each window with its own optimiser",
        "in stacks of fewer than seven blocks the growing and shrinking windows are at most half of them long",
    ),
)
@dataclass(frozen=True, kw_only=True)
class SliderQuant(Quantise):
    """Maps on a grid with learnt clips and a learnt correction of rank `rank` merged in before rounding.

    Least squared difference of a window's output, given the stream of what is rounded before it, from the dense
    network's own. First half of the inputs are rounded, then all; `epochs` is for both. `fill` blocks are the longest
    windows at both ends; in between windows have two blocks and move by one.
    """

    card: ClassVar[Card]

    epochs: int = 10
    rank: int = 4
    fill: int = 4

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("rank", 1), ("fill", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        from lamina.maths.grids import Grid

        problems = super().check(step, anatomy)
        long = [s for s in step.sites if not problems and not isinstance(grid_of(step, s), Grid)]
        problems += [Problem(s, "no clip is learnt for the runs of a type _K", "use gptq, or Q4_1") for s in long]
        for stack in anatomy.stacks if not problems else ():
            sites = [s for s in step.sites if any(_inside(anatomy, s, b) for b in stack.blocks)]
            if sites and (not stack.linked or stack.looped):
                what = "its blocks don't hand their stream on, so no window slides over them"
                problems.append(Problem(sites[0], what, "use gptq"))
        weights = [id(anatomy.model.get_submodule(anatomy.site(s).path).weight) for s in step.sites if not problems]
        if len(set(weights)) < len(weights):
            problems.append(Problem(step.rewrite, "maps share their weights", "use gptq"))
        return problems

    def made(self, step: Step, lab: Lab, sites: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Learn each stack's maps, then round them."""
        import torch

        from lamina.maths.grids import Grid
        from lamina.rewrites._windows import Learnt, Windows, learn

        anatomy, generator = lab.anatomy, torch.Generator().manual_seed(lab.seed)
        grids = {s: grid for s in sites if isinstance(grid := grid_of(step, s), Grid)}
        maps = {
            s: Learnt(lab.model.get_submodule(anatomy.site(s).path), grid, self.rank, generator)
            for s, grid in grids.items()
        }
        for place, stack in enumerate(anatomy.stacks):
            inside = [
                {anatomy.site(s).path.removeprefix(f"{b.path}."): m for s, m in maps.items() if _inside(anatomy, s, b)}
                for b in stack.blocks
            ]
            windows = [w for w in slides(len(stack.blocks), self.fill) if any(inside[n] for n in w)]
            if windows:
                learn(Windows(lab, inside, place), windows, SHARES, self.epochs, RATES, lab.progress)
        for site, found in maps.items():
            yield site, found.made().detach()

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries."""
        return examples("sliderquant", anatomy)


def _inside(anatomy: Anatomy, site: str, block: Block) -> bool:
    return anatomy.site(site).path.startswith(f"{block.path}.")


def slides(depth: int, fill: int) -> list[range]:
    """The windows: blocks 0, 0-1, … up to `fill` blocks; pairs that move by one; the last `fill` blocks, … the last."""
    fill = min(fill, (depth + 1) // 2)
    first, last = fill - 1, depth - fill + 1
    growing = [range(n + 1) for n in range(fill)]
    pairs = [range(n, n + 2) for n in range(first, last - 1)]
    return [*growing, *pairs, *(range(n, depth) for n in range(depth - fill, depth))]
