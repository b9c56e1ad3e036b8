"""Method × check, as test cases: the suite is shared out over two files, so that they can run at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lamina.core.papers import Card, Need, Status
from lamina.core.registry import ROLES
from lamina.testing import checks_for, known_failures

LONG = ("narrow", "replace", "share")
"""Rewrites that are tried on so many kinds of sites that it takes more than half a minute."""

TRACED = ("onnx",)
"""Exporters that trace the model by a compiler, which takes seconds each time."""


def runs_much(card: Card) -> bool:
    """Whether a measure takes gradients, or leaves sites out: these have a file of their own."""
    return card.role == "measure" and card.needs > Need.FORWARD


def alone(method: type) -> bool:
    """Whether a measure shares no pass with others, and so takes seconds where they take less."""
    return not hasattr(method, "tally")


def variant(method: type) -> bool:
    """Whether a rewrite is another one with other numbers, which is tried in every run; or changes numbers alone.

    Or it is a method on trial that takes long: a rewrite, a planner that searches, or an exporter that traces.
    """
    card: Card = method.card  # type: ignore[attr-defined]
    if (card.role == "rewrite" and card.name in LONG) or (card.role == "exporter" and card.name in TRACED):
        return True
    searches = card.role == "planner" and card.needs >= Need.GRADIENT and card.name != "knapsack"
    if (card.role == "rewrite" or searches) and card.status is Status.EXPERIMENTAL:
        return True
    return getattr(method, "stage", 0) > 0 or any(
        getattr(base, "card", None) is not None and base.card.role == "rewrite" for base in method.__mro__[1:]
    )


def cases(wanted: Callable[[Card], bool]) -> Iterator[Any]:
    """A case for each check that applies to a method whose card is `wanted`; known failures must fail.

    Slow are measures that run gradients or trials of their own, rewrites that vary another, or numbers alone, and
    rewrites and searches that are experimental.
    """
    for role, registry in ROLES.items():
        for name in registry:
            if not wanted(registry.card(name)):
                continue
            method = type(registry.make(name))
            known = known_failures(method)
            for check in checks_for(role, method):
                word = check.__name__.removeprefix("check_")
                long = (runs_much(registry.card(name)) and alone(method)) or variant(method)
                marks: list[Any] = [pytest.mark.slow] if long else []
                if check.__name__ in known:
                    marks.append(pytest.mark.xfail(strict=True, reason=known[check.__name__]))
                yield pytest.param(method, check, id=f"{role}-{name}-{word}", marks=marks)
