"""Find the branches of a block: who computes what joins its stream, and how it can be taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamina.anatomy.joins import Joins, Leaf, light, unscaled
from lamina.anatomy.parts import SUBLAYER_NAMES, Branch, Turn
from lamina.anatomy.roles import kind_of
from lamina.anatomy.stacks import Seen
from lamina.anatomy.trace import PASSES, Call, Node, Trace, aten, first_tensor
from lamina.core.errors import CertificateError
from lamina.core.sites import Site


def upstream(node: Node, stops: set[int]) -> dict[int, Node]:
    """All nodes that `node` was computed from, up to (not including) the stops."""
    found: dict[int, Node] = {}
    todo = [node]
    while todo:
        here = todo.pop()
        if here.order in stops or here.order in found:
            continue
        found[here.order] = here
        todo.extend(here.inputs)
    return found


@dataclass(eq=False)
class _Term:
    """One thing that joins the stream, the nodes that made it, and those that made the others."""

    leaf: Leaf
    region: Mapping[int, Node]
    others: set[int]


def find_branches(seen: Seen, block_id: str, number: int) -> tuple[tuple[Branch, ...], tuple[Turn, ...], Trace]:
    """The branches of one block in the order in which they join, and what happens to the stream after the last.

    Runs the block on its recorded input. Raises CertificateError where the block is not its input plus branches.
    """
    trace = Trace(seen.module)
    source = trace.node(seen.entering)
    with trace.watching():
        output = seen.module(*seen.args, **seen.kwargs)
    out = first_tensor(output, tuple(seen.entering.shape))
    if out is None:
        raise CertificateError("the block returns no stream", where=block_id)
    joins = Joins(trace, source, trace.node(out), block_id)
    stops, leaves = set(joins.streams), joins.leaves
    regions = [upstream(leaf.node, stops) for leaf in leaves]
    before = {j.point.order: j.before for j in joins.joins}
    names: dict[str, int] = {}
    found = []
    for leaf, region in zip(leaves, regions, strict=True):
        others = set().union(*(r for r in regions if r is not region)) if len(regions) > 1 else set[int]()
        made = _Finder(trace, joins, seen, block_id).branch(_Term(leaf, region, others))
        entry = max(
            (joins.streams[n.order] for node in region.values() for n in node.inputs if n.order in joins.streams),
            default=0,
        )
        reads = tuple(i for i, other in enumerate(leaves) if joins.streams[other.point.order] <= entry)
        name = SUBLAYER_NAMES[made.site.kind]
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}_{names[name]}"
        site = Site(f"{block_id}.{name}", made.site.kind, f"{seen.path}.{made.core}", number)
        found.append(replace(made, site=site, reads=reads, before=before.pop(leaf.point.order, ())))
    return tuple(found), joins.after, trace


class _Finder:
    """Finds core, outlet and own modules of the branches of one traced block."""

    def __init__(self, trace: Trace, joins: Joins, seen: Seen, where: str) -> None:
        self.trace, self.joins, self.seen, self.where = trace, joins, seen, where
        points = [j.point.order for j in joins.joins]
        self.holding = {c.path for c in trace.calls if any(c.started < p < c.ended for p in points)}
        inner = [c for c in trace.calls if c.path not in self.holding]
        self.whole = [c for c in inner if not any(_within(c, o) for o in inner)]

    def branch(self, term: _Term) -> Branch:
        """All but its place among the others."""
        outlet, end, scale = self._outlet(term.leaf)
        serving = [c for c in self.whole if any(n is not None and n.order in term.region for n in c.nodes)]
        foreign = {c.path for c in self.whole if any(n is not None and n.order in term.others for n in c.nodes)}
        own = [c for c in serving if c.path not in foreign] or [outlet]
        core = max(own, key=lambda c: (_weight(c.module), -c.ended))
        place = _place(core, self.seen)
        kept: dict[str, Any] = {
            "core": core.path,
            "own": tuple(c.path for c in own if c is not core),
            "stream": place,
            "returns": returns_of(core.output),
        }
        inner = {c.path for c in own}
        kind = kind_of(self.trace, core, place, inner)
        if not self._silent(core, own):
            held = self._held(term, own)
            kept |= held[1] if held else {"widths": _widths(own, core)}
            kind = kind_of(self.trace, held[0], _place(held[0], self.seen), inner) if held else kind
        return Branch(
            site=Site(self.where, kind, core.path),
            outlet=outlet.path,
            reads=(),
            mutated=any(n.op is aten.add_ and n.inputs and n.inputs[0] is end for n in self.trace.all()),
            outlet_index=next(i for i, n in enumerate(outlet.nodes) if n is end),
            tail=_tail(self.trace, end),
            scale=scale,
            macs=sum(c.flops for c in own) // 2 // tokens_of(self.seen.entering),
            **kept,
        )

    def _outlet(self, leaf: Leaf) -> tuple[Call, Node, float]:
        """The outermost module whose output is what joins, but for numbers and reshapes."""
        for node, scale in unscaled(leaf.node, leaf.scale):
            makers = [c for c in self.trace.calls if c.path not in self.holding and any(n is node for n in c.nodes)]
            outer = [c for c in makers if not any(_within(c, o) for o in makers)]
            if outer:
                return outer[0], node, scale
        raise CertificateError(
            "no submodule's output is what joins the stream",
            where=self.where,
            hint="the branch is computed in the block",
        )

    def _silent(self, core: Call, own: Sequence[Call]) -> bool:
        """Whether zeros from the core are zeros where the branch joins, by construction.

        So it is where only reshapes and the branch's own modules, which then hand on what they get, lie between.
        """
        width = self.seen.entering.shape[-1]
        made = first_tensor(core.output)
        if made is None or made.shape[-1] != width:
            return _chain(own)
        return True

    def _held(self, term: _Term, own: Sequence[Call]) -> tuple[Call, dict[str, Any]] | None:
        """The module that adds this branch to a stream which it gets as an argument, and does nothing else to it."""
        for call in self.trace.calls:
            if call.path not in self.holding or not call.started < term.leaf.point.order < call.ended:
                continue
            inside = [j for j in self.joins.joins if call.started < j.point.order < call.ended]
            stream = next((j.stream for j in inside), None)
            if len(inside) != 1 or len(inside[0].leaves) != 1 or not self._hands_on(call, inside[0].point):
                continue
            for place, value in [*enumerate(call.args), *call.kwargs.items()]:
                if isinstance(value, Tensor) and stream is not None and self._is(value, stream):
                    outside = [c.path for c in own if not _within(c, call)]
                    return call, {
                        "core": call.path,
                        "own": tuple(outside),
                        "stream": place,
                        "returns": returns_of(call.output),
                        "joins": True,
                    }
        return None

    def _hands_on(self, call: Call, point: Node) -> bool:
        """Whether the call returns the sum as it is."""
        made = first_tensor(call.output)
        node = None if made is None else self.trace.node(made)
        while node is not None and node is not point and node.op in PASSES:
            node = node.inputs[0]
        return node is point

    def _is(self, value: Tensor, stream: Node) -> bool:
        node = self.trace.node(value)
        while stream is not node and stream.op in PASSES:
            stream = stream.inputs[0]
        return stream is node


def _within(call: Call, other: Call) -> bool:
    """Whether the other call encloses this one."""
    return call is not other and other.started < call.started and call.ended < other.ended


def _chain(own: Sequence[Call]) -> bool:
    """Whether a branch's modules work position by position on last dimensions alone: zeros of any width pass."""
    return all(isinstance(c.module, nn.Linear) or light(c.module) or not list(c.module.children()) for c in own)


