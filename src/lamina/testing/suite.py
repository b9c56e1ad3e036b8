"""The frame of the conformance suite: named checks per role, which of them apply, and failures that are known.

A check is a function of one method (its class, or an instance) that returns nothing and raises AssertionError with a
line that says what went wrong. A method declares a failure that it knows of as a class attribute:

    known_failures: ClassVar[Mapping[str, str]] = {"check_tally_merges": "the median of medians is no median"}

Such a check must fail; one that passes is an error too, so that the list stays true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lamina.core.papers import Card
from lamina.core.registry import ROLES

Check = Callable[[Any], None]
Applies = Callable[[type], bool]
_CHECKS: dict[str, dict[str, tuple[Check, Applies]]] = {role: {} for role in ROLES}


def check(role: str, applies: Applies = lambda _: True) -> Callable[[Check], Check]:
    """Enter a check for all methods of a role (those of which `applies(class)` is true)."""

    def enter(function: Check) -> Check:
        _CHECKS[role][function.__name__] = (function, applies)
        return function

    return enter


def class_of(method: Any) -> type:
    """The class of a method that is given as a class or as an instance."""
    return method if isinstance(method, type) else type(method)


def card_of(method: Any) -> Card:
    """The method's card. Raises AssertionError for a class that no decorator has registered."""
    card = getattr(class_of(method), "card", None)
    expect(isinstance(card, Card), f"{class_of(method).__name__} has no card: register it with its role's decorator")
    assert isinstance(card, Card)
    return card


def made(method: Any) -> Any:
    """An instance: the one given, or one with the default options."""
    return method() if isinstance(method, type) else method


def checks_for(role: str, method: Any = None) -> tuple[Check, ...]:
    """The checks of a role in the order in which they are written; with a method, those that apply to it."""
    found = _CHECKS[role].values()
    return tuple(c for c, applies in found if method is None or applies(class_of(method)))


def known_failures(method: Any) -> dict[str, str]:
    """Check name → why the method fails it. Raises AssertionError for a name that is no check of the role."""
    declared: Mapping[str, str] = getattr(class_of(method), "known_failures", {})
    card = card_of(method)
    for name, reason in declared.items():
        expect(name in _CHECKS[card.role], f"{card.role} {card.name} declares a failure of {name}, which is no check")
        expect(bool(reason.strip()), f"{card.role} {card.name} gives no reason for failing {name}")
    return dict(declared)


def run_checks(role: str, method: Any) -> None:
    """Run all checks of a role that apply; all failures are told in one AssertionError."""
    known = known_failures(method)
    told: list[str] = []
    for one in checks_for(role, method):
        name: str = one.__name__
        try:
            one(method)
        except Exception as error:
            if name not in known:
                told.append(f"{name}: {type(error).__name__}: {error}")
        else:
            if name in known:
                told.append(f"{name}: passes, but is declared to fail ({known[name]})")
    expect(not told, f"{card_of(method).role} {card_of(method).name}\n" + "\n".join(told))


def expect(condition: bool, text: str) -> None:
    """Raise AssertionError with `text` unless the condition holds (also under `python -O`)."""
    if not condition:
        raise AssertionError(text)
