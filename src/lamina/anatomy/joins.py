"""Follow the stream back from a block's output to its input: what is added to it, and what else happens to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map_only

from lamina.anatomy.parts import HERE, Turn
from lamina.anatomy.trace import ADDS, PASSES, SCALES, Call, Node, Trace, aten
from lamina.core.errors import CertificateError

ZEROS = frozenset({aten.zeros_like, aten.zeros, aten.new_zeros})
"""Made from nothing: what stands where a dropped branch stood, so no branch."""


UNARY = frozenset(
    {aten.relu, aten.relu_, aten.gelu, aten.silu, aten.tanh, aten.clamp, aten.clamp_min, aten.hardtanh, aten.leaky_relu}
)
"""Applied to the stream number by number."""
MOVES = frozenset(
    {
        aten.permute, aten.transpose, aten.t, aten.slice, aten.roll, aten.select, aten.narrow, aten.unfold, aten.flip,
        aten.constant_pad_nd, aten.repeat, aten.split, aten.split_with_sizes, aten.chunk, aten.index, aten.index_select,
        aten.pixel_shuffle, aten.as_strided, aten.copy_, aten.unbind, aten.movedim,
    }
)  # fmt: skip
"""Ops that put the numbers of their first input elsewhere: zeros stay zeros."""


CUTS = frozenset({aten.split, aten.split_with_sizes, aten.chunk})
"""Cut their first input into pieces."""


PUTS = frozenset({aten.index_put, aten.index_put_})
"""Put their third input into places of the first."""


MIXES = frozenset({aten.bmm, aten.matmul})
"""Of several streams by factors that depend on them, where they stand second."""


@dataclass(eq=False)
class Leaf:
    """What one addition joins to the stream: a node times a factor; `point` is the addition.

    `way` is what happens to the node before it joins, beyond the factor.
    """

    node: Node
    scale: float
    point: Node
    way: tuple[Turn, ...] = ()


@dataclass(eq=False)
class Join:
    """One addition on the stream's way: the stream before and after, and the turns since the one before."""

    point: Node
    stream: Node
    leaves: list[Leaf]
    before: tuple[Turn, ...] = ()
    scopes: set[str] = field(default_factory=set[str])


