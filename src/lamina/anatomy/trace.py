"""Run one module on real inputs and record which op made which tensor from which, and inside which submodule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ADDS = frozenset({aten.add, aten.add_})
SCALES = frozenset({aten.mul, aten.mul_, aten.div, aten.div_})
PASSES = frozenset(
    {
        aten.view, aten._unsafe_view, aten.reshape, aten.clone, aten.contiguous, aten._to_copy, aten.to,
        aten.detach, aten.alias, aten.expand, aten.squeeze, aten.unsqueeze, aten.native_dropout,
    }
)  # fmt: skip
"""Ops whose output is their first input, reshaped or converted."""


@runtime_checkable
class _Caching(Protocol):
    """A cache of keys and values, whatever its class."""

    def get_seq_length(self) -> int: ...


def fresh(given: Any) -> Any:
    """The same arguments, caches copied: a call adds to them, and there is more than one."""
    return tree_map_only(_Caching, copy.deepcopy, given)


@dataclass(eq=False)
class Node:
    """One tensor: the op that made it, from which nodes, inside which submodule (dotted, '' = the root)."""

    order: int
    op: Any = None
    inputs: tuple[Node, ...] = ()
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    scope: str = ""
    shape: tuple[int, ...] = ()
    value: Tensor | None = None
    place: int | None = None
    """Which of the op's results it is, where there are several."""


@dataclass(eq=False)
class Call:
    """One call of a submodule: the nodes of its tensor arguments and the structure it returned."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None
    nodes: tuple[Node | None, ...] = ()
    reads: tuple[Node | None, ...] = ()
    started: int = 0
    ended: int = 0
    flops: int = 0


class Trace(TorchDispatchMode):
    """The ops, calls and FLOPs of one run of `root`.

    Holds every tensor of the run alive, so that identity stays identity: for one block on a few tokens.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.calls: list[Call] = []
        self.ops: set[tuple[str, Any]] = set()
        self.flops = 0
        self._stack: list[Call] = []
        self._nodes: dict[int, Node] = {}
        self._made: list[Node] = []
        self._clock = 0

    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor; one that no traced op made is a source."""
        if id(tensor) not in self._nodes:
            self._enter(tensor, Node(self._tick(), shape=tuple(tensor.shape), value=tensor))
        return self._nodes[id(tensor)]

    def all(self) -> list[Node]:
        """Every node, in the order of making."""
        return self._made

    def nodes(self, structure: Any) -> tuple[Node | None, ...]:
        """The nodes of a structure's leaves, None for what is no tensor."""
        return tuple(self.node(x) if isinstance(x, Tensor) else None for x in tree_leaves(structure))

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _enter(self, tensor: Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = node
        self._made.append(node)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        scope = self._stack[-1].path if self._stack else ""
        self.ops.add((scope, packet))
        inputs = tuple(self.node(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        noted = tree_map_only(Tensor, lambda t: self._nodes[id(t)], (tuple(args), dict(kwargs)))
        for place, leaf in enumerate(tree_leaves(out)):
            if isinstance(leaf, Tensor):
                node = Node(self._tick(), packet, inputs, noted[0], noted[1], scope, tuple(leaf.shape), leaf)
                node.place = None if isinstance(out, Tensor) else place
                self._enter(leaf, node)
        if packet in flop_registry:
            count = int(flop_registry[packet](*args, **kwargs, out_val=out))
            self.flops += count
            for call in self._stack:
                call.flops += count
        return out

    @contextmanager
    def watching(self) -> Iterator[Trace]:
        """Record inside the block; the module hooks are gone afterwards."""
        handles = []
        for path, module in self.root.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(self._opens(path), with_kwargs=True))
                handles.append(module.register_forward_hook(self._closes, with_kwargs=True))
        try:
            with torch.no_grad(), self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _opens(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(path, module, *fresh((args, kwargs)), started=self._tick(), reads=self.nodes((args, kwargs)))
            self._stack.append(call)

        return hook

    def _closes(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._stack.pop()
        call.output, call.nodes, call.ended = output, self.nodes(output), self._tick()
        self.calls.append(call)


class Flops(TorchDispatchMode):
    """Floating-point operations of what runs inside, as torch counts them: `total`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += int(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out))
        return out


def first_tensor(structure: Any, shape: tuple[int, ...] | None = None) -> Tensor | None:
    """The first tensor of a structure (of that shape, where given)."""
    for leaf in tree_leaves(structure):
        if isinstance(leaf, Tensor) and (shape is None or tuple(leaf.shape) == shape):
            return leaf
    return None
