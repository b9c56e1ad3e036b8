"""FoldGPT: gates learn together which blocks may go; those that stay share their weights, and their norms adapt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.errors import UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure, recipe, rewrite
from lamina.core.sites import Kind
from lamina.rewrites.drop import Problem
from lamina.rewrites.share import Sharing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab

PAPER = Paper(
    key="liu2024foldgpt",
    title="FoldGPT: Simple and Effective Large Language Model Compression Scheme",
    authors=(
        "Songwei Liu",
        "Chao Zeng",
        "Lianqiang Li",
        "Chenqian Yan",
        "Lean Fu",
        "Xing Mei",
        "Fangmin Chen",
    ),
    year=2024,
    arxiv="2407.00928",
)
START = 4.0
"""Gates begin as sigmoid(4) = 0.982."""
BETAS = (0.9, 0.999)
BATCH = 8
"""Sequences that gates see at once."""


@measure(
    "foldgpt",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.GRADIENT,
    deviations=(
        "there is no code: the gates' form, their regulariser and all numbers are ours, after the paper's words",
        "every step sees the whole of the text's part that is used, so that batches don't matter",
        "all blocks have the same price, where the paper counts their operations",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Gates:
    """Keep blocks whose gates stay open: h + g (block(h) - h), g = sigmoid(a), learnt together on frozen weights.

    Minimises the next-token loss in nats + `price` · Σ_l (`pull` · g_l - |g_l - mean g|), which closes gates and parts
    them, by `steps` steps of Adam of rate `rate` on at most `sequences` sequences, cut to `length` tokens. The score
    is g.
    """

    card: ClassVar[Card]

    sequences: int = 32
    length: int = 128
    steps: int = 24
    rate: float = 0.3
    price: float = 0.1
    pull: float = 2.0

    def __post_init__(self) -> None:
        for name, least in (("sequences", 1), ("length", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.rate <= 0 or self.price < 0:
            raise ValueError("rate must be above 0, and price not below")

    def measure(self, lab: Lab) -> Scores:
        """A forward and a backward over the part of the text for every step.

        Raises UnsupportedError where the model predicts no next token, or makes several passes with a block.
        """
        import numpy as np
        import torch

        from lamina.core.scores import Scores
        from lamina.lab.gradients import frozen

        _expect_tokens(lab, self.card.name)
        blocks = [b for k in lab.anatomy.stacks for b in k.blocks]
        part = batched(lab.part(self.sequences, self.length))
        free = torch.full((len(blocks),), START, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=self.rate, betas=BETAS, foreach=False)
        with frozen(lab.model), torch.enable_grad():
            for step in range(self.steps):
                free.grad = self.slope(part, free)
                optimizer.step()
                lab.progress("gates", step + 1, self.steps)
        gates = free.detach().sigmoid().numpy()
        return Scores(
            measure=self.card.name, values={b.site.id: np.array([g]) for b, g in zip(blocks, gates, strict=True)}
        )

    def slope(self, lab: Lab, free: Tensor) -> Tensor:
        """The gradient of what is minimised with respect to a [blocks], float64, over all of the lab's text."""
        import torch

        from lamina.lab.objective import token_losses
        from lamina.lab.rows import real

        gates = free.sigmoid()
        cost = self.price * (self.pull * gates - (gates - gates.mean()).abs()).sum()
        (total,) = torch.autograd.grad(cost, free)
        counted = sum(int((m[:, 1:] & m[:, :-1]).sum()) for m in map(real, lab.batches))
        for batch in lab.batches:
            with gated(lab, free.sigmoid()):
                losses, _ = token_losses(lab.forward(batch), batch)
            total = total + torch.autograd.grad(losses.sum().cpu() / max(counted, 1), free)[0]
            lab.counts.backwards += int(real(batch).sum()) * lab.depth
        return total