def is_scalar(value: Any) -> bool:
    """A number, which scales a branch without owning anything."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def unscaled(node: Node, scale: float = 1.0) -> list[tuple[Node, float]]:
    """The nodes met on the way back through reshapes, casts and multiplications by numbers, each with its factor."""
    met = [(node, scale)]
    while node.inputs:
        if node.op in SCALES and len(node.args) == 2 and len(node.inputs) == 1:
            factor = next((a for a in node.args if is_scalar(a)), None)
            if factor is None:
                break
            scale = scale * factor if "mul" in str(node.op) else scale / factor
        elif node.op not in PASSES:
            break
        node = node.inputs[0]
        met.append((node, scale))
    return met


def light(module: nn.Module) -> bool:
    """Whether a module holds no matrix: a norm, a scale, an activation."""
    return not any(p.ndim > 1 and p.numel() > max(p.shape) for p in module.parameters())


def void(node: Node) -> bool:
    """Whether a node is zeros made from nothing, or those moved and scaled."""
    if node.op in ZEROS:
        return True
    if node.op in PASSES or node.op in MOVES:
        return bool(node.inputs) and void(node.inputs[0])
    return node.op in SCALES and "mul" in str(node.op) and any(map(void, node.inputs))


class StreamError(CertificateError):
    """No stream runs through a block at all."""


class Joins:
    """The additions and turns that lead from a block's input to its output, in the order of running."""

    def __init__(self, trace: Trace, source: Node, output: Node, where: str) -> None:
        self.source, self.where = source, where
        self.makers = _makers(trace.calls)
        tensors = (*trace.root.parameters(), *trace.root.buffers())
        self._parameters = {id(t) for t in tensors} | {id(t.data) for t in tensors}
        self._strict: dict[int, bool] = {}
        self._loose: dict[int, bool] = {}
        self._moved: dict[int, bool] = {}
        self._chains: dict[int, list[Node]] = {}
        self.joins: list[Join] = []
        self.after: tuple[Turn, ...] = ()
        self.streams: dict[int, int] = {}
        if not self.carries(output):
            raise StreamError(
                "the block's output is not its input plus branches",
                where=where,
                hint="no chain of additions joins them",
            )
        self._walk(output)
        self._number()

    @property
    def leaves(self) -> list[Leaf]:
        """All that joins, in the order of making."""
        found = [leaf for join in self.joins for leaf in join.leaves if not void(leaf.node)]
        return sorted(found, key=lambda leaf: (self.streams[leaf.point.order], leaf.node.order))

    def carries(self, node: Node, *, turning: bool = True) -> bool:
        """Whether the stream reaches `node` through additions and reshapes (`turning`: also norms and factors)."""
        if node is self.source:
            return True
        known = self._loose if turning else self._strict
        if node.order not in known:
            known[node.order] = any(self.carries(n, turning=turning) for n in self._ways(node, turning))
        return known[node.order]

    def _ways(self, node: Node, turning: bool) -> tuple[Node, ...]:
        if node.op in ADDS and sum(map(self.moved, node.inputs)) > 1:
            return node.inputs
        if node.op in PASSES:
            return node.inputs[:1]
        if whole := self._whole(node):
            return (whole[0],)
        turn = self._turn(node) if turning else None
        return () if turn is None else (turn[1],)

    def _turn(self, node: Node) -> tuple[Turn, Node] | None:
        """What was done to the stream to make this node, and the stream before."""
        if node.order in self.makers:
            call, before = self.makers[node.order]
            return Turn(call.path), before
        if node.op in UNARY or node.op in SCALES or node.op in ADDS:
            return self.step(node)
        if node.op in MIXES and len(node.inputs) == 2 and self.moved(node.inputs[0]):
            found = self.step(node, node.inputs[1])
            return None if found is None else (replace(found[0], shape=found[1].shape), found[1])
        return None

    def step(self, node: Node, before: Node | None = None) -> tuple[Turn, Node] | None:
        """The op that made a node as a function of one input, by default the only one that moves; None if there's none.

        All else stands in it as the values that it had.
        """
        moving = [before] if before is not None else [n for n in node.inputs if self.moved(n)]
        if len(moving) != 1 or sum(n is moving[0] for n in node.inputs) != 1:
            return None
        before = moving[0]
        if not node.args or not any(a is before for a in node.args):
            return None
        args = tuple(HERE if a is before else _still(a) for a in node.args)
        bound = any(self.given(n) for n in node.inputs if n is not before)
        return Turn(op=node.op, args=args, kwargs=_still(dict(node.kwargs)), bound=bound, place=node.place), before

    def moved(self, node: Node) -> bool:
        """Whether a node depends on the block's input."""
        todo, seen = [node], set[int]()
        while todo:
            here = todo.pop()
            if here is self.source or self._moved.get(here.order):
                self._moved[node.order] = True
                return True
            if here.order not in seen and here.order not in self._moved:
                seen.add(here.order)
                todo.extend(here.inputs)
        self._moved[node.order] = False
        return False

    def given(self, node: Node) -> bool:
        """Whether a node depends on anything but parameters and numbers."""
        todo, seen = [node], set[int]()
        while todo:
            here = todo.pop()
            if here.order in seen:
                continue
            seen.add(here.order)
            if here.op is None and id(here.value) not in self._parameters:
                return True
            todo.extend(here.inputs)
        return False

    def _walk(self, node: Node) -> None:
        """From the output back to the source, one step at a time."""
        turns: list[Turn] = []
        passed: list[Node] = []
        while node is not self.source:
            passed.append(node)
            if node.op in PASSES and node.order not in self.makers:
                node = node.inputs[0]
            elif node.op in ADDS and (stream := _alone(node)):
                node = stream
            elif whole := self._whole(node):
                self._close(turns)
                passed += self._join_pieces(node, *whole)
                node = whole[0]
            elif node.op in ADDS and node.order not in self.makers and sum(map(self.moved, node.inputs)) > 1:
                self._close(turns)
                node = self._join(node)
            else:
                turn = self._turn(node)
                assert turn is not None
                turns.append(turn[0])
                node = turn[1]
        self._close(turns)
        self.joins.reverse()
        self._passed = [self.source, *reversed(passed)]

    def _close(self, turns: list[Turn]) -> None:
        """Give the turns met since the last addition to what runs after them."""
        made = tuple(reversed(turns))
        turns.clear()
        if self.joins:
            self.joins[-1].before = made
        else:
            self.after = made

    def _join(self, node: Node) -> Node:
        stream = [n for n in node.inputs if self.carries(n, turning=False)]
        stream = stream or [n for n in node.inputs if self.carries(n)]
        if len(stream) != 1 or node.inputs[0] is node.inputs[1]:
            raise CertificateError("the stream is added to itself", where=self.where)
        other = next(n for n in node.inputs if n is not stream[0])
        alpha = float(node.kwargs.get("alpha", 1.0))
        if alpha != 1.0 and stream[0] is node.inputs[1]:
            raise CertificateError("the stream is added with a factor", where=self.where)
        scopes = {node.scope, *(j.point.scope for j in self.joins)}
        self.joins.append(Join(node, stream[0], []))
        self.joins[-1].leaves = [Leaf(n, scale, node, way) for n, scale, way in self._split(other, alpha, scopes)]
        return stream[0]

    def _whole(self, node: Node) -> tuple[Node, list[list[Node]]] | None:
        """The stream that a node puts together again from all its pieces, and the way of each back to the cut."""
        if node.op is not aten.cat:
            return None
        chains = [self._chain(piece) for piece in node.args[0]]
        cuts = [chain[-1] for chain in chains]
        stream = cuts[0].inputs[0] if cuts[0].op in CUTS else None
        pieces = all(c.op in CUTS and c.place == n and c.inputs[0] is stream for n, c in enumerate(cuts))
        return (stream, chains) if stream is not None and pieces and stream.shape == node.shape else None

    def _chain(self, piece: Node) -> list[Node]:
        """The nodes from a piece back, through what is added to it, to where it was cut off."""
        if piece.order not in self._chains:
            ways = list[list[Node]]()
            if piece.op in PASSES:
                ways = [self._chain(piece.inputs[0])]
            elif piece.op in ADDS:
                ways = [chain for n in piece.inputs if (chain := self._chain(n))[-1].op in CUTS]
            self._chains[piece.order] = [piece, *(ways[0] if len(ways) == 1 else ())]
        return self._chains[piece.order]

    def _join_pieces(self, node: Node, stream: Node, chains: list[list[Node]]) -> list[Node]:
        """What is added to pieces of the stream joins it with zeros beside it. Gives the nodes on the way."""
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(stream.shape)
        lengths = [chain[0].shape[dim] for chain in chains]
        for number, chain in reversed(list(enumerate(chains))):
            beside = [sum(lengths[:number]), sum(lengths[number + 1 :])]
            padding = [0, 0] * (len(stream.shape) - 1 - dim) + beside
            turn = Turn(op=aten.constant_pad_nd, args=(HERE, padding), bound=True)
            for point, before in pairwise(chain):
                if point.op in ADDS:
                    other = next(n for n in point.inputs if n is not before)
                    terms = self._split(other, float(point.kwargs.get("alpha", 1.0)), {point.scope})
                    self.joins.append(Join(point, before, [Leaf(n, k, point, (*way, turn)) for n, k, way in terms]))
        return [n for chain in reversed(chains) for n in chain]

    def _split(self, node: Node, scale: float, scopes: set[str]) -> list[tuple[Node, float, tuple[Turn, ...]]]:
        """The terms of a sum made where the stream itself is summed (parallel branches), also if it is gated or cut."""
        inner, factor = unscaled(node, scale)[-1]
        if terms := self._terms(inner, scopes):
            return [t for n in terms for t in self._split(n, factor, scopes)]
        here, turns = node, tuple[Turn, ...]()
        while (here.op in SCALES or here.op in MOVES or here.op in PASSES) and (found := self.step(here)):
            bound = found[0].bound or here.op not in SCALES
            turns, here = (replace(found[0], bound=bound), *turns), found[1]
            if terms := self._terms(here, scopes):
                return [(n, k, (*way, *turns)) for t in terms for n, k, way in self._split(t, scale, scopes)]
        return [(node, scale, ())]

    def _terms(self, node: Node, scopes: set[str]) -> list[Node]:
        """What is summed, where it all depends on the stream."""
        summed = node.op in ADDS and node.scope in scopes and len(node.inputs) == 2
        terms = [n for n in node.inputs if not void(n)]
        alike = summed and node.inputs[0].shape == node.inputs[1].shape and all(map(self.moved, terms))
        return terms if alike else []

    def _number(self) -> None:
        """Every node of the stream → how many additions lie behind it."""
        points = {join.point.order for join in self.joins}
        place = 0
        for node in self._passed:
            place += node.order in points
            self.streams[node.order] = place


def _alone(node: Node) -> Node | None:
    """What a sum adds nothing to."""
    kept = [n for n in node.inputs if not void(n)]
    return kept[0] if len(kept) == 1 < len(node.inputs) else None


def _still(value: Any) -> Any:
    """Arguments with the tensors' own values in the place of their nodes."""
    return tree_map_only(Node, lambda n: n.value, value)


def _makers(calls: Iterable[Call]) -> dict[int, tuple[Call, Node]]:
    """Output node → the innermost light module that made it from one other tensor, and that tensor."""
    found: dict[int, tuple[Call, Node]] = {}
    for call in calls:
        made = [n for n in call.nodes if n is not None]
        read = [n for n in call.reads if n is not None]
        if len(made) != 1 or not read or made[0] in read or not light(call.module):
            continue
        alike = [n for n in read if n.shape == made[0].shape]
        if len(alike) == 1 and made[0].order not in found:
            found[made[0].order] = (call, alike[0])
    return found
