"""PQ Index (arXiv 2302.05601) against its definition, weight by weight, and the properties that the paper proves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import MEASURES, PLANNERS, REWRITES
from lamina.lab import Lab
from lamina.testing.models import text, tiny

PAIRS = ((0.5, 1.0), (1.0, 2.0), (0.3, 1.7))


def measured(model: Any, **options: Any) -> dict[str, float]:
    found = MEASURES.make("pq-index", options).measure(Lab(model, text(1, 4)))
    return {k: float(v[0]) for k, v in found.values.items()}


def index(vector: list[float], p: float, q: float) -> float:
    """I = 1 - d^(1/q - 1/p) ‖w‖_p / ‖w‖_q."""
    norms = [math.fsum(abs(w) ** r for w in vector) ** (1 / r) for r in (p, q)]
    return 1 - len(vector) ** (1 / q - 1 / p) * norms[0] / norms[1]


def literally(rows: list[list[float]], p: float, q: float, scope: str) -> float:
    if scope == "layer":
        return 1 - index([w for row in rows for w in row], p, q)
    return 1 - math.fsum(index(row, p, q) for row in rows) / len(rows)


@pytest.mark.parametrize("scope", ["layer", "neuron"])
@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_it_is_the_papers_formula(p: float, q: float, scope: str) -> None:
    model = tiny("llama")
    got = measured(model, p=p, q=q, scope=scope)
    assert len(got) == 4 * 7
    maps = {"attention.k_proj": "self_attn.k_proj", "mlp.down_proj": "mlp.down_proj"}
    for place, path in maps.items():
        rows = model.model.layers[2].get_submodule(path).weight.tolist()
        assert got[f"block.2.{place}"] == pytest.approx(literally(rows, p, q, scope), rel=1e-10)


def test_rows_are_outputs_also_where_the_map_is_stored_the_other_way() -> None:
    model = tiny("gpt2")
    stored = model.transformer.h[1].mlp.c_fc.weight  # [inputs, outputs]
    got = measured(model, scope="neuron")["block.1.mlp.c_fc"]
    assert got == pytest.approx(literally(stored.T.tolist(), 0.5, 1.0, "neuron"), rel=1e-10)
    assert got != pytest.approx(literally(stored.tolist(), 0.5, 1.0, "neuron"), rel=1e-4)


def test_the_defaults_are_those_of_the_code() -> None:
    assert measured(tiny("llama")) == measured(tiny("llama"), p=0.5, q=1.0, scope="layer")


def key_of(model: Any) -> torch.Tensor:
    return model.model.layers[0].self_attn.k_proj.weight


def with_key(weight: torch.Tensor, **options: Any) -> float:
    model = tiny("llama")
    with torch.no_grad():
        key_of(model).copy_(weight)
    return measured(model, **options)["block.0.attention.k_proj"]


def test_scale_and_cloning_do_not_matter() -> None:
    weight = key_of(tiny("llama")).detach()
    cloned = torch.cat([weight[:8], weight[:8]])
    assert with_key(4 * weight) == pytest.approx(with_key(weight), rel=1e-12)
    halved = literally(weight[:8].tolist(), 0.5, 1.0, "layer")
    assert with_key(cloned) == pytest.approx(halved, rel=1e-12)


def test_one_hot_and_even_weights() -> None:
    weight = torch.zeros(16, 32)
    weight[3, 5] = -2.0
    assert 1 - with_key(weight, p=1.0, q=2.0) == pytest.approx(1 - 1 / math.sqrt(16 * 32), rel=1e-12)
    even = torch.where(torch.rand(16, 32) < 0.5, 0.25, -0.25)
    assert with_key(even) == pytest.approx(1.0, abs=1e-12)


def test_a_sparser_map_scores_lower() -> None:
    weight = key_of(tiny("llama")).detach()
    sparse = torch.where(torch.rand(16, 32) < 0.5, weight, 0.0)
    for scope in ("layer", "neuron"):
        assert with_key(sparse, scope=scope) < with_key(weight, scope=scope)


def test_zeros_count_as_wholly_sparse() -> None:
    weight = key_of(tiny("llama")).detach().clone()
    assert with_key(torch.zeros(16, 32)) == 0.0
    whole = with_key(weight[:8].repeat(2, 1), scope="neuron")
    weight[8:] = 0
    assert with_key(weight, scope="neuron") == pytest.approx(whole / 2, rel=1e-12)


def test_large_maps_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(tiny("llama"), scope="neuron")
    monkeypatch.setattr("lamina.papers.bits.pq_index.PIECE", 100)
    assert measured(tiny("llama"), scope="neuron") == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"p": 1.0, "q": 1.0}, "0 < p < q"), ({"p": 0.0}, "0 < p < q"), ({"scope": "global"}, "scope must be")],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MEASURES.make("pq-index", options)


def planned(lab: Lab, keep: float, protect: tuple[str, ...] = (), **options: Any) -> dict[str, float]:
    budget = Budget(metric="parameters", keep=keep, protect=protect)
    (step,) = PLANNERS.make("sap", options).plan(None, budget, lab.anatomy)
    assert step.rewrite == options.get("rewrite", "magnitude")
    return dict(step.options["sparsity"])


@pytest.mark.parametrize(("p", "q", "eta"), [(0.5, 1.0, 0.0), (1.0, 2.0, 0.0), (0.3, 1.7, 0.2)])
@pytest.mark.parametrize("keep", [0.8, 0.4])
def test_shares_are_those_of_the_formula_up_to_one_factor(p: float, q: float, eta: float, keep: float) -> None:
    model = tiny("llama")
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):  # type: ignore[union-attr]
            weight = layer.mlp.up_proj.weight
            weight.copy_(weight.sign() * weight.abs() ** (1 + n))
    lab = Lab(model, text(1, 4))
    got = planned(lab, keep, p=p, q=q, eta=eta)
    sites, sizes, free = [s.id for s in lab.anatomy.linears()], {}, {}
    for site in sites:
        w = lab.anatomy.weight(site).flatten().tolist()
        sizes[site] = len(w)
        free[site] = 1 - (1 + eta) ** (q / (p - q)) * (1 - index(w, p, q)) ** (q * p / (q - p))
    factors = {s: got[s] / free[s] for s in sites if s in got and got[s] < 0.9 - 1e-9}
    common = max(factors.values())
    for site in sites:
        want = min(common * max(free[site], 0.0), 0.9)
        assert got.get(site, 0.0) == pytest.approx(want, abs=(3 + 2 * common) / sizes[site]), site
    zeros = sum(sizes[s] * share for s, share in got.items())
    assert abs(zeros - (1 - keep) * sum(sizes.values())) <= len(sites) + 1
    assert max(got.values()) > min(got.values()) + 0.01


def test_the_plan_makes_as_many_zeros_as_the_budget_asks() -> None:
    lab = Lab(tiny("llama"), text(1, 4))
    budget = Budget(metric="parameters", keep=0.5, protect=("block.0", "block.2.mlp"))
    (step,) = PLANNERS.make("sap").plan(None, budget, lab.anatomy)
    assert not [s for s in step.sites if s.startswith(("block.0.", "block.2.mlp"))]
    REWRITES.make("magnitude").apply(step, lab)
    weights = torch.cat([lab.anatomy.weight(s.id).flatten() for s in lab.anatomy.linears()])
    assert float((weights == 0).double().mean()) == pytest.approx(0.5, abs=0.005)


def test_sparse_maps_lose_more() -> None:
    model = tiny("llama")
    weight = model.model.layers[1].mlp.down_proj.weight  # type: ignore[union-attr,index]
    with torch.no_grad():
        weight.mul_(torch.rand_like(weight) ** 8)
    got = planned(Lab(model, text(1, 4)), 0.7)
    assert max(got, key=lambda s: got[s]) == "block.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("options", "keep", "words"),
    [
        ({}, 0.05, "let no more weights go"),
        ({"most": 0.3}, 0.6, "let no more weights go"),
        ({"rewrite": "svd"}, 0.6, "takes no sparsity"),
        ({"p": 2.0}, 0.6, "0 < p < q"),
        ({"eta": -0.1}, 0.6, "eta is not below 0"),
        ({"most": 1.0}, 0.6, "most lies between 0 and 1"),
    ],
)
def test_bad_plans(options: dict[str, Any], keep: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        planned(Lab(tiny("llama"), text(1, 4)), keep, **options)
