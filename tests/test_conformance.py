"""Every method of the registry passes every check of its role: a new one is tested with no edit here."""

from __future__ import annotations

import conformance_cases
import pytest

from lamina.core.registry import ROLES
from lamina.testing import checks_for
from lamina.testing.suite import Check


@pytest.mark.parametrize(
    ("method", "check"), list(conformance_cases.cases(lambda card: not conformance_cases.runs_much(card)))
)
def test_conformance(method: type, check: Check) -> None:
    check(method)


@pytest.mark.parametrize("role", list(ROLES))
def test_every_role_has_checks(role: str) -> None:
    assert len(checks_for(role)) >= 3
    assert len({c.__name__ for c in checks_for(role)}) == len(checks_for(role))
    assert all(c.__doc__ for c in checks_for(role))
