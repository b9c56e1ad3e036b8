"""Golden numbers of every stable measure, and every stable recipe's picks, on the real SmolLM2-135M.

`python tools/golden.py` writes them anew.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import golden
from lamina.core.registry import row

RELATIVE = 1e-3
"""CPUs differ in the order of their sums."""


def data() -> dict[str, Any]:
    return json.loads(golden.FILE.read_text(encoding="utf-8"))


def close(got: Any, want: Any, what: str) -> None:
    """Within 1e-3 of each number; numbers near zero, within 1e-4 of the table's mean size."""
    mine, theirs = np.array(got, dtype=np.float64), np.array(want, dtype=np.float64)
    np.testing.assert_allclose(mine, theirs, rtol=RELATIVE, atol=0.1 * RELATIVE * np.abs(theirs).mean(), err_msg=what)


def test_every_stable_method_has_a_golden_number() -> None:
    assert sorted(data()["measures"]) == sorted(golden.stable_measures())
    assert sorted(data()["picks"]) == sorted(golden.recipes())


@pytest.mark.real
def test_same_text() -> None:
    """Else no number below can agree: the shipped prose, the tokenizer or the drawing of blocks has changed."""
    assert {str(n): golden.text_mark(n) for n in (golden.LENGTH, golden.SHORT)} == data()["text"]


@pytest.mark.real
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if golden.heavy(n) else []) for n in golden.stable_measures()]
)
def test_measure(name: str) -> None:
    got, want = golden.numbers(name), data()["measures"][name]
    assert got["unit"] == want["unit"]
    assert list(got["values"]) == list(want["values"])
    close(list(got["values"].values()), list(want["values"].values()), name)
    assert got.get("spans", {}).keys() == want.get("spans", {}).keys()
    for site, spans in want.get("spans", {}).items():
        close(got["spans"][site], spans, f"{name}, runs from {site}")


def marked(name: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.slow] if golden.judges(row(name)) else [])


@pytest.mark.real
@pytest.mark.parametrize("name", [marked(n) for n in golden.recipes()])
def test_picks(name: str) -> None:
    assert golden.picks(name) == data()["picks"][name]
