"""Flash Interpretability (arXiv 2501.02688): neurons decoded one by one, from the modules' own weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.testing.bench import expect_same as expect_untouched
from lamina.testing.bench import lab, picture
from lamina.testing.models import text, tiny

VECTORS = {
    ("llama", "last"): lambda m, n: [m.model.layers[n].mlp.up_proj.weight],
    ("llama", "first"): lambda m, n: [m.model.layers[n].mlp.gate_proj.weight],
    ("llama", "tail"): lambda m, n: [m.model.layers[n].mlp.down_proj.weight.T],
    ("llama", "best"): lambda m, n: [m.model.layers[n].mlp.gate_proj.weight, m.model.layers[n].mlp.up_proj.weight],
    ("gpt2", "last"): lambda m, n: [m.transformer.h[n].mlp.c_fc.weight.T],
    ("gpt2", "tail"): lambda m, n: [m.transformer.h[n].mlp.c_proj.weight],
    ("phi", "last"): lambda m, n: [m.model.layers[n].mlp.fc1.weight],
    ("gemma2", "last"): lambda m, n: [m.model.layers[n].mlp.up_proj.weight],
}
"""The vectors [neurons, width] that are decoded."""


def measured(model: Any, **options: Any) -> Scores:
    return MEASURES.make("neuron-lens", options).measure(Lab(model, text(1, 4)))


def decoded(model: Any, vectors: list[Tensor], score: str, both: bool) -> list[tuple[float, int]]:
    """(score, token) of each neuron, one at a time, in float64."""
    head = model.get_output_embeddings()
    u = head.weight.detach().double()
    bias = head.bias.detach().double() if getattr(head, "bias", None) is not None else 0.0
    found = []
    for neuron in range(len(vectors[0])):
        tries = []
        for matrix in vectors:
            for w in [matrix[neuron].detach().double(), *([-matrix[neuron].detach().double()] if both else [])]:
                if score == "cosine":
                    every = torch.stack([w @ row for row in u]) / (w.norm() * u.norm(dim=1))
                else:
                    every = torch.softmax(u @ w + bias, 0)
                tries.append((float(every.max()), int(every.argmax())))
        found.append(max(tries))
    return found


def expect_same(got: Scores, site: str, wanted: list[tuple[float, int]]) -> None:
    grid = got.grids["tokens"]
    tokens = grid.values[grid.rows.index(site)]
    assert got.values[site].tolist() == pytest.approx([s for s, _ in wanted], rel=1e-5)
    assert tokens.tolist() == [t for _, t in wanted]


@pytest.mark.parametrize("score", ["probability", "cosine"])
@pytest.mark.parametrize(("name", "read"), list(VECTORS))
def test_scores_and_tokens_are_those_of_plain_decoding(name: str, read: str, score: str) -> None:
    model = tiny(name)
    got = measured(model, read=read, score=score)
    assert list(got.values) == [f"block.{n}.mlp.neuron" for n in range(4)]
    expect_same(got, "block.3.mlp.neuron", decoded(model, VECTORS[name, read](model, 3), score, both=False))


@pytest.mark.parametrize("score", ["probability", "cosine"])
def test_both_signs(score: str) -> None:
    model = tiny("phi")  # its unembedding has a bias, which does not change its sign
    got = measured(model, score=score, both_signs=True)
    expect_same(got, "block.1.mlp.neuron", decoded(model, VECTORS["phi", "last"](model, 1), score, both=True))


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    whole = measured(model)
    monkeypatch.setattr("lamina.papers.neurons.lm_head_neurons.NEURONS", 5)
    monkeypatch.setattr("lamina.papers.neurons.lm_head_neurons.TOKENS", 7)
    parts = measured(model)
    for site in whole.values:
        assert parts.values[site].tolist() == pytest.approx(whole.values[site].tolist(), rel=1e-5)
    assert (parts.grids["tokens"].values == whole.grids["tokens"].values).all()


def test_a_neuron_that_is_a_row_of_the_unembedding_names_its_token() -> None:
    model = tiny("llama")
    u = model.get_output_embeddings().weight
    with torch.no_grad():
        u.copy_(torch.nn.functional.normalize(u, dim=-1))
        model.model.layers[2].mlp.up_proj.weight[5] = 40 * u[77]
        model.model.layers[2].mlp.up_proj.weight[6] = -0.01 * u[33]
    site = "block.2.mlp.neuron"
    got = measured(model)
    row = got.grids["tokens"].rows.index(site)
    assert got.grids["tokens"].values[row, 5] == 77
    assert got.values[site][5] > 0.9 > got.values[site][6]
    small = measured(model, score="cosine", both_signs=True)
    assert small.grids["tokens"].values[row, 6] == 33
    assert small.values[site][5:7].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_a_neuron_of_zeros_is_as_flat_as_can_be() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1] = 0
    assert measured(model).values["block.0.mlp.neuron"][1] == pytest.approx(1 / 99, rel=1e-6)
    assert measured(model, score="cosine").values["block.0.mlp.neuron"][1] == 0.0


def test_bfloat16_weights_are_multiplied_in_float32() -> None:
    model = tiny("llama").bfloat16()
    expect_same(
        measured(model),
        "block.1.mlp.neuron",
        decoded(model, VECTORS["llama", "last"](model, 1), "probability", both=False),
    )


@pytest.mark.parametrize("options", [{}, {"read": "best", "score": "cosine", "both_signs": True}])
def test_the_model_is_left_as_it_was(options: dict[str, Any]) -> None:
    bench = lab("gpt2")
    before = picture(bench.model)
    MEASURES.make("neuron-lens", options).measure(bench)
    expect_untouched(before, picture(bench.model), "the measure")


def test_what_cannot_be_decoded() -> None:
    with pytest.raises(UnsupportedError, match="no unembedding"):
        measured(tiny("nanogpt"))
    with pytest.raises(UnsupportedError, match="no unembedding"):
        measured(tiny("llama").model)
    experts = measured(tiny("mixtral"))
    assert not experts.values
    assert experts.missing["block.3.moe"] == "the neurons of experts are no sites"
    model = tiny("llama")
    model.get_output_embeddings = lambda: torch.nn.Linear(16, 99)
    got = measured(model)
    assert not got.values
    assert "not as wide" in got.missing["block.0.mlp.neuron"]


@pytest.mark.parametrize(("option", "value"), [("read", "up"), ("score", "logit")])
def test_bad_options(option: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{option} must be one of"):
        MEASURES.make("neuron-lens", {option: value})
