"""Find the branches of a block: who computes what joins its stream, and how it can be taken away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from lamina.anatomy.joins import MOVES, PUTS, Joins, Leaf, StreamError, light, unscaled, void
from lamina.anatomy.parts import SUBLAYER_NAMES, Branch, Turn
from lamina.anatomy.roles import SOFTMAX, kind_of
from lamina.anatomy.stacks import Seen
from lamina.anatomy.trace import ADDS, PASSES, SCALES, Call, Node, Trace, aten, first_tensor, fresh
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


def find_stream(seen: Seen, where: str) -> tuple[Trace, Joins, Any]:
    """What a block does when it runs on its recorded input, how the stream goes through it, and what it returns.

    Raises StreamError where none does.
    """
    trace = Trace(seen.module)
    source = trace.node(seen.entering)
    args, kwargs = fresh((seen.args, seen.kwargs))
    with trace.watching():
        output = seen.module(*args, **kwargs)
    out = first_tensor(output, tuple(seen.entering.shape))
    if out is None:
        raise StreamError("the block returns no stream", where=where)
    return trace, Joins(trace, source, trace.node(out), where), output


def find_branches(
    seen: Seen, block_id: str, number: int, carried: Sequence[int] = ()
) -> tuple[tuple[Branch, ...], tuple[Turn, ...], Trace, bool]:
    """The branches of one block in the order in which they join, and what happens to the stream after the last.

    Also what was traced, and whether the block computes any of what the next one reads beside the stream.

    `carried` are the places, in what the block returns, of what the next one reads beside the stream.
    Runs the block on its recorded input. Raises CertificateError where the block is not its input plus branches.
    """
    trace, joins, output = find_stream(seen, block_id)
    beside = [output[i] for i in carried if isinstance(output, tuple | list) and i < len(output)]
    stops, leaves = set(joins.streams), joins.leaves
    regions = [upstream(leaf.node, stops) for leaf in leaves]
    before = {j.point.order: j.before for j in joins.joins}
    names: dict[str, int] = {}
    found = []
    for leaf, region in zip(leaves, regions, strict=True):
        others = set().union(*(r for r in regions if r is not region)) if len(regions) > 1 else set[int]()
        made = _Finder(trace, joins, seen, block_id, beside).branch(_Term(leaf, region, others))
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
    tells = any(trace.node(t).op is not None for t in beside if isinstance(t, Tensor))
    return tuple(found), joins.after, trace, tells


class _Finder:
    """Finds core, outlet and own modules of the branches of one traced block."""

    def __init__(self, trace: Trace, joins: Joins, seen: Seen, where: str, beside: Sequence[Any] = ()) -> None:
        self.trace, self.joins, self.seen, self.where, self.beside = trace, joins, seen, where, beside
        points = [j.point.order for j in joins.joins]
        self.holding = {c.path for c in trace.calls if any(c.started < p < c.ended for p in points)}
        self.often = Counter(c.path for c in trace.calls)
        inner = [c for c in trace.calls if c.path not in self.holding]
        self.whole = [c for c in inner if not any(_within(c, o) for o in inner)]

    def branch(self, term: _Term) -> Branch:
        """All but its place among the others."""
        outlet, end, scale, way, bound = self._outlet(term.leaf)
        own = self._own(term, end) or [outlet]
        core = max(own, key=lambda c: (_weight(c.module), -c.ended))
        core = core if _weight(core.module) else outlet
        own = [c for c in own if c is core or sum(n is not None for n in c.nodes) == 1]
        place = _place(core, self.seen)
        kept: dict[str, Any] = {
            "core": core.path,
            "own": tuple(c.path for c in own if c is not core),
            "stream": place,
            "returns": returns_of(core.output),
            "hands": self._hands(core),
            "tells": self._tells(core),
        }
        inner = {c.path for c in own}
        kind = kind_of(self.trace, core, place, inner)
        if not self._silent(core, place, outlet):
            held = self._held(term, own) if self._computes(term, own) else None
            if held is None and not _weight(core.module):
                raise CertificateError(
                    "no submodule of its own computes the branch",
                    where=self.where,
                    hint=f"it is computed in {core.path.rpartition('.')[0] or 'the block'}",
                )
            kept |= held[1] if held else {"widths": _widths(own, core)}
            kind = kind_of(self.trace, held[0], _place(held[0], self.seen), {held[0].path}) if held else kind
        elif sum(_weight(c.module) > 0 for c in own) > 1:
            kept["widths"] = _widths(own, core)
        return Branch(
            site=Site(self.where, kind, core.path),
            outlet=outlet.path,
            outlet_call=self._which(outlet),
            reads=(),
            mutated=any(n.op is aten.add_ and n.inputs and n.inputs[0] is end for n in self.trace.all()),
            outlet_index=next(i for i, n in enumerate(outlet.nodes) if n is end),
            tail=_tail(self.trace, end),
            scale=scale,
            way=way,
            bound=bound,
            macs=self.seen.products(sum(c.flops for c in own)),
            **kept,
        )

    def _which(self, outlet: Call) -> int | None:
        """Which of its calls this is; None where it is called once."""
        calls = sorted((c for c in self.trace.calls if c.path == outlet.path), key=lambda c: c.started)
        return None if len(calls) == 1 else next(n for n, c in enumerate(calls) if c is outlet)

    def _hands(self, core: Call) -> tuple[tuple[int, int | str], ...]:
        """What the core returns beside its result and was given: (place in what it returns, position or keyword)."""
        given = [*enumerate(core.args), *core.kwargs.items()]
        out = core.output if isinstance(core.output, tuple | list) else ()
        main = first_tensor(core.output)
        pairs = ((i, p) for i, v in enumerate(out) for p, g in given if isinstance(v, Tensor) and v is g)
        return tuple((i, p) for i, p in pairs if out[i] is not main)

    def _tells(self, core: Call) -> bool:
        """Whether the core computes something that the next block reads beside the stream."""
        calls = [c for c in self.trace.calls if c.path == core.path]
        made = {n.order for c in calls for n in c.nodes if n is not None and n not in c.reads}
        stops = set(self.joins.streams)
        return any(made & set(upstream(self.trace.node(t), stops)) for t in self.beside if isinstance(t, Tensor))

    def _own(self, term: _Term, end: Node) -> list[Call]:
        """The modules that serve this branch alone: neither another one, nor the stream, nor what gates the branch."""
        mine = upstream(end, set(self.joins.streams))
        apart = term.others | set(self.joins.streams) | (set(term.region) - set(mine))
        apart.discard(end.order)
        apart -= {node.order for node, _ in unscaled(term.leaf.node)}
        made = [(c, [n.order for n in c.nodes if n is not None]) for c in self.whole]
        foreign = {c.path for c, nodes in made if any(n in apart for n in nodes)}
        found = {c.path: c for c, nodes in made if any(n in mine for n in nodes) and c.path not in foreign}
        return list(found.values())

    def _outlet(self, leaf: Leaf) -> tuple[Call, Node, float, tuple[Turn, ...], bool]:
        """The outermost module whose output is what joins, but for numbers and reshapes: its call, node and factor.

        Where more lies between, also the way from there, and whether that depends on the sample's inputs. A module that
        is called several times is taken where there is no other.
        """
        for once in (True, False):
            for node, scale in () if leaf.way else unscaled(leaf.node, leaf.scale):
                if maker := self._maker(node, once):
                    return maker, node, scale, (), False
            if found := self._outlet_behind(leaf, once):
                return found
        raise CertificateError(
            "no submodule's output is what joins the stream",
            where=self.where,
            hint="the branch is computed in the block",
        )

    def _outlet_behind(self, leaf: Leaf, once: bool) -> tuple[Call, Node, float, tuple[Turn, ...], bool] | None:
        """The same, one operation after the other on the way back."""
        node, way = leaf.node, list(reversed(leaf.way))
        bound = any(t.bound for t in way)
        if way and (maker := self._maker(node, once)):
            return maker, node, leaf.scale, leaf.way, bound
        while node.op in MOVES or node.op in PASSES or node.op in SCALES or node.op in ADDS or node.op in PUTS:
            found = self.joins.step(node) or self._gated(node) or self._put(node)
            if found is None:
                break
            way.append(found[0])
            bound = bound or found[0].bound or node.op in MOVES or node.op in PASSES
            node = found[1]
            if maker := self._maker(node, once):
                return maker, node, leaf.scale, tuple(reversed(way)), bound
        return None

    def _gated(self, node: Node) -> tuple[Turn, Node] | None:
        """A product of two that both depend on the stream: the later made is the branch, the other its gate."""
        if node.op not in SCALES or "mul" not in str(node.op) or len(node.inputs) != 2:
            return None
        late = max(node.inputs, key=lambda n: unscaled(n)[-1][0].order)
        return self.joins.step(node, late)

    def _put(self, node: Node) -> tuple[Turn, Node] | None:
        """Numbers put into places of a tensor of zeros, and what they were before."""
        if node.op not in PUTS or node.value is None or not void(node.args[0]):
            return None
        values = node.args[2]
        found = self.joins.step(node, values)
        if found is None:
            return None
        turn = replace(found[0], op=aten.index_put, args=(torch.zeros_like(node.value), *found[0].args[1:]))
        return turn, values

    def _maker(self, node: Node, once: bool) -> Call | None:
        """The outermost module, of those that do not join anything (and are called `once`), that returns this node."""
        makers = [
            c
            for c in self.trace.calls
            if c.path not in self.holding and (self.often[c.path] == 1 or not once) and any(n is node for n in c.nodes)
        ]
        return next((c for c in makers if not any(_within(c, o) for o in makers)), None)

    def _silent(self, core: Call, place: int | str, outlet: Call) -> bool:
        """Whether zeros like the core's tokens, in the place of what it returns, are zeros where the branch joins."""
        made = first_tensor(core.output)
        tokens = core.args[place] if isinstance(place, int) else core.kwargs[place]
        wide = made is not None and made.shape[-1] == tokens.shape[-1] and _weight(core.module) > 0
        return wide and (outlet is core or light(outlet.module))

    def _computes(self, term: _Term, own: Sequence[Call]) -> bool:
        """Whether more than numbers one by one is computed outside the branch's own modules."""
        inside = tuple(c.path for c in own if _weight(c.module))
        loose = [
            n for n in term.region.values() if not any(n.scope == p or n.scope.startswith(p + ".") for p in inside)
        ]
        return not inside or any(n.op in flop_registry or n.op in SOFTMAX for n in loose)

    def _held(self, term: _Term, own: Sequence[Call]) -> tuple[Call, dict[str, Any]] | None:
        """The module that adds this branch to a stream which it gets as an argument, and does nothing else to it."""
        for call in self.trace.calls:
            if call.path not in self.holding or not call.started < term.leaf.point.order < call.ended:
                continue
            inside = [j for j in self.joins.joins if call.started < j.point.order < call.ended]
            keeps = self._hands_on(call, inside[0].point) if len(inside) == 1 and len(inside[0].leaves) == 1 else None
            if keeps is None or self._turns_before(call, inside[0].stream):
                continue
            for place, value in [*enumerate(call.args), *call.kwargs.items()]:
                if isinstance(value, Tensor) and self._is(value, inside[0].stream):
                    return call, {
                        "core": call.path,
                        "own": tuple(c.path for c in own if not _within(c, call)),
                        "stream": place,
                        "returns": returns_of(call.output),
                        "joins": True,
                        "keeps": keeps,
                    }
        return None

    def _hands_on(self, call: Call, point: Node) -> tuple[str, ...] | None:
        """The modules, inside the call, that the sum goes through before the call returns it; None if it doesn't."""
        made, keeps = first_tensor(call.output), list[str]()
        node = None if made is None else self.trace.node(made)
        while node is not None and node is not point:
            maker = self.joins.makers.get(node.order)
            if maker is not None and maker[0].path.startswith(call.path + "."):
                keeps.append(maker[0].path.removeprefix(call.path + "."))
                node = maker[1]
            else:
                node = node.inputs[0] if node.op in PASSES else None
        return None if node is None else tuple(reversed(keeps))

    def _turns_before(self, call: Call, stream: Node) -> bool:
        """Whether the stream that is added to was changed inside the call."""
        return call.started < stream.order < call.ended and stream.op not in PASSES

    def _is(self, value: Tensor, stream: Node) -> bool:
        node = self.trace.node(value)
        while stream is not node and stream.op in PASSES:
            stream = stream.inputs[0]
        return stream is node


def _within(call: Call, other: Call) -> bool:
    """Whether the other call encloses this one."""
    return call is not other and other.started < call.started and call.ended < other.ended


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
    alike += [p for p, v in given if v.ndim > 2 and v.shape[:2] == seen.entering.shape[:2]]
    alike += [p for p, v in given if v.numel() == seen.entering.numel()]
    alike += [p for p, v in given if v.ndim > 1]
    if not alike:
        raise CertificateError("the branch's core does not read the stream", where=f"{seen.path}.{core.path}")
    return alike[0]


def returns_of(output: Any, stream: Tensor | None = None) -> tuple[tuple[Any, ...], ...]:
    """((index, arity), …) down to the first tensor of a nested tuple; (index, arity, "list") where it is a list.

    With a `stream`, down to the first that is shaped like it.
    """
    shape = None if stream is None or first_tensor(output, tuple(stream.shape)) is None else tuple(stream.shape)
    path: list[tuple[Any, ...]] = []
    while isinstance(output, tuple | list):
        index = next(i for i, x in enumerate(output) if first_tensor(x, shape) is not None)
        path.append((index, len(output), *(("list",) if isinstance(output, list) else ())))
        output = output[index]
    return tuple(path)
