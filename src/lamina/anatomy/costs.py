"""What each site costs: parameters and bytes exactly, multiply-adds as traced, KV bytes as a cache holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy.parts import Block, Ledger, Stack
from lamina.core.sites import Cost


def weigh(parameters: Iterable[nn.Parameter]) -> Cost:
    """Parameters and bytes, each storage once."""
    unique = {id(p): p for p in parameters}.values()
    return Cost(sum(p.numel() for p in unique), sum(p.numel() * p.element_size() for p in unique))


def kv_bytes(model: nn.Module, sample: Mapping[str, Any]) -> list[int]:
    """Bytes per token that each layer of the model's cache holds, in cache order; empty where there is none."""
    if not hasattr(getattr(model, "config", None), "use_cache"):
        return []
    with torch.no_grad():
        cache = getattr(model(**sample, use_cache=True), "past_key_values", None)
    sizes = []
    for layer in getattr(cache, "layers", []):
        held = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]
        sizes.append(sum(t.numel() * t.element_size() // (t.shape[0] * t.shape[-2]) for t in held))
    return sizes


def ledger(model: nn.Module, stacks: Iterable[Stack], sizes: list[int], macs: int) -> Ledger:
    """Costs of all blocks and sublayers, and of the whole model. A pass of a module has no parameters of its own."""
    found: dict[str, Cost] = {}
    for stack in stacks:
        cached = [b for block in stack.blocks for b in block.branches if b.cached]
        held = [s for s in sizes if s]
        kv = dict(zip((b.site.id for b in cached), held, strict=True)) if len(held) == len(cached) else {}
        for block in stack.blocks:
            found |= _block(model, block, kv)
    whole = weigh(model.parameters())
    return Ledger(found, Cost(whole.parameters, whole.bytes, macs, sum(sizes)))


def _block(model: nn.Module, block: Block, kv: Mapping[str, int]) -> dict[str, Cost]:
    module = model.get_submodule(block.path)
    found = {}
    for branch in block.branches:
        weight = weigh(p for _, p in branch.owned(module) if block.turns == 1)
        found[branch.site.id] = Cost(weight.parameters, weight.bytes, branch.macs, kv.get(branch.site.id, 0))
    weight = weigh(module.parameters() if block.turns == 1 else ())
    held = sum(kv.get(b.site.id, 0) for b in block.branches)
    found[block.site.id] = Cost(weight.parameters, weight.bytes, block.macs, held)
    return found
