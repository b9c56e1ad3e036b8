"""The parts of an anatomy: stacks, blocks and branches, and where their tensors can be taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamina.core.errors import UnsupportedError
from lamina.core.sites import Cost, Kind, Site


@dataclass(frozen=True, eq=False)
class Turn:
    """What happens to a tensor on its way: a norm's module, or an operation with fixed other operands.

    `module` is its path relative to the block; else `op` is called with `args`, HERE standing for the tensor, seen in
    the form `shape` where one is given; of several results, number `place` is taken. `bound`: the other operands were
    made from the sample's inputs.
    """

    module: str = ""
    op: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    shape: tuple[int, ...] = ()
    bound: bool = False
    place: int | None = None

    def __call__(self, block: nn.Module, tensor: Tensor) -> Tensor:
        """The tensor afterwards."""
        if self.module:
            return block.get_submodule(self.module)(tensor)
        given = tensor.reshape(self.shape) if self.shape else tensor
        made = self.op(*(given if a is HERE else a for a in self.args), **self.kwargs)
        made = made if self.place is None else made[self.place]
        return made.reshape(tensor.shape) if self.shape else made

    def __eq__(self, other: object) -> bool:
        """The same module, or the same operation on the same numbers."""
        if not isinstance(other, Turn) or (self.module, self.op) != (other.module, other.op):
            return False
        mine, theirs = tree_leaves((self.args, dict(self.kwargs))), tree_leaves((other.args, dict(other.kwargs)))
        return len(mine) == len(theirs) and all(_same(a, b) for a, b in zip(mine, theirs, strict=True))

    def __hash__(self) -> int:
        return hash((self.module, str(self.op)))

    def __str__(self) -> str:
        return self.module or str(self.op).rpartition(".")[2]


class _Here:
    def __repr__(self) -> str:
        return "HERE"


HERE = _Here()
"""Stands for the tensor among an operation's arguments."""


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and bool(one == other)


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block: `stream + scale * outlet(…)`.

    Paths are relative to the block. `core` does the work; `own` are the other modules that serve this branch
    alone (its norms); `outlet` is the module whose output joins the stream (`mutated`: the block adds into it in
    place; `outlet_call`: it is its call of that number, of several in a run of the block); `tail` is the linear map
    whose output is what joins ('' where something else, such as a norm, comes last). `reads` lists the positions of
    the branches of the same block that have joined the stream before this one reads it. `stream` tells where the core
    takes its input (position or keyword), `returns` the structure of its output: the index of the tensor and the arity
    at each level, as `((0, 2),)` for the first of a pair (`((0, 2, "list"),)` for that of a list).

    `before` is what happens to the stream after the branch that joins before this one, and before this one joins.
    `joins`: the core adds to the stream itself, so that without the branch it hands on its argument `stream`, by way of
    the modules `keeps` inside it (norms of the stream).
    `way` is what happens between the outlet and the joining beyond `scale`;
    `bound`: it depends on the sample's inputs or their lengths (a gate made from a
    condition, windows).
    `widths` are own modules (path, features) that must keep the width of what they return though it is all zero.
    `hands` is what the core returns as it was given, beside its result: (place in what it returns, position or
    keyword). `tells`: it computes something that the next block reads beside the stream.
    """

    site: Site
    core: str
    own: tuple[str, ...]
    outlet: str
    reads: tuple[int, ...]
    scale: float = 1.0
    stream: int | str = 0
    returns: tuple[tuple[Any, ...], ...] = ()
    outlet_index: int = 0
    outlet_call: int | None = None
    tail: str = ""
    cached: bool = False
    mutated: bool = False
    macs: int = 0
    before: tuple[Turn, ...] = ()
    joins: bool = False
    keeps: tuple[str, ...] = ()
    widths: tuple[tuple[str, int], ...] = ()
    way: tuple[Turn, ...] = ()
    bound: bool = False
    hands: tuple[tuple[int, int | str], ...] = ()
    tells: bool = False

    def owned(self, block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that serve this branch alone, with their names in the block."""
        stay = tuple(f"{self.core}.{k}." for k in self.keeps)
        for path in (self.core, *self.own):
            for name, parameter in block.get_submodule(path).named_parameters():
                if not f"{path}.{name}".startswith(stay or "\0"):
                    yield f"{path}.{name}", parameter


