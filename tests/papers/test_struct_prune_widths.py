"""StructPrune's shares (arXiv 2510.03246) as widths: softmax of energies, scaled to the budget."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import PLANNERS, REWRITES
from lamina.lab import Bench, Lab
from lamina.planners import _widths
from lamina.testing.models import text, tiny

FINE = {"multiple": 1, "kinds": ("neuron",)}


def left(lab: Lab, keep: float = 0.8, **options: Any) -> list[int]:
    """Neurons that stay, layer by layer."""
    steps = PLANNERS.make("struct-prune", {**FINE, **options}).plan(None, Budget(keep=keep), lab.anatomy, Bench(lab))
    assert all(s.options["refit"] == 0.01 for s in steps)
    gone = {s: g for step in steps for s, g in step.options["gone"].items()}
    return [64 - len(gone.get(f"block.{n}.mlp.neuron", ())) for n in range(4)]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_shares_are_those_of_the_formula(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, energies = Lab(tiny("llama"), text(3, 9)), [1.0, 1.5, 0.7, 1.2]
    made = {f"block.{n}.mlp.neuron": np.full(64, e) for n, e in enumerate(energies)}
    monkeypatch.setattr("lamina.papers.width.struct_prune.energies", lambda lab, sites: made)
    got = left(lab, temperature=temperature)
    parts = [math.exp(e / (temperature * sum(energies) / 4)) for e in energies]
    whole, best = lab.anatomy.total().parameters, None
    for level in np.linspace(0, 1, 20001):  # the largest that fits
        shares = [min(max(level * p / min(parts), 0.1), 1.0) for p in parts]
        counts = [max(math.floor(s * 64 + 0.5), 1) for s in shares]
        if whole - sum(64 - c for c in counts) * 3 * 32 <= 0.8 * whole:
            best = counts
    assert got == best


def test_equal_energies_and_high_temperatures_leave_equal_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    found = left(lab, temperature=1e9)
    assert max(found) - min(found) <= 1
    monkeypatch.setattr(
        "lamina.papers.width.struct_prune.energies", lambda lab, sites: {s.id: np.ones(s.width) for s in sites}
    )
    assert len(set(left(lab, temperature=0.1))) == 1


def test_no_sublayer_falls_below_the_least_share() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    found = left(lab, temperature=0.01, least=0.5)
    assert min(found) == 32
    assert max(found) > 32
    lower = left(lab, temperature=0.01, least=0.25)
    assert min(lower) == 16


def test_the_refit_lowers_what_narrowing_costs() -> None:
    ids = text(8, 16)
    with torch.no_grad():
        want, offs = tiny("llama")(ids).logits, []
        for refit in (0.0, 0.01):
            lab = Lab(tiny("llama"), ids)
            steps = PLANNERS.make("struct-prune", {**FINE, "refit": refit}).plan(
                None, Budget(keep=0.8), lab.anatomy, Bench(lab)
            )
            for step in steps:
                REWRITES.make("narrow", {"refit": step.options.get("refit", 0.0)}).apply(step, lab)
            offs.append(float((lab.model(ids).logits - want).norm()))
    assert offs[1] < offs[0]


def test_energies_of_units_leave_out_maps_that_see_some_tokens_only() -> None:
    lab = Lab(tiny("mixtral"), text(2, 8))
    sites = lab.anatomy.of_kind(*_widths.KINDS[:3])
    assert set(_widths.energies(lab, sites)) == {s.id for s in sites}


@pytest.mark.parametrize("options", [{"temperature": 0}, {"least": 1.0}, {"kinds": ("expert",)}, {"parallel": 0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        PLANNERS.make("struct-prune", options)
