"""Every method of the registry passes every check of its role: a new one is tested with no edit here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lamina.core.registry import ROLES
from lamina.testing import checks_for, known_failures
from lamina.testing.suite import Check


def cases() -> Iterator[Any]:
    for role, registry in ROLES.items():
        for name in registry:
            method = type(registry.make(name))
            known = known_failures(method)
            for check in checks_for(role, method):
                word = check.__name__.removeprefix("check_")
                marks = (
                    [pytest.mark.xfail(strict=True, reason=known[check.__name__])] if check.__name__ in known else []
                )
                yield pytest.param(method, check, id=f"{role}-{name}-{word}", marks=marks)


@pytest.mark.parametrize(("method", "check"), list(cases()))
def test_conformance(method: type, check: Check) -> None:
    check(method)


@pytest.mark.parametrize("role", list(ROLES))
def test_every_role_has_checks(role: str) -> None:
    assert len(checks_for(role)) >= 3
    assert len({c.__name__ for c in checks_for(role)}) == len(checks_for(role))
    assert all(c.__doc__ for c in checks_for(role))