@dataclass(frozen=True)
class Block:
    """One element of a stack, in depth order. `path` is absolute; `stream` and `returns` as for a branch's core.

    `after` is what happens to the stream after the last branch has joined. Where a model runs one module again and
    again, each pass is a block: number `turn` of `turns`, all with the same path and the same weights. `tells`: it
    computes something beside the stream that the next one reads.
    """

    site: Site
    path: str
    branches: tuple[Branch, ...]
    stream: int | str = 0
    returns: tuple[tuple[Any, ...], ...] = ()
    macs: int = 0
    after: tuple[Turn, ...] = ()
    turn: int = 0
    turns: int = 1
    tells: bool = False

    @property
    def bound(self) -> bool:
        """Whether what its branches add, or its stream, can be told on the sample alone."""
        turns = (*self.after, *(t for x in self.branches for t in (*x.before, *x.way)))
        return any(x.bound for x in self.branches) or any(t.bound for t in turns)

    @property
    def plain(self) -> bool:
        """Whether its output is its input plus what its branches add, and nothing else."""
        return not self.after and not any(x.before for x in self.branches)

    def course(self, module: nn.Module, stream: Tensor, added: Mapping[str, Tensor]) -> list[Tensor]:
        """The stream just before each branch joins it, and last of all the one that leaves.

        `added` [batch, tokens, width] by site id; a branch that is missing adds nothing.
        """
        met = []
        for branch in self.branches:
            for turn in branch.before:
                stream = turn(module, stream)
            met.append(stream)
            if branch.site.id in added:
                stream = stream + added[branch.site.id]
        for turn in self.after:
            stream = turn(module, stream)
        return [*met, stream]


@dataclass(frozen=True)
class Stack:
    """A run of blocks that share one residual stream.

    `index` are the attributes (module path and name, relative to the block) that hold the block's number,
    `strides` those that hold a · number + b (name → (a, b)), as where a block has several cache entries;
    `carries` is what each block hands to the next beside the stream: (place in what it returns, position or keyword);
    `owner` is the path of the module whose config speaks of this stack. `linked`: each block gets the very stream that
    the one before hands on.
    """

    name: str
    path: str
    blocks: tuple[Block, ...]
    owner: str | None = None
    index: tuple[str, ...] = ()
    width: int = 0
    linked: bool = True
    strides: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    carries: tuple[tuple[int, int | str], ...] = ()

    @property
    def looped(self) -> bool:
        """Whether blocks are passes of one module over the stream, with the same weights."""
        return any(b.turns > 1 for b in self.blocks)

    def expect_unlooped(self, what: str) -> None:
        """Raise UnsupportedError, saying what can't be done, where blocks share their weights as passes of a module."""
        if self.looped:
            hint = "whole passes can be dropped"
            raise UnsupportedError(f"{what}: its blocks are passes of one module", where=self.path, hint=hint)


@dataclass(frozen=True)
class Certificate:
    """What `out = in + Σ branches` was off by, per block: ‖error‖ / ‖out‖."""

    errors: dict[str, float]
    tolerance: float
    dtype: str = "float32"

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max(self.errors.values(), default=0.0)

    @property
    def holds(self) -> bool:
        """Whether every block is within the tolerance."""
        return all(e <= self.tolerance for e in self.errors.values())


@dataclass(frozen=True)
class Ledger:
    """The costs of the sites, and of the whole model."""

    sites: dict[str, Cost] = field(default_factory=dict[str, Cost])
    total: Cost = field(default_factory=Cost)


SUBLAYER_NAMES: dict[Kind, str] = {
    Kind.ATTENTION: "attention",
    Kind.CROSS_ATTENTION: "cross_attention",
    Kind.MLP: "mlp",
    Kind.MOE: "moe",
    Kind.MIXER: "mixer",
}


def describe(value: Any) -> str:
    """A short name for a tensor-like value, for messages."""
    return f"{type(value).__name__}{tuple(value.shape) if hasattr(value, 'shape') else ''}"
