"""Menus: everything that can be done to a model, priced in damage and in resources; a plan is a choice from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lamina.core.documents import Step


@dataclass(frozen=True, kw_only=True)
class Option:
    """One thing that can be done: its steps, what it frees of each resource, and what it should cost in nats.

    `groups` are the places that it takes: no place is taken by two options of a plan.
    """

    name: str
    groups: tuple[str, ...]
    steps: tuple[Step, ...]
    damage: float
    saves: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The rewrites that it uses."""
        return tuple(dict.fromkeys(s.rewrite for s in self.steps))
