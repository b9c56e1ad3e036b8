"""HESSO's saliencies (arXiv 2409.09085) by plain autograd, unit by unit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import MEASURES, PLANNERS
from lamina.core.scores import Scores
from lamina.lab import Bench, Lab
from lamina.planners._widths import Shape, above
from lamina.testing.models import text, tiny


def owned(model: Any, layer: int, kind: str, unit: int) -> list[tuple[Tensor, Any]]:
    """The tensors of a unit of the tiny llama, each with the index of its slice."""
    block = model.model.layers[layer]
    if kind == "neuron":
        mlp = block.mlp
        rows = [(mlp.gate_proj.weight, unit), (mlp.up_proj.weight, unit)]
        return [*rows, (mlp.down_proj.weight, (slice(None), unit))]
    attention = block.self_attn
    wide, narrow = slice(16 * unit, 16 * unit + 16), slice(8 * unit, 8 * unit + 8)
    rows = [(attention.q_proj.weight, wide), (attention.k_proj.weight, narrow), (attention.v_proj.weight, narrow)]
    return [*rows, (attention.o_proj.weight, (slice(None), wide))]


def literal(model: Any, ids: Tensor) -> dict[str, np.ndarray]:
    """Σ over the five of (saliency / its norm over all units) / 5."""
    logits = model(ids).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    table: dict[str, list[list[float]]] = {}
    for layer in range(4):
        for kind, site, width in (("neuron", "mlp.neuron", 64), ("group", "attention.kv_group", 2)):
            rows = []
            for unit in range(width):
                parts = owned(model, layer, kind, unit)
                x = torch.cat([p.detach()[i].flatten() for p, i in parts]).double()
                g = torch.cat([p.grad[i].flatten() for p, i in parts]).double()
                dot, size = float(x @ g), float(x.norm())
                cosine = abs(dot) / (size * float(g.norm()))
                rows.append([size, size / len(x), cosine, abs(dot), dot * dot / 2])
            table[f"block.{layer}.{site}"] = rows
    norms = np.sqrt(np.sum([np.square(r) for rows in table.values() for r in rows], axis=0))
    return {site: (np.array(rows) / norms).mean(1) for site, rows in table.items()}


def test_scores_are_the_five_saliencies_over_their_norms() -> None:
    ids = text(4, 9)
    want = literal(tiny("llama"), ids)
    got = MEASURES.make("hesso").measure(Lab(tiny("llama"), ids, batch_size=3))
    assert set(got.values) == set(want)
    for site, value in want.items():
        np.testing.assert_allclose(got.values[site], value, rtol=2e-3)
    assert got.grids["saliencies"].values.shape == (8, 5)


def test_units_without_weights_score_nothing_and_go_first() -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        for part, index in owned(model, 2, "neuron", 5) + owned(model, 2, "neuron", 6):
            part[index] = 0
    lab = Lab(model, text(3, 9))
    value = MEASURES.make("hesso").measure(lab).values["block.2.mlp.neuron"]
    assert value[[5, 6]].max() == 0
    assert np.delete(value, [5, 6]).min() > 0
    steps = PLANNERS.make("hesso", {"multiple": 1, "kinds": ("neuron",)}).plan(
        Scores(measure="none", values={}), Budget(keep=0.995), lab.anatomy, Bench(lab)
    )
    assert {5, 6} <= set(steps[0].options["gone"]["block.2.mlp.neuron"])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.61, 1.0])
def test_the_threshold_is_one_for_the_whole_network(share: float) -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    sites = lab.anatomy.of_kind(*PLANNERS.make("hesso").kinds)
    draw = np.random.default_rng(3)
    scores = {s.id: draw.random(s.width) for s in sites}
    counts = above(lab.anatomy, sites, scores, Shape(multiple=4), share)
    ranked = np.sort(np.concatenate(list(scores.values())))[::-1]
    edge = ranked[round(share * len(ranked)) - 1] if share else np.inf
    for site in sites:
        over = int((scores[site.id] >= edge).sum())
        step = 4 if site.width == 64 else 1
        assert counts[site.id] == max(-(-over // step) * step, step)


def test_a_model_that_predicts_nothing_has_no_loss() -> None:
    from transformers import AutoModel

    from lamina.testing.models import config

    lab = Lab(AutoModel.from_config(config("llama")), text(2, 8))
    scores = MEASURES.make("hesso").measure(lab)
    assert not scores.values
    assert "no loss" in scores.missing[""]


@pytest.mark.parametrize("options", [{"kinds": ("head", "kv_group")}, {"kinds": ("channel",)}, {"parallel": 0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        PLANNERS.make("hesso", options)
