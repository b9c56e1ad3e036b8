"""What each site costs: parameters and bytes exactly, multiply-adds as traced, KV bytes as a cache holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy.parts import Block, Ledger, Stack
from lamina.anatomy.stacks import caches
from lamina.core.sites import Cost, Kind


def weigh(parameters: Iterable[nn.Parameter]) -> Cost:
    """Parameters and bytes, each storage once."""
    unique = {id(p): p for p in parameters}.values()
    return Cost(sum(p.numel() for p in unique), sum(p.numel() * p.element_size() for p in unique))


def kv_bytes(model: nn.Module, sample: Mapping[str, Any]) -> dict[Kind, list[int]]:
    """Bytes per token that each layer of the model's cache holds, in cache order; empty where there is none.

    Of an encoder-decoder also what its cross-attentions hold, per token of the encoder's. A model that fails with a
    cache has none.
    """
    if not caches(model):
        return {}
    with torch.no_grad(), suppress(Exception):
        cache = getattr(model(**{**sample, "use_cache": True}), "past_key_values", None)
        inner = getattr(cache, "self_attention_cache", cache)
        found = {
            Kind.ATTENTION: _sizes(inner),
            Kind.CROSS_ATTENTION: _sizes(getattr(cache, "cross_attention_cache", None)),
        }
        return {k: v for k, v in found.items() if any(v)}
    return {}


def _sizes(cache: Any) -> list[int]:
    sizes = []
    for layer in getattr(cache, "layers", []):
        found = (getattr(layer, "keys", None), getattr(layer, "values", None))
        held = [t for t in found if isinstance(t, Tensor) and t.ndim > 2 and t.numel()]
        sizes.append(sum(t.numel() * t.element_size() // (t.shape[0] * t.shape[-2]) for t in held))
    return sizes


def ledger(model: nn.Module, stacks: Sequence[Stack], sizes: Mapping[Kind, list[int]], macs: int) -> Ledger:
    """Costs of all blocks and sublayers, and of the whole model. A pass of a module has no parameters of its own.

    Where sublayers and cache entries can't be told to be each other's, only the whole model has KV bytes.
    """
    found: dict[str, Cost] = {}
    for stack in stacks:
        kv = dict[str, int]()
        parts = [x for b in stack.blocks for x in b.branches]
        decodes = any(x.site.kind is Kind.CROSS_ATTENTION for x in parts)
        for kind, held in sizes.items():
            mine = [x for x in parts if (x.site.kind is kind if kind is Kind.CROSS_ATTENTION else x.cached)]
            entries = [s for s in held if s]
            if len(entries) == len(mine) and (decodes or Kind.CROSS_ATTENTION not in sizes):
                kv |= dict(zip((x.site.id for x in mine), entries, strict=True))
        for block in stack.blocks:
            found |= _block(model, block, kv)
    whole = weigh(model.parameters())
    return Ledger(found, Cost(whole.parameters, whole.bytes, macs, sum(map(sum, sizes.values()))))


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


@dataclass(frozen=True)
class Tied:
    """A tensor that sublayers of several blocks hold in common: what it takes, and the block of each that holds it."""

    cost: Cost
    holders: Mapping[str, str]


def tied(model: nn.Module, stacks: Sequence[Stack]) -> tuple[Tied, ...]:
    """All tensors that are stored once for several blocks."""
    holders: dict[int, dict[str, str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for block in (b for k in stacks for b in k.blocks if b.turns == 1):
        module = model.get_submodule(block.path)
        for branch in block.branches:
            for _, parameter in branch.owned(module):
                tensors[id(parameter)] = parameter
                holders.setdefault(id(parameter), {})[branch.site.id] = block.site.id
    several = {key: held for key, held in holders.items() if len(set(held.values())) > 1}
    return tuple(Tied(weigh([tensors[key]]), held) for key, held in several.items())


def still_held(tensors: Iterable[Tied], gone: Iterable[str]) -> Cost:
    """What dropping these sublayers does not free though each of them holds it: others do too, or it was told twice."""
    out, total = frozenset(gone), Cost()
    for one in tensors:
        counted = len({block for site, block in one.holders.items() if site in out})
        freed = 1 if out.issuperset(one.holders) else 0
        for _ in range(counted - freed):
            total += one.cost
    return total
