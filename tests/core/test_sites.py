"""Sites in depth order, costs that add up, scores that rank."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lamina.core
from lamina.core.errors import InputError, LaminaError, did_you_mean
from lamina.core.scores import Scores
from lamina.core.sites import Cost, Kind, Site, depth_key


def test_depth_order_counts() -> None:
    ordered = ["block.2", "block.2.attention", "block.2.mlp", "block.10", "decoder.block.0", "encoder.block.0"]
    mixed = random.Random(0).sample(ordered, len(ordered))
    assert sorted(mixed, key=depth_key) == ordered
    sites = [Site(i, Kind.BLOCK, i) for i in mixed]
    assert [s.id for s in sorted(sites)] == ordered
    with pytest.raises(TypeError):
        _ = sites[0] < "block.3"  # type: ignore[operator]


def test_costs_add_up() -> None:
    a, b = Cost(5, 20, 7, 3), Cost(1, 2, 3, 3)
    assert a + b == Cost(6, 22, 10, 6)
    assert a - b + b == a
    assert sum([a, b], Cost()) == a + b


def test_scores_rank_lowest_first_and_ties_in_depth_order() -> None:
    values = {"block.10": np.array([0.5]), "block.9": np.array([0.5]), "block.2": np.array([0.1, 0.3])}
    scores = Scores(measure="m", values=values)
    assert scores.ranked() == ["block.2", "block.9", "block.10"]
    assert scores["block.2"] == pytest.approx(0.2)
    assert scores[Site("block.9", Kind.BLOCK, "")] == 0.5
    assert "block.9" in scores
    assert Site("block.3", Kind.BLOCK, "") not in scores


def test_errors_are_one_line() -> None:
    assert str(InputError("too\n  long", where="a.yaml", hint="cut it")) == "a.yaml: too long (cut it)"
    assert str(LaminaError("plain")) == "plain"
    assert LaminaError("x").exit_code == 2


def test_did_you_mean() -> None:
    assert did_you_mean("cosin", ["cosine", "angular"]) == "did you mean cosine?"
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", []) == "none is known"


MODULES = sorted(p.stem for p in Path(lamina.core.__path__[0]).glob("*.py") if p.stem != "__init__")


def test_core_leaves_torch_alone() -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(lamina.core.__path__[0]).parents[1])!r})
import importlib
for name in {MODULES!r}:
    importlib.import_module("lamina.core." + name)
print(sorted(m for m in ("torch", "transformers", "safetensors", "scipy", "polars") if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
