"""The conformance suite for measures that take gradients or leave sites out."""

from __future__ import annotations

import conformance_cases
import pytest

from lamina.testing.suite import Check


@pytest.mark.parametrize(("method", "check"), list(conformance_cases.cases(conformance_cases.runs_much)))
def test_conformance(method: type, check: Check) -> None:
    check(method)
