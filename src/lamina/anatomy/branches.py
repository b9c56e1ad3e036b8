"""Find the branches of a block: follow the additions back from its output to its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from lamina.anatomy.parts import SUBLAYER_NAMES, Branch
from lamina.anatomy.stacks import Seen
from lamina.anatomy.trace import ADDS, PASSES, SCALES, Call, Node, Trace, aten, first_tensor
from lamina.core.errors import CertificateError
from lamina.core.sites import Kind, Site

SOFTMAX = frozenset(
    {
        aten._softmax, aten._safe_softmax, aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_attention_math,
        aten._scaled_dot_product_fused_attention_overrideable,
    }
)  # fmt: skip
ROUTING = frozenset({aten.topk, aten.sort})
ZEROS = frozenset({aten.zeros_like, aten.zeros, aten.new_zeros})
"""Made from nothing: what stands where a dropped branch stood, so no branch."""


@dataclass(eq=False)
class Leaf:
    """What one addition joins to the stream: a node times a factor, and the branches joined before it."""

    node: Node
    scale: float
    depth: int


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


class Joins:
    """The additions that lead from a block's input to its output."""

    def __init__(self, source: Node, output: Node, where: str) -> None:
        self.source, self.where = source, where
        self._known: dict[int, bool] = {}
        self.scopes: set[str] = set()
        self.points: list[Node] = []
        self.leaves: list[Leaf] = []
        if not self.carries(output):
            raise CertificateError(
                "the block's output is not its input plus branches",
                where=where,
                hint="no chain of additions joins them",
            )
        self._walk(output)
        self.points.reverse()
        self.leaves.sort(key=lambda leaf: leaf.node.order)

    def carries(self, node: Node) -> bool:
        """Whether the stream reaches `node` through additions and reshapes alone."""
        if node is self.source:
            return True
        if node.order not in self._known:
            via = node.inputs if node.op in ADDS else node.inputs[:1] if node.op in PASSES else ()
            self._known[node.order] = any(self.carries(n) for n in via)
        return self._known[node.order]

    def _walk(self, node: Node) -> None:
        """From the output back to the source, one addition at a time."""
        while node is not self.source:
            if node.op in PASSES:
                node = node.inputs[0]
                continue
            if len(node.inputs) != 2:
                raise CertificateError("a number is added to the stream", where=self.where)
            self.scopes.add(node.scope)
            self.points.append(node)
            stream = [n for n in node.inputs if self.carries(n)]
            others = [n for n in node.inputs if not self.carries(n)]
            if len(stream) != 1:
                raise CertificateError("the stream is added to itself", where=self.where)
            alpha = float(node.kwargs.get("alpha", 1.0))
            self.leaves += [Leaf(n, scale, len(self.points)) for n, scale in self._split(others[0], alpha)]
            node = stream[0]

    def _split(self, node: Node, scale: float) -> list[tuple[Node, float]]:
        """The terms of a sum made where the stream itself is summed (parallel branches)."""
        inner, factor = unscaled(node, scale)[-1]
        summed = inner.op in ADDS and inner.scope in self.scopes and len(inner.inputs) == 2
        if summed and inner.inputs[0].shape == inner.inputs[1].shape:
            return [t for n in inner.inputs for t in self._split(n, factor)]
        return [(node, scale)]


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


def find_branches(seen: Seen, block_id: str, number: int) -> tuple[tuple[Branch, ...], Trace]:
    """The branches of one block in the order in which they join, by running it on its recorded input.

    Raises CertificateError where the block is not its input plus branches.
    """
    trace = Trace(seen.module)
    source = trace.node(seen.entering)
    with trace.watching():
        output = seen.module(*seen.args, **seen.kwargs)
    out = first_tensor(output, tuple(seen.entering.shape))
    if out is None:
        raise CertificateError("the block returns no stream", where=block_id)
    joins = Joins(source, trace.node(out), block_id)
    streams = {source.order: 0}
    for place, point in enumerate(joins.points):
        streams[point.order] = place + 1
    total = len(joins.points)
    leaves = [leaf for leaf in joins.leaves if unscaled(leaf.node)[-1][0].op not in ZEROS]
    joined_before = {
        place: tuple(i for i, leaf in enumerate(leaves) if total - leaf.depth < place) for place in range(total + 1)
    }
    regions = [upstream(leaf.node, set(streams)) for leaf in leaves]
    names: dict[str, int] = {}
    found = []
    for leaf, region in zip(leaves, regions, strict=True):
        others = set().union(*(r for r in regions if r is not region)) if len(regions) > 1 else set[int]()
        entry = max(
            (streams[n.order] for node in region.values() for n in node.inputs if n.order in streams), default=0
        )
        part = _branch(trace, leaf, region, others, seen, block_id)
        name = SUBLAYER_NAMES[part["kind"]]
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}_{names[name]}"
        path = f"{seen.path}.{part['core']}"
        site = Site(f"{block_id}.{name}", part.pop("kind"), path, number)
        found.append(Branch(site=site, reads=joined_before[entry], **part))
    return tuple(found), trace


