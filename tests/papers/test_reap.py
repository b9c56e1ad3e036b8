"""REAP against loops over tokens, experts and gates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.documents import Budget
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import MEASURES, PLANNERS, REWRITES
from lamina.core.sites import Kind
from lamina.lab import Lab
from lamina.testing import zoo
from lamina.testing.bench import lab_on
from lamina.testing.models import padded, text, tiny


@torch.no_grad()
def literal(model: Any, ids: Tensor) -> dict[str, tuple[list[float], list[int]]]:
    """Per mixture: Σ gate · ‖expert's output‖ over its tokens, and how many these are; from weights alone."""
    found = {}
    for number, layer in enumerate(model.model.layers):
        met: list[Tensor] = []
        handle = layer.mlp.register_forward_pre_hook(lambda m, args, met=met: met.append(args[0]))
        model(ids)
        handle.remove()
        totals, counts = [0.0] * 4, [0] * 4
        for token in met[0].flatten(0, 1):
            logits = layer.mlp.gate.weight @ token
            best = logits.argsort(descending=True)[:2].tolist()
            shares = logits[best].softmax(0)  # of two probabilities, each over their sum
            for expert, share in zip(best, shares, strict=True):
                gate, up = (layer.mlp.experts.gate_up_proj[expert] @ token).chunk(2)
                out = layer.mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                totals[expert] += float(share) * float(out.norm())
                counts[expert] += 1
        found[f"block.{number}.moe.expert"] = totals, counts
    return found


def test_scores_are_means_over_the_tokens_of_an_expert() -> None:
    model, ids = tiny("mixtral"), text(5, 11)
    scores = MEASURES.make("reap").measure(Lab(model, ids, batch_size=2))
    want = literal(model, ids)
    assert set(scores.values) == set(want)
    for row, (site, (totals, counts)) in enumerate(want.items()):
        np.testing.assert_allclose(scores.values[site], np.array(totals) / np.maximum(counts, 1), rtol=1e-4)
        assert scores.grids["tokens"].values[row].tolist() == counts


def test_padding_goes_to_no_expert() -> None:
    rows = [text(1, n, seed=n)[0] for n in (9, 4, 7)]
    alone = MEASURES.make("reap").measure(lab_on([{"input_ids": r.unsqueeze(0)} for r in rows], "mixtral"))
    together = MEASURES.make("reap").measure(lab_on(padded(rows, 3, side="left"), "mixtral"))
    assert alone.grids["tokens"].values.sum() == 2 * 4 * (9 + 4 + 7)
    for site, value in alone.values.items():
        np.testing.assert_allclose(together.values[site], value, rtol=1e-4)


def test_experts_that_add_nothing_or_get_no_token_score_zero_and_go() -> None:
    model: Any = tiny("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[2] = 0
    lab = Lab(model, text(4, 12))
    scores = MEASURES.make("reap").measure(lab)
    assert all(v[2] == 0 and v[[0, 1, 3]].min() > 0 for v in scores.values.values())
    steps = PLANNERS.make("reap").plan(scores, Budget(keep=0.8), lab.anatomy)
    assert [list(s.options["gone"].values()) for s in steps] == [[[2]] * 4]
    REWRITES.make("narrow").apply(steps[0], lab)
    assert lab.model.config.num_local_experts == 3
    assert lab.anatomy.total().parameters <= 0.8 * sum(p.numel() for p in tiny("mixtral").parameters())


def test_a_model_without_experts_has_no_scores_and_no_plan() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    scores = MEASURES.make("reap").measure(lab)
    assert not scores.values
    with pytest.raises(InputError, match="no experts"):
        PLANNERS.make("reap").plan(scores, Budget(keep=0.8), lab.anatomy)


def test_a_tokens_own_number_of_experts_is_the_limit() -> None:
    lab = Lab(tiny("mixtral"), text(2, 8))
    scores = MEASURES.make("reap").measure(lab)
    with pytest.raises(InputError, match="at most"):
        PLANNERS.make("reap").plan(scores, Budget(keep=0.5), lab.anatomy)
    with pytest.raises(InputError, match="parallel"):
        PLANNERS.make("reap", {"parallel": 0}).plan(scores, Budget(keep=0.9), lab.anatomy)


@pytest.mark.parametrize(("name", "said"), [("llama4_text", "tokens, choices and gates"), ("jetmoe", "not stacked in")])
def test_mixtures_that_do_not_tell_are_refused_in_a_line(name: str, said: str) -> None:
    lab = Lab(zoo.build(name).model, text(2, 8) % 60 + 3)
    assert lab.anatomy.of_kind(Kind.EXPERT)
    with pytest.raises(LaminaError, match=said):
        MEASURES.make("reap").measure(lab)
