"""Damage after healing, by hand for one block; and what it is asked for."""

from __future__ import annotations

import copy

import pytest
import torch

from lamina.core.errors import InputError
from lamina.core.registry import HEALERS, MEASURES
from lamina.lab import Lab
from lamina.testing.models import lively, text, tiny


def bench() -> Lab:
    return Lab(lively(tiny("llama")), text(6, 20), batch_size=2)


def test_a_score_is_what_a_healed_copy_loses() -> None:
    lab = bench()
    scores = MEASURES.make("healed-damage", {"steps": 3, "sequences": 4, "length": 16}).measure(lab)
    assert sorted(scores.values) == [f"block.{n}" for n in range(4)]
    chosen = lab.part(4, 16)
    rows = torch.cat([b["input_ids"] for b in chosen.batches])
    copied = copy.deepcopy(lab.model)
    learnt = Lab(copied, list(chosen.batches[:2]), seed=lab.seed)
    assert len(learnt.anatomy.stacks[0].blocks) == 4, "found before the block is one that does nothing"
    copied.model.layers[2].forward = lambda hidden_states, **_: hidden_states
    HEALERS.make("lora").heal(learnt, teacher=lab.model, steps=3)
    losses = []
    for model in (lab.model, copied):
        with torch.no_grad():
            logits = model(rows[2:], use_cache=False).logits[:, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), rows[2:, 1:].flatten())))
    assert scores["block.2"] == pytest.approx(losses[1] - losses[0], abs=2e-4)
    assert scores.unit == "nats"


def test_healing_brings_the_loss_of_its_own_text_to_that_of_the_dense_model() -> None:
    lab = bench()
    lab = lab.on(torch.cat([lab.batches[0]["input_ids"]] * 2))  # both halves are the same text
    few, many = (MEASURES.make("healed-damage", {"steps": n, "sequences": 4}).measure(lab)["block.1"] for n in (1, 40))
    assert abs(many) < 0.9 * abs(few)


@pytest.mark.parametrize("options", [{"steps": 0}, {"sequences": 1}, {"healer": "none"}])
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        MEASURES.make("healed-damage", options).measure(bench())