def _branch(
    trace: Trace, leaf: Leaf, region: Mapping[int, Node], others: set[int], seen: Seen, block_id: str
) -> dict[str, Any]:
    """Core, outlet and own modules of the branch that `leaf` joins."""
    top = [c for c in trace.calls if _top(c, trace.calls)]
    serving = [c for c in top if any(n is not None and n.order in region for n in c.nodes)]
    met = unscaled(leaf.node, leaf.scale)
    joining = next(((c, n, x) for n, x in met for c in top if any(m is n for m in c.nodes)), None)
    if joining is None:
        raise CertificateError(
            "no submodule's output is what joins the stream", where=block_id, hint="the branch is computed in the block"
        )
    outlet, end, scale = joining
    foreign = {c.path for c in top if any(n is not None and n.order in others for n in c.nodes)}
    own = [c for c in serving if c.path not in foreign]
    core = max(own, key=lambda c: (_weight(c.module), -c.ended), default=outlet)
    return {
        "kind": _kind(trace, core, seen),
        "core": core.path,
        "own": tuple(c.path for c in own if c is not core),
        "outlet": outlet.path,
        "mutated": any(n.op is aten.add_ and n.inputs and n.inputs[0] is end for n in trace.all()),
        "outlet_index": next(i for i, n in enumerate(outlet.nodes) if n is end),
        "tail": _tail(trace, end),
        "scale": scale,
        "stream": _place(core, seen),
        "returns": returns_of(core.output),
        "macs": sum(c.flops for c in own) // 2 // _tokens(seen.entering),
    }


def _tail(trace: Trace, end: Node) -> str:
    """The innermost module with a matrix whose output is the node that joins."""
    makers = [c for c in trace.calls if any(n is end for n in c.nodes) and not list(c.module.children())]
    linear = [c for c in makers if getattr(getattr(c.module, "weight", None), "ndim", 0) == 2]
    return linear[0].path if linear else ""


def _tokens(stream: Tensor) -> int:
    return max(stream[..., 0].numel(), 1)


def _top(call: Call, calls: list[Call]) -> bool:
    """Whether no other call encloses this one."""
    return not any(c is not call and c.started < call.started and c.ended > call.ended for c in calls)


def _weight(module: nn.Module) -> int:
    """Parameters of matrices: norms have none."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def _place(core: Call, seen: Seen) -> int | str:
    """Where the core takes its tokens: the first argument shaped like the stream."""
    for place, value in [*enumerate(core.args), *core.kwargs.items()]:
        if isinstance(value, Tensor) and value.shape == seen.entering.shape:
            return place
    raise CertificateError("the branch's core does not read the stream", where=f"{seen.path}.{core.path}")


def returns_of(output: Any) -> tuple[tuple[int, int], ...]:
    """((index, arity), …) down to the first tensor of a nested tuple."""
    path: list[tuple[int, int]] = []
    while isinstance(output, tuple | list):
        index = next(i for i, x in enumerate(output) if any(isinstance(t, Tensor) for t in tree_leaves(x)))
        path.append((index, len(output)))
        output = output[index]
    return tuple(path)


def _kind(trace: Trace, core: Call, seen: Seen) -> Kind:
    """What the core does: mixes positions (with a softmax or not), or routes tokens to experts, or neither."""
    ops = {op for scope, op in trace.ops if scope == core.path or scope.startswith(core.path + ".")}
    if _mixes(core, seen):
        return Kind.ATTENTION if ops & SOFTMAX else Kind.MIXER
    return Kind.MOE if ops & ROUTING else Kind.MLP


def _mixes(core: Call, seen: Seen) -> bool:
    """Whether a change at the first position reaches any other."""
    place = _place(core, seen)
    before = core.args[place] if isinstance(place, int) else core.kwargs[place]
    if before.ndim < 3 or before.shape[1] < 2:
        return False
    changed = before.clone()
    changed[:, 0] = changed[:, 0].flip(-1) + 1
    swap = lambda t: changed if t is before else t  # noqa: E731
    args, kwargs = tree_map_only(Tensor, swap, (tuple(core.args), dict(core.kwargs)))
    with torch.no_grad():
        clean = first_tensor(core.module(*core.args, **core.kwargs))
        filler = _filler(core.module) if clean is not None and not clean.any() else {}
        if filler:
            clean = first_tensor(functional_call(core.module, filler, core.args, dict(core.kwargs)))
        out = first_tensor(functional_call(core.module, filler, args, kwargs))
    if out is None or clean is None:
        return False
    change = (out[:, 1:].float() - clean[:, 1:].float()).norm()
    return bool(change > 1e-3 * clean[:, 1:].float().norm())


def _filler(module: nn.Module) -> dict[str, Tensor]:
    """Numbers in the place of all-zero parameters: a branch that adds nothing yet still shows what it mixes."""
    return {
        name: torch.arange(1.0, p.numel() + 1, device=p.device).cos().view_as(p).to(p.dtype) / 8
        for name, p in module.named_parameters()
        if not p.any()
    }