def _widths(own: Sequence[Call], core: Call) -> tuple[tuple[str, int], ...]:
    """What each module with a matrix returns, in features."""
    found = []
    for call in own:
        made = first_tensor(call.output)
        if made is not None and (call is core or not light(call.module)):
            found.append((call.path, int(made.shape[-1])))
    return tuple(found)


def _tail(trace: Trace, end: Node) -> str:
    """The innermost module with a matrix whose output is the node that joins."""
    makers = [c for c in trace.calls if any(n is end for n in c.nodes) and not list(c.module.children())]
    linear = [c for c in makers if getattr(getattr(c.module, "weight", None), "ndim", 0) == 2]
    return linear[0].path if linear else ""


def tokens_of(stream: Tensor) -> int:
    """How many positions a stream [batch, tokens, width] has."""
    return max(stream[..., 0].numel(), 1)


def _weight(module: nn.Module) -> int:
    """Parameters of matrices: norms have none."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def _place(core: Call, seen: Seen) -> int | str:
    """Where the core takes its tokens: the first argument shaped like the stream, or with as many numbers."""
    given = [(p, v) for p, v in [*enumerate(core.args), *core.kwargs.items()] if isinstance(v, Tensor)]
    given = [(p, v) for p, v in given if v.is_floating_point()]
    alike = [p for p, v in given if v.shape == seen.entering.shape]
    alike += [p for p, v in given if v.numel() == seen.entering.numel() and v.shape[-1] == seen.entering.shape[-1]]
    alike += [p for p, v in given if v.ndim > 1 and v.shape[:-1] == seen.entering.shape[:-1]]
    if not alike:
        raise CertificateError("the branch's core does not read the stream", where=f"{seen.path}.{core.path}")
    return alike[0]


def returns_of(output: Any) -> tuple[tuple[int, int], ...]:
    """((index, arity), …) down to the first tensor of a nested tuple."""
    path: list[tuple[int, int]] = []
    while isinstance(output, tuple | list):
        index = next(i for i, x in enumerate(output) if any(isinstance(t, Tensor) for t in tree_leaves(x)))
        path.append((index, len(output)))
        output = output[index]
    return tuple(path)
