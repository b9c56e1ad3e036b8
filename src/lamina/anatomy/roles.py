"""What a branch is, by what its core does: mixes positions or not, reads a second sequence, routes to experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from lamina.anatomy.trace import Call, Trace, aten, first_tensor, fresh
from lamina.core.sites import Kind

SOFTMAX = frozenset(
    {
        aten._softmax, aten._safe_softmax, aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_attention_math,
        aten._scaled_dot_product_fused_attention_overrideable,
    }
)  # fmt: skip
ROUTING = frozenset({aten.topk, aten.sort})


def kind_of(trace: Trace, core: Call, place: int | str, region: set[str]) -> Kind:
    """What the core does: mixes positions (with a softmax or not), or routes tokens to experts, or neither.

    `place` is where it takes the tokens; `region` the paths of all modules of the branch.
    """
    ops = {op for scope, op in trace.ops if any(scope == p or scope.startswith(p + ".") for p in region)}
    if mixes(core, place):
        return Kind.ATTENTION if ops & SOFTMAX else Kind.MIXER
    if ops & SOFTMAX and not ops & ROUTING and _reads_another(core, place):
        return Kind.CROSS_ATTENTION
    return Kind.MOE if ops & ROUTING else Kind.MLP


def _tokens(core: Call, place: int | str) -> Tensor:
    return core.args[place] if isinstance(place, int) else core.kwargs[place]


def _run(core: Call, filler: dict[str, Tensor], swap: Any) -> Tensor | None:
    """What the core makes of its inputs, some of them changed."""
    args, kwargs = fresh(tree_map_only(Tensor, swap, (tuple(core.args), dict(core.kwargs))))
    with torch.no_grad():
        return first_tensor(functional_call(core.module, filler, args, kwargs))


def mixes(core: Call, place: int | str) -> bool:
    """Whether a change at the first position reaches any other; positions may lie along any dimension but the last."""
    before = _tokens(core, place)
    clean, filler = _clean(core)
    if clean is None:
        return False
    for dim in range(min(before.ndim, clean.ndim) - 1):
        if before.shape[dim] < 2 or clean.shape[dim] != before.shape[dim]:
            continue
        changed = before.clone()
        changed.select(dim, 0).copy_(before.select(dim, 0).flip(-1) + 1)
        out = _run(core, filler, lambda t, changed=changed: changed if t is before else t)
        if out is None:
            continue
        rest, due = (t.narrow(dim, 1, t.shape[dim] - 1).float() for t in (out, clean))
        if bool((rest - due).norm() > 1e-3 * due.norm()):
            return True
    return False


def _reads_another(core: Call, place: int | str) -> bool:
    """Whether a change of another floating-point input, three-dimensional and of any length, changes the output."""
    tokens = _tokens(core, place)
    others = [
        t
        for t in tree_leaves((core.args, core.kwargs))
        if isinstance(t, Tensor) and t is not tokens and t.is_floating_point() and t.ndim == 3
    ]
    clean, filler = _clean(core)
    for other in others:
        out = _run(core, filler, lambda t, other=other: t.flip(-1) + 1 if t is other else t)
        if out is not None and clean is not None and bool((out - clean).norm() > 1e-3 * clean.norm()):
            return True
    return False


def _clean(core: Call) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The core's output on its inputs as they were, and numbers in the place of all-zero parameters if it is zero."""
    clean = _run(core, {}, lambda t: t)
    filler = _filler(core.module) if clean is not None and not clean.any() else {}
    return (_run(core, filler, lambda t: t) if filler else clean), filler


def _filler(module: nn.Module) -> dict[str, Tensor]:
    """Numbers in the place of all-zero parameters: a branch that adds nothing yet still shows what it mixes."""
    return {
        name: torch.arange(1.0, p.numel() + 1, device=p.device).cos().view_as(p).to(p.dtype) / 8
        for name, p in module.named_parameters()
        if not p.any()
    }
