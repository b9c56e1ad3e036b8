"""The parts of an anatomy: stacks, blocks and branches, and where their tensors can be taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lamina.core.sites import Cost, Kind, Site


@dataclass(frozen=True)
class Turn:
    """What a block does to the stream itself, beside adding to it: a norm's module, or a factor.

    `module` is its path relative to the block; `factor` a number, or a tensor that broadcasts over [tokens, width].
    """

    module: str = ""
    factor: float | Tensor = 1.0

    def __call__(self, block: nn.Module, stream: Tensor) -> Tensor:
        """The stream afterwards."""
        return block.get_submodule(self.module)(stream) if self.module else stream * self.factor

    def __eq__(self, other: object) -> bool:
        """The same module, or the same factor."""
        if not isinstance(other, Turn) or self.module != other.module:
            return False
        mine, theirs = self.factor, other.factor
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            return mine.shape == theirs.shape and bool((mine == theirs).all())
        return type(mine) is type(theirs) and mine == theirs

    def __hash__(self) -> int:
        return hash(self.module)


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block: `stream + scale * outlet(…)`.

    Paths are relative to the block. `core` does the work; `own` are the other modules that serve this branch
    alone (its norms); `outlet` is the module whose output joins the stream (`mutated`: the block adds into it in
    place); `tail` is the linear map whose output is what joins ('' where something else, such as a norm, comes
    last). `reads` lists the positions of the branches of the same block that have joined the stream before this
    one reads it. `stream` tells where the core takes its input (position or keyword), `returns` the structure of
    its output: the index of the tensor and the arity at each level, as `((0, 2),)` for the first of a pair.

    `before` is what happens to the stream after the branch that joins before this one, and before this one joins.
    `joins`: the core adds to the stream itself, so that without the branch it hands on its argument `stream`.
    `widths` are own modules (path, features) that must keep the width of what they return though it is all zero.
    """

    site: Site
    core: str
    own: tuple[str, ...]
    outlet: str
    reads: tuple[int, ...]
    scale: float = 1.0
    stream: int | str = 0
    returns: tuple[tuple[int, int], ...] = ()
    outlet_index: int = 0
    tail: str = ""
    cached: bool = False
    mutated: bool = False
    macs: int = 0
    before: tuple[Turn, ...] = ()
    joins: bool = False
    widths: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Block:
    """One element of a stack, in depth order. `path` is absolute; `stream` and `returns` as for a branch's core.

    `after` is what happens to the stream after the last branch has joined.
    """

    site: Site
    path: str
    branches: tuple[Branch, ...]
    stream: int | str = 0
    returns: tuple[tuple[int, int], ...] = ()
    macs: int = 0
    after: tuple[Turn, ...] = ()

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
    `owner` is the path of the module whose config speaks of this stack.
    """

    name: str
    path: str
    blocks: tuple[Block, ...]
    owner: str | None = None
    index: tuple[str, ...] = ()
    width: int = 0


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
