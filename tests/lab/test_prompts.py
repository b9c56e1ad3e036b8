"""The lab's sequences one by one: evenly chosen, without padding."""

from __future__ import annotations

import pytest
import torch

from lamina.core.errors import UnsupportedError
from lamina.lab import Lab
from lamina.lab.prompts import prompts, singles
from lamina.testing.models import padded, text, tiny


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_gone(side: str) -> None:
    rows = [text(1, n, seed=n)[0] for n in (5, 9, 3, 7)]
    lab = Lab(tiny("llama"), padded(rows, 3, side=side))
    assert all(torch.equal(a, b) for a, b in zip(prompts(lab), rows, strict=True))
    cut = prompts(lab, length=4)
    assert [len(c) for c in cut] == [4, 4, 3, 4]
    assert all(torch.equal(a, b[:4]) for a, b in zip(cut, rows, strict=True))


def test_some_are_chosen_evenly_among_those_that_are_long_enough() -> None:
    rows = [text(1, n, seed=n)[0] for n in (2, 4, 5, 2, 6, 7)]
    lab = Lab(tiny("llama"), padded(rows, 2))
    assert [len(p) for p in prompts(lab, 2, shortest=3)] == [4, 6]
    assert [len(p) for p in prompts(lab, 9, shortest=6)] == [6, 7]
    assert [list(b) for b in singles(lab, 1)] == [["input_ids"]]
    with pytest.raises(UnsupportedError, match="8 tokens"):
        prompts(lab, shortest=8)


def test_inputs_that_are_no_tokens() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**settings, image_size=8, patch_size=4)).eval()
    images = torch.randn(3, 3, 8, 8)
    lab = Lab(model, [{"pixel_values": images[:2]}, {"pixel_values": images[2:]}])
    found = singles(lab)
    assert all(torch.equal(b["pixel_values"][0], i) for b, i in zip(found, images, strict=True))
    with pytest.raises(UnsupportedError, match="tokens"):
        prompts(lab)
