"""WeLore (arXiv 2407.11239): ranks under one threshold, against a scan of all thresholds on plain singular values.

First the measure, which cuts a share of all ranks; then the planner, which meets a budget.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lamina.anatomy import Anatomy
from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError
from lamina.core.registry import MEASURES, PLANNERS, REWRITES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.papers.rank.welore import cut, normalised
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


def heavy(name: str = "llama", seed: int = 0) -> Any:
    """A tiny model whose maps have spectra of other tails each, as trained ones do."""
    model = tiny(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in path:
                u, s, v = torch.linalg.svd(module.weight, full_matrices=False)
                power = 0.2 + 2 * float(torch.rand(1, generator=generator))
                module.weight.copy_((u * (s[0] * torch.arange(1.0, len(s) + 1) ** -power)) @ v)
    return model


def planned(model: Any, budget: Budget, **options: Any) -> tuple[Step, ...]:
    return PLANNERS.make("welore", options).plan(None, budget, Anatomy.of(model))


def keeping(share: float, **more: Any) -> Budget:
    return Budget(metric="parameters", keep=share, **more)


def scanned_plan(model: Any, need: float, least: float) -> dict[str, int]:
    """Path → rank: all thresholds in turn, the first whose factors free enough."""
    values = spectra(model)
    for tau in sorted(float(x) for s in values.values() for x in s):
        found, freed = {}, 0
        for path, s in values.items():
            outputs, inputs = model.get_submodule(path).weight.shape
            rank = int((s >= tau).sum())
            if 1 - rank / len(s) > least and rank * (outputs + inputs) < outputs * inputs:
                found[path] = rank
                freed += outputs * inputs - rank * (outputs + inputs)
        if freed >= need:
            return found
    raise AssertionError("no threshold frees enough")


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.45])
@pytest.mark.parametrize("least", [0.4, 0.8])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_a_plan_has_the_ranks_of_a_scan(name: str, least: float, keep: float) -> None:
    model = heavy(name)
    lab = Lab(model, text(1, 4))
    want = scanned_plan(model, lab.anatomy.total().parameters * (1 - keep), least)
    (step,) = planned(model, keeping(keep), least=least)
    assert {lab.anatomy.site(s).path: k for s, k in step.options["rank"].items()} == want
    assert step.rewrite == "svd"
    assert tuple(step.options["rank"]) == step.sites == tuple(s.id for s in lab.anatomy.linears() if s.path in want)
    receipt = REWRITES.make("svd").apply(step, lab)
    assert receipt.after.parameters <= keep * receipt.before.parameters
    assert step.why["parameters"] == receipt.before.parameters - receipt.after.parameters
    assert 0 < step.why["threshold"] <= 1


def test_the_threshold_is_the_least_that_meets_the_budget() -> None:
    """One more singular value kept and too little is freed; ranks never rise with it."""
    model = heavy()
    anatomy = Anatomy.of(model)
    (step,) = planned(model, keeping(0.7))
    shapes = {s.id: tuple(anatomy.weight(s).shape) for s in anatomy.linears()}
    values = {s: normalised(torch.linalg.svdvals(anatomy.weight(s).double()).detach().numpy()) for s in shapes}
    shapes = {s: (o, i) for s, (o, i) in shapes.items()}
    freed = []
    ranks = []
    found = step.why["threshold"] - 1e-7
    before = max(float(x) for v in values.values() for x in v if x < found)
    for tau in (before, found, 0.5, 0.9):
        got = cut(values, shapes, tau, 0.5)
        freed.append(sum(shapes[s][0] * shapes[s][1] - k * sum(shapes[s]) for s, k in got.items()))
        ranks.append({s: got.get(s, len(v)) for s, v in values.items()})
    need = 0.3 * anatomy.total().parameters
    assert freed[0] < need <= freed[1]
    for more, less in pairwise(ranks):
        assert all(more[s] >= less[s] for s in more)
    assert cut(values, shapes, 0.0, 0.5) == {}


def test_maps_with_flat_spectra_are_kept_whatever_is_asked() -> None:
    model = heavy()
    flat = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.copy_(flat)
    for keep in (0.9, 0.5, 0.3):
        (step,) = planned(model, keeping(keep))
        assert "block.2.attention.q_proj" not in step.sites
    assert len(step.sites) == 27


def test_of_two_maps_the_one_with_the_heavier_tail_loses_more() -> None:
    model = heavy()
    with torch.no_grad():
        for number, power in ((1, 0.1), (2, 3.0)):
            weight = model.model.layers[number].mlp.up_proj.weight
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_((u * (s[0] * torch.arange(1.0, 33.0) ** -power)) @ v)
    (step,) = planned(model, keeping(0.7))
    ranks = {n: step.options["rank"].get(f"block.{n}.mlp.up_proj", 32) for n in (1, 2)}
    assert ranks[2] < 4
    assert ranks[1] > 12


def test_bytes_and_protected_sites() -> None:
    model = heavy().bfloat16()
    (step,) = planned(model, Budget(metric="bytes", keep=0.8, protect=("block.0", "block.3.attention")))
    assert not [s for s in step.sites if s.startswith(("block.0.", "block.3.attention."))]
    receipt = REWRITES.make("svd").apply(step, Lab(model, text(1, 4)))
    assert receipt.after.bytes <= 0.8 * receipt.before.bytes
    assert planned(heavy(), keeping(1.0)) == ()
    assert planned(heavy(), keeping(0.6)) == planned(heavy(), keeping(0.6))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(metric="blocks", drop=1), "budgets of parameters, or of bytes"),
        (Budget(metric="parameters", limit=100), "at most"),
        (keeping(0.18), "at most"),
    ],
)
def test_budgets_that_no_threshold_meets(budget: Budget, words: str) -> None:
    with pytest.raises(InputError, match=words):
        planned(heavy(), budget)


def test_bad_least() -> None:
    with pytest.raises(InputError, match="least is at least 0"):
        PLANNERS.make("welore", {"least": 1.0})
