"""FuseGPT: a block matters by how far the last block's output turns when it is gone; its neighbours take it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, rewrite
from lamina.core.sites import Cost, Kind
from lamina.rewrites.drop import Drop, Problem
from lamina.rewrites.merge import tied

if TYPE_CHECKING:
    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.per_trial import PerTrial

PAPER = Paper(
    key="pei2024fusegpt",
    title="FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers",
    authors=("Zehua Pei", "Hui-Ling Zhen", "Xianzhi Yu", "Sinno Jialin Pan", "Mingxuan Yuan", "Bei Yu"),
    year=2024,
    arxiv="2411.14507",
)


@measure(
    "macro-influence",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.ABLATION,
    status="stable",
    deviations=("in a model of several stacks, the last block is that of the block's own stack",),
)
@dataclass(frozen=True, kw_only=True)
class MacroInfluence:
    """Keep blocks whose absence turns the end: 1 - cos of the last block's outputs with and without the block.

    The mean over tokens, before the final norm.
    """

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy) -> PerTrial:
        """Token means, from the shared sweep."""
        from lamina.lab.per_trial import PerTrial, over_states, turned

        return PerTrial(self.card.name, self.card.on, lambda trial: over_states(trial, trial.blocks[-1], turned))

    def measure(self, lab: Lab) -> Scores:
        """One partial forward per block."""
        return lab.sweep([self.tally(lab.anatomy)])[0]


FORMS = ("low-rank", "full", "rows")
LOSSES = ("features", "sequences", "squares")
GROUP = 8
"""Blocks of a group, where a step tells none."""


@rewrite(
    "fusegpt",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.GRADIENT,
    deviations=(
        "which blocks go, and in which order, is the plan's: the paper measures macro-influence anew after each",
        "the loss compares softmaxes over a token's features; the code's, over the sequences of a batch, is "
        "loss=sequences",
        "each fusion is folded before the next, so that coefficients of earlier ones are not learnt again",
        "stacks of experts are fused as maps are",
    ),
)
@dataclass(frozen=True, kw_only=True)
class FuseGpt:
    """Fuse blocks, one after the other, into their neighbours, and drop them: W_j + B_j A_j + C_j ∘ W_fused.

    `group` blocks, the fused one among them (one number, or one for each site), learn to give what they gave with it:
    A, B and C of every map (biases: C alone), for `epochs` passes over the text by Adam, with rates `rate` and, for C,
    `coefficient_rate`, that fall to 0 on a cosine. `form` of C: "low-rank", two factors of rank `rank` as A and B have;
    "full"; "rows", a number for each output. `loss`: KL of softmaxes over "features" or over a batch's "sequences", or
    mean "squares". The weights are then plain ones: the checkpoint is one of fewer blocks. `epochs` = 0 is a drop.
    """

    card: ClassVar[Card]
    each: ClassVar[tuple[str, ...]] = ("group",)
    removes: ClassVar[bool] = True

    group: int | Mapping[str, int | None] = GROUP
    rank: int = 128
    form: str = "low-rank"
    epochs: int = 20
    rate: float = 9.65e-6
    coefficient_rate: float = 1e-3
    loss: str = "features"

    def __post_init__(self) -> None:
        for size in self.group.values() if isinstance(self.group, Mapping) else [self.group]:
            if size is not None and size < 2:
                raise ValueError(f"group must be at least 2, not {size}")
        for name, least in (("rank", 1), ("epochs", 0), ("rate", 0), ("coefficient_rate", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name, known in (("form", FORMS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        blocks = {b.site.id for k in anatomy.stacks for b in k.blocks}
        problems = [Problem(s, "the model has no such block") for s in step.sites if s not in blocks]
        if len(set(step.sites)) < len(step.sites):
            problems.append(Problem(self.card.name, "the step names a block twice"))
        for site in step.sites if not problems else ():
            stack = anatomy.stack(site)
            if not stack.linked or stack.looped or stack.carries:
                problems.append(Problem(site, "its stack's blocks hand on more, or less, than their stream", "drop it"))
            elif held := tied(anatomy, [b.site.id for b in stack.blocks]):
                problems.append(Problem(held[0], "it shares its weights with another block", "drop it"))
        return problems or Drop().check(step, anatomy)

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        return Drop().forecast(step, anatomy)

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Fuse and drop, in `lab.model`. Raises UnsupportedError for the first problem, before anything is changed."""
        from lamina.rewrites._fusion import Training, fuse

        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        how = Training(
            rank=self.rank, form=self.form, epochs=self.epochs, rate=self.rate,
            coefficient_rate=self.coefficient_rate, loss=self.loss,
        )  # fmt: skip
        if self.epochs:
            sizes = self.group if isinstance(self.group, Mapping) else dict.fromkeys(step.sites, self.group)
            fuse(lab, {s: sizes.get(s) or GROUP for s in step.sites}, how)
        done = Drop().apply(Step(rewrite="drop", sites=step.sites), lab)
        return replace(done, rewrite=self.card.name, sites=step.sites, options=step.options)

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        Drop().replay(receipt, skeleton, anatomy)

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: one block in the middle, and two in turn, the last one first."""
        blocks = [b.site.id for b in anatomy.stacks[0].blocks]
        steps = (Step(rewrite="fusegpt", sites=s) for s in ((blocks[2],), (blocks[-1], blocks[1])))
        return tuple(s for s in steps if not FuseGpt().check(s, anatomy))
