"""Minitron's sizes by loops over sequences, tokens and channels; its widths by the model that comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import MEASURES, PLANNERS, REWRITES
from lamina.core.sites import Kind
from lamina.lab import Lab
from lamina.lab.bench import Bench
from lamina.papers.width.minitron import loss_after
from lamina.testing.bench import expect_same, lab_on, picture
from lamina.testing.models import padded, text, tiny


@torch.no_grad()
def met(model: Any, ids: Tensor) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """By path, sequence by sequence: what enters each last map, and what leaves each norm."""
    entering: dict[str, list[Tensor]] = {}
    leaving: dict[str, list[Tensor]] = {}
    handles = []
    for path, module in model.named_modules():
        if path.endswith(("o_proj", "down_proj")):
            hook = lambda m, args, p=path: entering.setdefault(p, []).append(args[0][0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        if path.endswith("layernorm"):
            note = lambda m, args, out, p=path: leaving.setdefault(p, []).append(out[0])  # noqa: E731
            handles.append(module.register_forward_hook(note))
    for row in ids:
        model(row.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return entering, leaving


def size(sequences: list[Tensor], column: int) -> float:
    """√ of the mean over sequences of (mean over tokens of |x|)²."""
    squares = [(sum(abs(float(x[column])) for x in tokens) / len(tokens)) ** 2 for tokens in sequences]
    return (sum(squares) / len(squares)) ** 0.5


def test_scores_are_means_of_sizes_over_tokens_then_squares_over_sequences() -> None:
    model, ids = tiny("llama"), text(3, 7)
    scores = MEASURES.make("minitron").measure(Lab(model, ids, batch_size=2))
    entering, leaving = met(model, ids)
    for n in range(4):
        inside = entering[f"model.layers.{n}.mlp.down_proj"]
        want = [size(inside, c) for c in range(64)]
        np.testing.assert_allclose(scores.values[f"block.{n}.mlp.neuron"], want, rtol=1e-4)
        inside = entering[f"model.layers.{n}.self_attn.o_proj"]
        want = [sum(size(inside, c) ** 2 for c in range(8 * h, 8 * h + 8)) ** 0.5 for h in range(4)]
        np.testing.assert_allclose(scores.values[f"block.{n}.attention.head"], want, rtol=1e-4)
        want = [sum(size(inside, c) ** 2 for c in range(16 * g, 16 * g + 16)) ** 0.5 for g in range(2)]
        np.testing.assert_allclose(scores.values[f"block.{n}.attention.kv_group"], want, rtol=1e-4)
    want = [sum(size(outputs, c) for outputs in leaving.values()) for c in range(32)]
    assert len(leaving) == 8
    np.testing.assert_allclose(scores.values["channel"], want, rtol=1e-4)


def test_twin_neurons_score_alike_and_silent_ones_nothing() -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        mlp = model.model.layers[2].mlp
        for rows in (mlp.up_proj.weight, mlp.gate_proj.weight):
            rows[9] = rows[4]
            rows[11] = 0
    value = MEASURES.make("minitron").measure(Lab(model, text(4, 9))).values["block.2.mlp.neuron"]
    assert value[9] == pytest.approx(value[4], rel=1e-6)
    assert value[11] == 0
    assert np.delete(value, 11).min() > 0


def test_padding_counts_neither_as_tokens_nor_as_zeros() -> None:
    rows = [text(1, n, seed=n)[0] for n in (9, 4, 7)]
    alone = MEASURES.make("minitron").measure(lab_on([{"input_ids": r.unsqueeze(0)} for r in rows]))
    together = MEASURES.make("minitron").measure(lab_on(padded(rows, 3)))
    for site, value in alone.values.items():
        np.testing.assert_allclose(together.values[site], value, rtol=1e-4)


@pytest.mark.parametrize("kinds", [("neuron",), ("neuron", "kv_group"), ("head", "channel"), ("channel",)])
def test_all_blocks_keep_as_many_of_the_largest_units(kinds: tuple[str, ...]) -> None:
    lab = Lab(tiny("llama"), text(4, 9))
    scores = MEASURES.make("minitron").measure(lab)
    options = {"kinds": tuple(map(Kind, kinds)), "multiple": 8}
    steps = PLANNERS.make("minitron", options).plan(scores, Budget(keep=0.85), lab.anatomy)
    for step in steps:
        widths = set()
        for site, gone in step.options["gone"].items():
            value = scores.values[site]
            stay = [n for n in range(len(value)) if n not in gone]
            widths.add(len(stay))
            if "head" not in site:
                assert value[stay].min() >= value[gone].max()
            else:
                assert [sum(n < 2 for n in stay), sum(n >= 2 for n in stay)] == [len(stay) // 2] * 2
        assert len(widths) == 1
    whole = lab.anatomy.total().parameters
    for step in steps:
        REWRITES.make("narrow").apply(step, lab)
    assert lab.anatomy.total().parameters <= 0.85 * whole
    config: Any = lab.model.config
    rows = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
    layer = lab.model.model.layers[3]
    assert rows[:2] == (layer.mlp.up_proj.in_features, layer.mlp.up_proj.out_features)
    assert rows[2] * 8 == layer.self_attn.q_proj.out_features
    assert rows[3] * 8 == layer.self_attn.k_proj.out_features


def test_of_several_architectures_the_one_of_least_loss_is_taken() -> None:
    lab = Lab(tiny("gpt_neox"), text(4, 9))
    scores = MEASURES.make("minitron").measure(lab)
    before = picture(lab.model)
    found = {}
    for trials in (1, 2, 6):
        method = PLANNERS.make("minitron", {"trials": trials, "multiple": 8})
        found[trials] = method.plan(scores, Budget(keep=0.75), lab.anatomy, Bench(lab))
    expect_same(before, picture(lab.model), "the search")
    losses = {t: loss_after(lab, steps) for t, steps in found.items()}
    assert losses[6] <= losses[2]
    other = Lab(tiny("gpt_neox"), text(4, 9))
    for step in found[6]:
        REWRITES.make("narrow").apply(step, other)
    assert other.loss() == pytest.approx(losses[6], rel=1e-6)
    assert other.anatomy.total().parameters <= 0.75 * lab.anatomy.total().parameters


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trials": 0}, "trials"),
        ({"multiple": 0}, "multiple"),
        ({"parallel": 0}, "parallel"),
        ({"shares": (0.0,)}, "shares"),
        ({"kinds": (Kind.HEAD, Kind.KV_GROUP)}, "one of both"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        PLANNERS.make("minitron", options)


def test_budgets_that_no_width_meets_are_refused() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    scores = MEASURES.make("minitron").measure(lab)
    for trials in (1, 2):
        with pytest.raises(InputError, match="at most"):
            PLANNERS.make("minitron", {"trials": trials}).plan(scores, Budget(limit=900), lab.anatomy, Bench(lab))
