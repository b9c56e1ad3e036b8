"""Norms that divide by a constant: what is left of a LayerNorm is a linear map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.errors import InputError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import SUBLAYERS, Cost, Kind
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab
    from lamina.rewrites._norms import Norm

PAPER = Paper(
    key="baroni2025norms",
    title="Transformers Don't Need LayerNorm at Inference Time: Scaling LayerNorm Removal to GPT-2 XL and the "
    "Implications for Mechanistic Interpretability",
    authors=("Luca Baroni", "Galvin Khara", "Joachim Schaeffer", "Marat Subkhankulov", "Stefan Heimersheim"),
    year=2025,
    arxiv="2507.02559",
)


@rewrite(
    "no-norm",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.FORWARD,
    deviations=(
        "the replacement alone: the paper takes one norm after the other and trains between, which is a healer's work",
        "the divisor is measured once for each step, and does not follow the training by a moving average",
        "first tokens are left out of it and get it too; the paper gives them one of their own until late",
        "queries and keys lose a norm together with values",
        "a module of its own stands for the norm, and not a LayerNorm of a huge eps",
    ),
)
@dataclass(frozen=True, kw_only=True)
class NoNorm:
    """Norms of blocks or sublayers become (x - mean x) / σ · g + b with one number σ, part of the weights.

    σ is the mean of √(var x + eps) over the text's tokens but the first of each sequence, in the network as it is.
    Norms that take no mean away have σ of √(mean x² + eps), and none is taken. `last`: the norm behind the blocks too.
    """

    card: ClassVar[Card]

    last: bool = False

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        known = {s.id for s in anatomy.sites}
        problems = [] if step.sites else [Problem(self.card.name, "the step names no site")]
        problems += [Problem(s, "the model has no such site") for s in step.sites if s not in known]
        for site in step.sites if not problems else ():
            if not _norms(anatomy, site):
                problems.append(Problem(site, "no norm serves it alone", "name its whole block, or leave it"))
        return problems

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """The same as before: gains and biases stay."""
        return anatomy.total()

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Measure σ and put the linear maps in. Raises UnsupportedError for the first problem that `check` names."""
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        anatomy = lab.anatomy
        total = anatomy.total()
        norms = {path: norm for site in step.sites for path, norm in _norms(anatomy, site).items()}
        norms |= _behind(anatomy) if self.last else {}
        sizes = spreads(lab, norms)
        made = {
            path: (norm.gain(lab.model.get_submodule(path)) / sizes[path], norm.shift(lab.model.get_submodule(path)))
            for path, norm in norms.items()
        }
        spec = {p: {"type": "fixed", "width": n.width, "centred": n.centred, "bias": bool(n.bias)}
                for p, n in norms.items()}  # fmt: skip
        receipt = Receipt(
            rewrite=self.card.name, sites=step.sites, before=total, after=total, options=step.options,
            structure={"steps": [{"format": 1, "kind": "swap", "modules": spec}]},
        )  # fmt: skip
        self.replay(receipt, lab.model)
        _fill(lab.model, made)
        lab.renew()
        return receipt

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @classmethod
    def examples(cls, anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: the norms of one block, and of two last sublayers."""
        blocks = anatomy.stacks[0].blocks
        sites = ([blocks[1].site.id], [b.branches[-1].site.id for b in blocks[1:3]])
        steps = [Step(rewrite=cls.card.name, sites=tuple(s)) for s in sites]
        return tuple(s for s in steps if not cls().check(s, anatomy))


def _norms(anatomy: Anatomy, site: str) -> dict[str, Norm]:
    """Path → norm: those of a block outside of its cores, or those that serve a sublayer alone."""
    from lamina.rewrites._norms import block_norms, own_norms

    block = anatomy.block(site)
    mine = block_norms(anatomy, block)
    if site != block.site.id:
        mine = own_norms(anatomy, block, anatomy.branch(site))
    return {f"{block.path}.{path}": norm for path, norm in mine.items()}


def _behind(anatomy: Anatomy) -> dict[str, Norm]:
    """The norms behind the blocks: outside of them, as wide as the stream, and run after the last."""
    from lamina.anatomy.stacks import call, evaluating
    from lamina.rewrites._norms import norms_in

    inside = tuple(f"{b.path}." for k in anatomy.stacks for b in k.blocks)
    widths = {k.width for k in anatomy.stacks}
    found = {p: n for p, n in norms_in(anatomy.model).items() if not p.startswith(inside) and n.width in widths}
    ran: list[str] = []
    ends = {k.blocks[-1].path for k in anatomy.stacks}
    handles = [
        anatomy.model.get_submodule(p).register_forward_hook(lambda *_, path=p: ran.append(path))
        for p in (*found, *ends)
    ]
    try:
        with evaluating(anatomy.model):
            call(anatomy.model, anatomy.sample)
    finally:
        for handle in handles:
            handle.remove()
    first = min((ran.index(p) for p in ends), default=0)
    return {p: n for p, n in found.items() if p in ran[first:]}


def spreads(lab: Lab, norms: Mapping[str, Norm]) -> dict[str, float]:
    """Path → mean of √(var x + eps) of what the norm takes, over all tokens but the first of each sequence."""
    from lamina.lab.lab import real

    sums = dict.fromkeys(norms, 0.0)
    counts = dict.fromkeys(norms, 0)
    for number, batch in enumerate(lab.batches):
        mask = real(batch)
        mask = mask & (mask.cumsum(1) > 1)

        def note(path: str, x: Tensor, mask: Tensor = mask) -> None:
            norm = norms[path]
            wide = x.detach().double().flatten(0, -2)
            wide = wide - wide.mean(-1, keepdim=True) if norm.centred else wide
            size = (wide.square().mean(-1) + norm.eps).sqrt()
            size = size[mask.flatten().to(size.device)] if mask.numel() == len(size) else size
            sums[path] += float(size.sum())
            counts[path] += len(size)

        with _heard(lab.model, norms, note):
            lab.forward(batch, head=False)
        lab.progress("norms", number + 1, len(lab.batches))
    empty = [p for p, n in counts.items() if not n]
    if empty:
        raise InputError("the text shows this norm no token", where=empty[0], hint="sequences of two tokens at least")
    return {p: sums[p] / counts[p] for p in norms}


@contextmanager
def _heard(model: nn.Module, paths: Iterable[str], note: Any) -> Iterator[None]:
    """Inside, what enters these modules is handed to `note`, without gradients."""
    import torch

    with ExitStack() as held, torch.no_grad():
        for path in paths:
            hook = _hook(path, note)
            held.callback(model.get_submodule(path).register_forward_pre_hook(hook).remove)
        yield


def _hook(path: str, note: Any) -> Any:
    def hook(_: nn.Module, args: Sequence[Any]) -> None:
        note(path, args[0])

    return hook


def _fill(model: nn.Module, made: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    import torch

    with torch.no_grad():
        for path, (gain, shift) in made.items():
            module: Any = model.get_submodule(path)
            module.weight.copy_(gain)
            if module.bias is not None:
                module.bias.copy_(shift)
