"""WeLore (arXiv 2407.11239): ranks under one threshold, against a scan of all thresholds on plain singular values."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.testing.models import text, tiny


def measured(model: Any, **options: Any) -> Scores:
    return MEASURES.make("welore-rank", options).measure(Lab(model, text(1, 4)))


def spectra(model: Any) -> dict[str, torch.Tensor]:
    """Normalised singular values of all maps of the blocks, by path, as the code has them."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in path:
            s = torch.linalg.svdvals(module.weight.detach().double())
            found[path] = (s - s.min()) / (s.max() - s.min())
    return found


def scanned(model: Any, reduction: float) -> tuple[dict[str, float], float]:
    """Share kept per map and the threshold: all thresholds in turn, the last that cuts no more than `reduction`."""
    values = spectra(model)
    total = sum(len(s) for s in values.values())
    tau = 0.0
    for candidate in sorted(float(x) for s in values.values() for x in s):
        if sum(int((s < candidate).sum()) for s in values.values()) > reduction * total:
            break
        tau = candidate
    return {k: float((s >= tau).sum()) / len(s) for k, s in values.items()}, tau


@pytest.mark.parametrize("reduction", [0.1, 0.37, 0.5, 0.8])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_ranks_are_those_of_a_scan(name: str, reduction: float) -> None:
    model = tiny(name, seed=1)
    wanted, tau = scanned(model, reduction)
    lab = Lab(model, text(1, 4))
    got = MEASURES.make("welore-rank", {"reduction": reduction}).measure(lab)
    paths = {s.id: s.path for s in lab.anatomy.linears()}
    assert {paths[k]: float(v[0]) for k, v in got.values.items()} == pytest.approx(wanted, abs=1e-12)
    assert got.grids["threshold"].values[0, 0] == pytest.approx(tau, abs=1e-6)


def test_a_grid_of_thresholds_as_in_the_paper_comes_to_the_same_reduction() -> None:
    model = tiny("llama")
    values = spectra(model)
    cut = {t: np.mean(np.concatenate([(s < t).numpy() for s in values.values()])) for t in np.arange(0, 1, 0.005)}
    nearest = min(cut, key=lambda t: abs(cut[t] - 0.5))
    tau, reached = measured(model).grids["threshold"].values[0]
    assert tau == pytest.approx(nearest, abs=0.006)
    assert reached == pytest.approx(0.5, abs=1.5 / sum(map(len, values.values())))


def test_no_reduction_keeps_all_and_more_reduction_keeps_less() -> None:
    model = tiny("llama")
    tables = [measured(model, reduction=r) for r in (0.0, 0.2, 0.4, 0.6, 0.9)]
    assert all(v[0] == 1.0 for v in tables[0].values.values())
    for more, less in pairwise(tables):
        assert all(more[s] >= less[s] for s in more.values)


def test_the_grid_tells_ranks() -> None:
    got = measured(tiny("llama"))
    grid = got.grids["ranks"]
    assert grid.columns == ("kept", "full", "break-even")
    assert grid.rows == tuple(got.values)
    kept, full, even = grid.values[grid.rows.index("block.0.attention.k_proj")]
    assert (full, even) == (16, 16 * 32 / (16 + 32))
    assert kept / full == got["block.0.attention.k_proj"]


def changed(weight: torch.Tensor) -> Scores:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.copy_(weight)
    return measured(model)


def test_flat_heavy_tailed_and_zero_maps() -> None:
    site, flat = "block.1.attention.q_proj", torch.linalg.qr(torch.randn(32, 32))[0]
    assert changed(flat)[site] == 1.0
    tail = flat @ torch.diag(0.5 ** torch.arange(32.0)) @ flat.T
    assert changed(tail)[site] < 0.25
    assert changed(torch.zeros(32, 32))[site] == 0.0


def test_scale_does_not_matter() -> None:
    model = tiny("llama")
    before = measured(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(8.0)
    assert measured(model).values == before.values


def test_a_stored_transposition_does_not_matter() -> None:
    got = measured(tiny("gpt2"))
    assert got.grids["ranks"].values[got.grids["ranks"].rows.index("block.0.mlp.c_fc"), 1] == 32


@pytest.mark.parametrize("reduction", [-0.1, 1.0])
def test_bad_reduction(reduction: float) -> None:
    with pytest.raises(InputError, match="reduction must be"):
        MEASURES.make("welore-rank", {"reduction": reduction})
