"""Adaptive MLP Pruning's search (arXiv 2603.08100) by whole forwards of a model with masked neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.documents import Budget
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import MEASURES, PLANNERS, REWRITES
from lamina.core.scores import Scores
from lamina.lab import Bench, Lab
from lamina.testing.bench import expect_same, picture
from lamina.testing.models import text, tiny

SMALL = {"multiple": 8, "sequences": 4, "length": 12}


@torch.no_grad()
def entropy(model: Any, ids: Tensor, kept: dict[int, list[int]]) -> float:
    """Mean over all positions, with the other neurons of these layers masked."""
    handles = []
    for layer, stay in kept.items():

        def mask(_: Any, args: Any, stay: list[int] = stay) -> Any:
            out = torch.zeros_like(args[0])
            out[..., stay] = args[0][..., stay]
            return (out,)

        handles.append(model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(mask))
    p = model(ids).logits.double().softmax(-1)
    for handle in handles:
        handle.remove()
    return float(-(p * p.log()).sum(-1).mean())


def searched(model: Any, ids: Tensor, scores: Scores, threshold: float, multiple: int = 8) -> list[int]:
    """The widths, last layer first: six halvings each, in multiples."""
    kept: dict[int, list[int]] = {}
    base = entropy(model, ids, kept)
    for layer in (3, 2, 1, 0):
        order = np.argsort(-scores.values[f"block.{layer}.mlp.neuron"], kind="stable")
        low, high, found = 0, 64, None
        for _ in range(6):
            middle = max(int((low + high) // 2 / multiple + 0.5), 1) * multiple
            if not low < middle < high:
                break
            now = entropy(model, ids, {**kept, layer: order[:middle].tolist()})
            if now - base <= threshold:
                high, found = middle, (now, order[:middle].tolist())
            else:
                low = middle
        if found is not None:
            base, kept[layer] = found
    return [len(kept.get(n, range(64))) for n in range(4)]


def widths(steps: Any) -> list[int]:
    gone = {s: g for step in steps for s, g in step.options["gone"].items()}
    return [64 - len(gone.get(f"block.{n}.mlp.neuron", ())) for n in range(4)]


@pytest.mark.parametrize("threshold", [0.002, 0.02, 0.2])
def test_widths_are_those_of_the_plain_search(threshold: float) -> None:
    model, ids = tiny("llama"), text(4, 12)
    lab = Lab(model, ids, batch_size=3)
    scores = MEASURES.make("entropy-taylor").measure(lab)
    want = searched(tiny("llama"), ids, scores, threshold)
    before = picture(model)
    method = PLANNERS.make("adaptive-mlp", {**SMALL, "threshold": threshold})
    steps = method.plan(scores, Budget(keep=0.999999), lab.anatomy, Bench(lab))
    expect_same(before, picture(model), "the search")
    assert widths(steps) == want
    assert threshold < 0.2 or min(want) < 64


def test_neurons_that_write_nothing_go_and_nothing_changes() -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 40:] = 0
    ids = text(4, 12)
    lab = Lab(model, ids)
    scores = MEASURES.make("entropy-taylor").measure(lab)
    assert all(v[40:].max() == 0 for v in scores.values.values())
    steps = PLANNERS.make("adaptive-mlp", {**SMALL, "threshold": 1e-7}).plan(
        scores, Budget(keep=0.9), lab.anatomy, Bench(lab)
    )
    assert all(set(range(40, 64)) <= set(g) for s in steps for g in s.options["gone"].values())
    assert max(widths(steps)) <= 40  # fewer where predictions are surer without
    bare = {n: list(range(40)) for n in range(4)}
    assert entropy(model, ids, bare) == pytest.approx(entropy(model, ids, {}), rel=1e-9)


def test_without_a_threshold_the_budget_sets_it() -> None:
    lab = Lab(tiny("llama"), text(4, 12))
    whole = lab.anatomy.total().parameters
    for keep in (0.9, 0.6):
        steps = PLANNERS.make("adaptive-mlp", SMALL).plan(
            Scores(measure="none", values={}), Budget(keep=keep), lab.anatomy, Bench(lab)
        )
        forecast = REWRITES.make("narrow").forecast(steps[0], lab.anatomy)
        assert forecast.parameters <= keep * whole


def test_a_threshold_that_frees_too_little_and_a_budget_that_asks_too_much_are_told() -> None:
    lab = Lab(tiny("llama"), text(4, 12))
    none = Scores(measure="none", values={})
    with pytest.raises(InputError, match="a higher threshold"):
        PLANNERS.make("adaptive-mlp", {**SMALL, "threshold": 1e-9, "rounds": 1}).plan(
            none, Budget(keep=0.6), lab.anatomy, Bench(lab)
        )
    with pytest.raises(InputError, match="at most"):
        PLANNERS.make("adaptive-mlp", SMALL).plan(none, Budget(keep=0.3), lab.anatomy, Bench(lab))
    with pytest.raises(LaminaError, match="takes no budget of blocks"):
        PLANNERS.make("adaptive-mlp").plan(none, Budget(metric="blocks", drop=1), lab.anatomy, Bench(lab))


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"rounds": 0}, {"length": 0}, {"searches": 0}, {"multiple": 0}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        PLANNERS.make("adaptive-mlp", options)
