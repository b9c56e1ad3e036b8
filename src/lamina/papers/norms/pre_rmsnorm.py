"""Pre-RMSNorm: a stream without a mean needs norms that take none away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.errors import UnsupportedError
from lamina.core.papers import Card, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Cost, Kind
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Stack
    from lamina.lab import Lab

PAPER = Paper(
    key="jiang2023prermsnorm",
    title="Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers",
    authors=("Zixuan Jiang", "Jiaqi Gu", "Hanqing Zhu", "David Z. Pan"),
    year=2023,
    arxiv="2305.14858",
)


@rewrite(
    "rms-norm",
    PAPER,
    on=Kind.BLOCK,
    deviations=(
        "the norms keep their gains and biases, which the paper folds into the maps that read them",
        "no CRMSNorm: the stream keeps all its channels",
        "an embedding whose weights serve the head too is centred as it is read, and not in its weights",
    ),
)
@dataclass(frozen=True, kw_only=True)
class RmsNorm:
    """LayerNorms of the stream become x / √(mean x² + eps) · g + b, and all that writes to the stream loses its mean.

    The network computes the same, to rounding: every reader took the stream's mean away. The step names all blocks of
    the model's one stack. Refused where a norm keeps the mean, or something else than linear maps and embeddings
    writes.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_refuses_unknown_sites": "the norms of the tiny llama take no mean away: there is no step to vary",
    }

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights, and where there are some looks at what they do to the sample."""
        blocks = [b.site.id for k in anatomy.stacks for b in k.blocks]
        unknown = [Problem(s, "the model has no such block") for s in step.sites if s not in blocks]
        if unknown or not step.sites:
            return unknown or [Problem(self.card.name, "the step names no block")]
        stack, *others = anatomy.stacks
        if others:
            return [Problem(self.card.name, "the model has several streams, which may feed each other")]
        if set(blocks) - set(step.sites):
            what = "norms of one stream lose the mean together"
            return [Problem(self.card.name, what, "name all blocks of the model")]
        problems = _structure(anatomy, stack)
        if not problems and not next(anatomy.model.parameters()).is_meta:
            from lamina.rewrites._centre import writers

            try:
                writers(anatomy)
            except UnsupportedError as error:
                problems.append(Problem(error.where or "", error.what, error.hint or ""))
        return problems

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """The same as before: gains and biases stay."""
        return anatomy.total()

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Centre what writes and put the other norms in. Raises UnsupportedError before anything is changed.

        Also, when the model is spoilt, where it then answers otherwise on the anatomy's sample.
        """
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        from lamina.rewrites._centre import answers, centre, expect_close, writers
        from lamina.rewrites._norms import norm_of

        total, before, found = lab.anatomy.total(), answers(lab.anatomy), writers(lab.anatomy)
        held = {path: lab.model.get_submodule(path) for path in found.norms}
        made = {path: (norm, norm.gain(held[path]), norm.shift(held[path]))
                for path in held if (norm := norm_of(held[path]))}  # fmt: skip
        swapped = {
            path: {"type": "root_mean", "width": norm.width, "eps": norm.eps} | ({"bias": True} if norm.bias else {})
            for path, (norm, _, _) in made.items()
        }
        steps: list[dict[str, Any]] = [{"format": 1, "kind": "swap", "modules": swapped}]
        if found.shared:
            late = {path: {"way": "centred"} for path in found.shared}
            steps.append({"format": 1, "kind": "layout", "modules": late})
        receipt = Receipt(
            rewrite=self.card.name, sites=step.sites, before=total, after=total, options=step.options,
            structure={"steps": steps},
        )  # fmt: skip
        centre(lab.model, found)
        self.replay(receipt, lab.model)
        _fill(lab.model, made)
        expect_close(lab.anatomy, before)
        lab.renew()
        return receipt

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @classmethod
    def examples(cls, anatomy: Anatomy) -> tuple[Step, ...]:
        """The step that the conformance suite tries, where the model's norms take a mean away."""
        step = Step(rewrite=cls.card.name, sites=tuple(b.site.id for b in anatomy.stacks[0].blocks))
        return () if cls().check(step, anatomy) else (step,)


def _structure(anatomy: Anatomy, stack: Stack) -> list[Problem]:
    """Blocks that do more than to add linear maps' outputs, and norms that keep the mean."""
    from lamina.rewrites._norms import block_norms

    problems = []
    for block in stack.blocks:
        site = block.site.id
        if not block.plain or block.turns > 1:
            problems.append(Problem(site, "it does more to the stream than to add what its sublayers make"))
        odd = [x.site.id for x in block.branches if not x.tail or x.way]
        problems += [Problem(s, "what it adds is not a linear map's own output") for s in odd]
        norms = block_norms(anatomy, block)
        keeps = [path for path, norm in norms.items() if not norm.centred]
        if keeps or not norms:
            what = f"{keeps[0]} takes no mean away" if keeps else "it has no norm that is known"
            problems.append(Problem(site, what, "leave the norms as they are"))
    return problems


def _fill(model: nn.Module, made: Mapping[str, Any]) -> None:
    """Gains and biases, as the new norms hold them."""
    import torch

    with torch.no_grad():
        for path, (_, gain, shift) in made.items():
            module: Any = model.get_submodule(path)
            module.weight.copy_(gain)
            if module.bias is not None:
                module.bias.copy_(shift)
