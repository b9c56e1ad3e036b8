"""The conformance suite for measures that take gradients or leave sites out."""

from __future__ import annotations

import conformance_cases
import pytest

from lamina.core.registry import ROLES
from lamina.testing.suite import Check


@pytest.mark.parametrize(("method", "check"), list(conformance_cases.cases(conformance_cases.runs_much)))
def test_conformance(method: type, check: Check) -> None:
    check(method)


def test_the_two_files_leave_out_no_method() -> None:
    """Each method of the registry has cases in one of them, and in one alone."""
    here = {case.values[0] for case in conformance_cases.cases(conformance_cases.runs_much)}
    there = {case.values[0] for case in conformance_cases.cases(lambda card: not conformance_cases.runs_much(card))}
    assert here
    assert not here & there
    assert here | there == {type(registry.make(name)) for registry in ROLES.values() for name in registry}
