"""Tallies on disk: what is read back scores the same, to the last bit, and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamina.core.errors import LaminaError
from lamina.core.registry import MEASURES
from lamina.core.scores import Grid, Scores
from lamina.lab import Lab
from lamina.lab.freeze import frozen, load_tally, save_tally, thawed
from lamina.lab.passes import finished, shares, tallied
from lamina.testing.bench import expect_close
from lamina.testing.models import text, tiny

SHARED = [n for n in MEASURES if shares(MEASURES.make(n))]


@pytest.mark.parametrize("name", SHARED)
def test_a_tally_that_was_written_scores_the_same(name: str, tmp_path: Path) -> None:
    model, ids = tiny("llama"), text(6, 12)
    lab, measure = Lab(model, ids), MEASURES.make(name)
    first, second = (tallied(Lab(model, i), {name: measure})[name] for i in (ids[:4], ids[4:]))
    if isinstance(first, Exception):
        pytest.skip(str(first))
    save_tally(first, tmp_path / "first")
    back = load_tally(measure.tally(lab.anatomy), tmp_path / "first")
    assert not [p for p in (tmp_path / "first").iterdir() if p.suffix in (".pkl", ".pt")]
    expect_close(finished(lab, measure, back.merge(second)), finished(lab, measure, first.merge(second)), 0.0, name)


class Odd:
    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {
            ("a", 1): [1.5, float("nan"), None, True],
            "keys": np.array([2**63 + 5, 1], dtype=np.uint64),
            "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            "set": {3, 1},
            "list first": ["dict", "tensor"],
            "scalar": np.float64(0.25),
            "empty": {},
        }
        self.function = lambda: None


def test_odd_values_come_back(tmp_path: Path) -> None:
    made = Odd()
    save_tally(made, tmp_path / "odd")
    back = load_tally(Odd(), tmp_path / "odd").kept
    assert back[("a", 1)][0] == 1.5
    assert np.isnan(back[("a", 1)][1])
    assert back[("a", 1)][2:] == [None, True]
    assert back["keys"].tolist() == [2**63 + 5, 1]
    assert back["keys"].dtype == np.uint64
    assert torch.equal(back["half"], made.kept["half"])
    assert (back["set"], back["list first"], back["empty"]) == ({1, 3}, ["dict", "tensor"], {})
    assert float(back["scalar"]) == 0.25
    assert "function" not in frozen(made)[0]


def test_a_file_makes_no_other_code_run() -> None:
    with pytest.raises(LaminaError, match="not loaded"):
        thawed(Odd(), {"kept": ["object", "antigravity", "Thing", {}]}, {})


def test_scores_as_plain_data() -> None:
    table = Scores(
        measure="m",
        values={"block.0": np.array([1.0, np.nan])},
        stderr={"block.0": np.array([np.nan, 0.5])},
        unit="nats",
        spans={"block.0": np.array([1.0, 2.0])},
        grids={"map": Grid(values=np.array([[1.0, np.nan]]), rows=("a",), columns=("b", "c"))},
        missing={"block.1": "why"},
    )
    back = Scores.from_data(table.to_data())
    np.testing.assert_array_equal(back.values["block.0"], table.values["block.0"])
    np.testing.assert_array_equal(back.stderr["block.0"], table.stderr["block.0"])
    np.testing.assert_array_equal(back.spans["block.0"], table.spans["block.0"])
    np.testing.assert_array_equal(back.grids["map"].values, table.grids["map"].values)
    assert (back.grids["map"].rows, back.grids["map"].columns) == (("a",), ("b", "c"))
    assert (back.measure, back.unit, dict(back.missing)) == ("m", "nats", {"block.1": "why"})
    assert Scores.none("m", "no head").missing == {"": "no head"}
