"""Linear maps that play the same part in neighbouring blocks: which of them may have something in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lamina.anatomy.anatomy import Anatomy
from lamina.core.sites import Site


def last_map(anatomy: Anatomy, sublayer: Site) -> str:
    """The path of the map by which a sublayer writes to the stream; '' where none is known."""
    branch = anatomy.branch(sublayer)
    if branch.tail:
        return f"{anatomy.block(sublayer).path}.{branch.tail}"
    return next((t for u in anatomy.units(sublayer) if (t := anatomy.tail(u))), "")


def parts(anatomy: Anatomy, sites: Iterable[str]) -> dict[str, str]:
    """Map → its part: its name inside its block, and its stack's where there are several; in depth order."""
    wanted = frozenset(sites)
    found = {}
    for stack in anatomy.stacks:
        for block in stack.blocks:
            for site in anatomy.linears(block.site):
                if site.id in wanted:
                    found[site.id] = f"{stack.name}:{site.id.removeprefix(f'{block.site.id}.')}"
    return found


def groups(anatomy: Anatomy, sites: Iterable[str], size: int) -> list[tuple[str, ...]]:
    """The maps in groups of at most `size` that have the same part in neighbouring blocks, and the same shape and type.

    Runs of neighbours are cut from their first on. The map by which a sublayer writes to the stream is alone.
    """
    part = parts(anatomy, sites)
    alone = {last_map(anatomy, x) for x in anatomy.sublayers if any(s.id in part for s in anatomy.linears(x))}
    found: list[list[str]] = []
    latest: dict[str, list[str]] = {}
    for name, own in part.items():
        held, site, weight = latest.get(own, []), anatomy.site(name), anatomy.weight(name)
        if held and len(held) < size and site.path not in alone:
            before, other = anatomy.site(held[-1]), anatomy.weight(held[-1])
            assert before.block is not None
            if site.block == before.block + 1 and (weight.shape, weight.dtype) == (other.shape, other.dtype):
                held.append(name)
                continue
        latest[own] = [name]
        found.append(latest[own])
    return [tuple(g) for g in found]


def tied(anatomy: Anatomy) -> frozenset[str]:
    """The maps that share their weights with another."""
    owner = {s.id: id(anatomy.model.get_submodule(s.path).weight) for s in anatomy.linears()}
    count = Counter(owner.values())
    return frozenset(s for s, o in owner.items() if count[o] > 1)