def batched(lab: Lab) -> Lab:
    """The same text in batches of up to `BATCH` sequences, those of one shape that follow each other together."""
    import torch

    groups: list[list[Mapping[str, Tensor]]] = []
    for batch in lab.batches:
        shapes = {k: v.shape[1:] for k, v in batch.items()}
        last = groups[-1] if groups else []
        if last and len(last) < BATCH and {k: v.shape[1:] for k, v in last[0].items()} == shapes:
            last.append(batch)
        else:
            groups.append([batch])
    both = lab.on([{k: torch.cat([b[k] for b in group]) for k in group[0]} for group in groups])
    both.counts = lab.counts
    return both


@contextmanager
def gated(lab: Lab, gates: Tensor) -> Iterator[None]:
    """Inside, every block hands on out + (1 - g) (in - out), with its number's g of `gates` [blocks]."""
    import torch
    from torch.utils._pytree import tree_flatten, tree_unflatten

    from lamina.anatomy.trial import forward_of

    def through(module: nn.Module, place: int | str, gate: Tensor) -> Any:
        usual = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = args[place] if isinstance(place, int) else kwargs[place]
            out = usual(*args, **kwargs)
            leaves, form = tree_flatten(out)
            at = next(n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
            leaves[at] = torch.lerp(leaves[at], stream, (1 - gate).to(stream.device, stream.dtype))
            return tree_unflatten(leaves, form)

        return forward_of(module, forward)

    with ExitStack() as held:
        for number, block in enumerate(b for k in lab.anatomy.stacks for b in k.blocks):
            held.enter_context(through(lab.model.get_submodule(block.path), block.stream, gates[number]))
        yield


def _expect_tokens(lab: Lab, where: str) -> None:
    """Raise UnsupportedError where there is no next-token loss, or where blocks are passes of one module."""
    if not lab.predicts:
        raise UnsupportedError("the model predicts no next tokens, so there is no loss", where=where)
    for stack in lab.anatomy.stacks:
        stack.expect_unlooped("its blocks can't be told apart")


@rewrite(
    "foldgpt",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.GRADIENT,
    deviations=(
        "there is no code: losses, rates and the number of steps are ours",
        "what stays with each depth, norms and biases, is trained; no adapters are added: share with a rank has some",
        "which blocks share is the plan's",
    ),
)
@dataclass(frozen=True, kw_only=True)
class FoldGpt(Sharing):
    """Let `group` blocks, one after the other, use the first one's maps; then train what stays with each depth.

    That is their norms and biases: `steps` steps of Adam, one batch each, with a rate that falls from `rate` to 0 on a
    line, lower the next-token loss + `tail_weight` · the mean over the last `tail` blocks and tokens of ‖h - y‖² /
    ‖y‖², h and y the streams [width] behind the block, y the dense network's. `steps` = 0 shares alone.
    """

    card: ClassVar[Card]

    group: int = 2
    steps: int = 32
    rate: float = 5e-3
    tail: int = 1
    tail_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 0), ("tail", 1), ("tail_weight", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.rate <= 0:
            raise ValueError(f"rate must be above 0, not {self.rate}")

    def common(self, maps: Sequence[Tensor]) -> Tensor:
        """The first block's."""
        return maps[0].double()

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        blocks = {b.site.id for k in anatomy.stacks for b in k.blocks}
        problems = super().check(step, anatomy)
        return problems or [Problem(s, "it is no block") for s in step.sites if s not in blocks]

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Tie the maps, then train. Raises UnsupportedError for the first problem, before anything is changed."""
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        if not self.steps:
            return super().apply(step, lab)
        _expect_tokens(lab, self.card.name)
        from lamina.rewrites._adapt import adapt, tails

        wanted = [tails(lab, batch, self.tail) for batch in lab.batches]
        receipt = super().apply(step, lab)
        adapt(lab, step.sites, wanted, steps=self.steps, rate=self.rate, weight=self.tail_weight)
        return receipt


recipe(
    "foldgpt",
    PAPER,
    summary="FoldGPT's first part: the blocks whose gates close most go.",
    measure="foldgpt",
    planner="lowest",
    kinds=(Kind.BLOCK,),
)
