"""Sites: what a method can score or change, and what each one costs."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import total_ordering


class Kind(StrEnum):
    """What a site is, by what it does and not by its class's name."""

    BLOCK = "block"
    ATTENTION = "attention"
    CROSS_ATTENTION = "cross_attention"
    MLP = "mlp"
    MOE = "moe"
    MIXER = "mixer"
    NORM = "norm"
    LINEAR = "linear"
    HEAD = "head"
    KV_GROUP = "kv_group"
    NEURON = "neuron"
    CHANNEL = "channel"
    EXPERT = "expert"


SUBLAYERS = frozenset({Kind.ATTENTION, Kind.CROSS_ATTENTION, Kind.MLP, Kind.MOE, Kind.MIXER})
"""The kinds that are residual branches of a block."""


def depth_key(site_id: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key under which `block.2` comes before `block.10`."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"\.", site_id))


@total_ordering
@dataclass(frozen=True)
class Site:
    """One place of a model: a block, a residual branch of it, or `width` equal units inside.

    `id` is canonical (`block.7.attention`), `path` is the module's path in this model.
    """

    id: str
    kind: Kind
    path: str
    block: int | None = None
    width: int = 1

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        return depth_key(self.id) < depth_key(other.id)


@dataclass(frozen=True)
class Tie:
    """Unit i owns the slice [start + i*size, start + (i+1)*size) of `param` along `dim`."""

    param: str
    dim: int
    size: int = 1
    start: int = 0


@dataclass(frozen=True)
class Cost:
    """What a site takes: parameters, bytes of weights, multiply-adds per token, KV bytes per token."""

    parameters: int = 0
    bytes: int = 0
    macs: int = 0
    kv_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))
