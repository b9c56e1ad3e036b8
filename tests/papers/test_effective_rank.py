"""D-Rank's effective rank (arXiv 2509.25622) against its Cholesky factor, on inputs that plain hooks caught."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.lab.rows import sequence_keys
from lamina.testing.models import padded, text, tiny


def measured(lab: Lab, **options: Any) -> Scores:
    return MEASURES.make("effective-rank", {"every": 1, **options}).measure(lab)


@torch.no_grad()
def caught(model: nn.Module, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Path → inputs [tokens, inputs] and weights [outputs, inputs] of every linear map, float64."""
    seen, handles = {}, []
    for path, module in model.named_modules():
        across = type(module).__name__ == "Conv1D"
        if isinstance(module, nn.Linear) or across:

            def note(m: Any, args: Any, path: str = path, across: bool = across) -> None:
                weight = m.weight.T if across else m.weight
                seen[path] = (args[0].flatten(0, -2).double(), weight.double())

            handles.append(module.register_forward_pre_hook(note))
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def literally(inputs: Tensor, weight: Tensor) -> float:
    """R = exp(-Σ p ln p) of the squared singular values of S W, W [inputs, outputs], SᵀS = XᵀX."""
    s = torch.linalg.cholesky(inputs.T @ inputs).T
    energies = torch.linalg.svdvals(s @ weight.T).square().tolist()
    total = math.fsum(energies)
    return math.exp(-math.fsum(e / total * math.log(e / total) for e in energies))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_it_is_the_papers_formula(name: str) -> None:
    model, ids = tiny(name), text(8, 40)
    lab = Lab(model, ids, batch_size=3)
    got, seen = measured(lab), caught(model, ids)
    sites = lab.anatomy.linears()
    assert set(got.values) == {s.id for s in sites}
    for site in sites:
        assert got[site] == pytest.approx(literally(*seen[site.path]), rel=1e-5), site.id


def test_fewer_tokens_than_inputs_need_no_jitter() -> None:
    got = measured(Lab(tiny("llama"), text(1, 6)))
    assert all(1 <= v[0] <= 6 + 1e-6 for v in got.values.values())


def test_flat_and_single_spectra() -> None:
    model, ids = tiny("llama"), text(8, 40)
    inputs, _ = caught(model, ids)["model.layers.1.mlp.up_proj"]
    vectors, values = torch.linalg.eigh(inputs.T @ inputs)[::-1]
    turned = torch.linalg.qr(torch.randn(64, 32, dtype=torch.float64))[0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(turned @ torch.diag(values.rsqrt()) @ vectors.T)
        model.model.layers[1].mlp.gate_proj.weight.copy_(torch.outer(torch.randn(64), torch.randn(32)))
    got = measured(Lab(model, ids))
    assert got["block.1.mlp.up_proj"] == pytest.approx(32, rel=1e-4)
    assert got["block.1.mlp.gate_proj"] == pytest.approx(1, rel=1e-4)


def test_scale_does_not_matter_but_the_inputs_do() -> None:
    model, ids = tiny("llama"), text(8, 40)
    before = measured(Lab(model, ids))
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(4)
    assert measured(Lab(model, ids))["block.3.mlp.up_proj"] == pytest.approx(before["block.3.mlp.up_proj"], rel=1e-6)
    assert measured(Lab(model, text(8, 40, seed=1)))["block.0.mlp.up_proj"] != before["block.0.mlp.up_proj"]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_error_is_that_of_the_derivative_by_four_groups_weights(batch_size: int) -> None:
    """Of R(Σ w_g XᵀX of group g) at w = 1, by autograd through the formula; near the jackknife's."""
    model, ids = tiny("llama"), text(64, 40)
    got = measured(Lab(model, ids, batch_size=batch_size))
    group = torch.from_numpy((sequence_keys({"input_ids": ids}) % 4).astype(np.int64))
    assert group.bincount(minlength=4).min() > 0
    left_out = [measured(Lab(model, ids[group != g])) for g in range(4)]
    caught_of = [caught(model, ids[group == g]) for g in range(4)]
    ratios = []
    for site in Lab(model, ids).anatomy.linears():
        share = torch.ones(4, dtype=torch.float64, requires_grad=True)
        weight = caught_of[0][site.path][1]
        moments = [weight @ (c[site.path][0].T @ c[site.path][0]) @ weight.T for c in caught_of]
        moment = sum(w * m for w, m in zip(share, moments, strict=True))
        energies = torch.linalg.eigvalsh(moment)[-int(min(weight.shape)) :]
        p = energies / energies.sum()
        (slopes,) = torch.autograd.grad((-(p * p.log()).sum()).exp(), share)
        assert got.stderr[site.id][0] == pytest.approx(math.sqrt(4 / 3 * float((slopes**2).sum())), rel=1e-4)
        values = np.array([s[site] for s in left_out])
        jackknife = math.sqrt(3 / 4 * ((values - values.mean()) ** 2).sum())
        ratios.append(got.stderr[site.id][0] / jackknife)
    assert 0.5 < float(np.median(ratios)) < 2


def test_parts_of_a_text_have_the_groups_of_the_whole() -> None:
    model, ids = tiny("llama"), text(10, 12)
    lab, measure = Lab(model, ids), MEASURES.make("effective-rank", {"every": 1})
    whole = measured(lab)
    parts = []
    for first, last in ((0, 3), (3, 4), (4, 10)):
        tally = measure.tally(lab.anatomy)
        lab.on(ids[first:last], batch_size=2).stream([tally])
        parts.append(tally)
    together = parts[2].merge(parts[0]).merge(parts[1]).scores()
    for site in whole.values:
        assert together[site] == pytest.approx(whole[site], rel=1e-6)
        assert together.stderr[site] == pytest.approx(whole.stderr[site], rel=1e-6)


def test_one_group_has_no_error() -> None:
    model, ids = tiny("llama"), text(6, 12)
    whole, single = measured(Lab(model, ids)), measured(Lab(model, ids), groups=1)
    assert all(np.isnan(e).all() for e in measured(Lab(model, ids[:1])).stderr.values())
    assert all(np.isnan(e).all() for e in single.stderr.values())
    for site in whole.values:
        assert single[site] == pytest.approx(whole[site], rel=1e-6)
    with pytest.raises(InputError, match="groups must be"):
        MEASURES.make("effective-rank", {"groups": 0})


def test_padding_does_not_count() -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (9, 5, 12)]
    alone = measured(Lab(model, [{"input_ids": r.unsqueeze(0)} for r in rows]))
    together = measured(Lab(model, padded(rows, 3, side="left")))
    for site in alone.values:
        assert together[site] == pytest.approx(alone[site], rel=1e-4)


def test_what_no_tap_showed_is_told_of() -> None:
    lab = Lab(tiny("llama"), text(1, 6))
    got = MEASURES.make("effective-rank").tally(lab.anatomy).scores()
    assert not got.values
    assert got.missing["block.0.attention.q_proj"] == "its input was not seen"
