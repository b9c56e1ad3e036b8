"""Neuron paths (arXiv 2503.09046): joint attribution step by step, one forward and one backward each, hooks by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.papers.neurons.neuron_path import Run
from lamina.testing.models import NanoGPT, lively, padded, text, tiny


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    settings = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    config = ViTConfig(**settings, image_size=8, patch_size=4, num_labels=7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lively(ViTForImageClassification(config)).eval()


def maps(model: Any) -> list[nn.Module]:
    """The last maps of the MLPs."""
    ends = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "output.dense", "mlp.fc2")
    return [m for n, m in model.named_modules() if n.endswith(ends) and "attention.output" not in n]


class Literal:
    """One input, one position; every step of every integral is a pass of its own."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], steps: int) -> None:
        self.model, self.inputs, self.steps = model, inputs, steps
        self.place = -1 if "input_ids" in inputs else 0
        self.clean: list[Tensor] = []
        handles = [
            m.register_forward_pre_hook(lambda _, a: self.clean.append(a[0][0, self.place])) for m in maps(model)
        ]
        with torch.no_grad():
            logits = self.logits()
        for handle in handles:
            handle.remove()
        self.label = int(logits.argmax())

    def logits(self) -> Tensor:
        out = self.model(**self.inputs).logits[0]
        return out if out.ndim == 1 else out[self.place]

    def gradient(self, vectors: list[Tensor]) -> list[Tensor]:
        """∂F/∂w at these neurons of the first layers."""
        leaves = [v.clone().requires_grad_() for v in vectors]
        handles = []
        for module, leaf in zip(maps(self.model), leaves, strict=False):

            def put(_: Any, args: Any, leaf: Tensor = leaf) -> Any:
                x = args[0].clone()
                x[0, self.place] = leaf
                return (x,)

            handles.append(module.register_forward_pre_hook(put))
        told = self.logits().softmax(-1)[self.label]
        for handle in handles:
            handle.remove()
        return list(torch.autograd.grad(told, leaves))

    def with_chosen(self, path: list[int], alpha: float) -> list[Tensor]:
        vectors = [w.clone() for w in self.clean[: len(path)]]
        for vector, p in zip(vectors, path, strict=True):
            vector[p] *= alpha
        return vectors

    def scores(self) -> tuple[list[np.ndarray], list[int]]:
        found: list[np.ndarray] = []
        path: list[int] = []
        for layer, own in enumerate(self.clean):
            sums = np.zeros(len(own))
            for k in range(self.steps):
                alpha = k / self.steps
                gradients = self.gradient([*self.with_chosen(path, alpha), alpha * own])
                sums += gradients[layer].double().numpy()
                sums += sum(float(g[p]) for g, p in zip(gradients, path, strict=False))
            sizes = own.double().numpy() + sum(float(w[p]) for w, p in zip(self.clean, path, strict=False))
            found.append(sums * sizes / self.steps)
            path.append(int(found[-1].argmax()))
        return found, path

    def attribution(self, path: list[int]) -> float:
        total = 0.0
        for k in range(self.steps):
            gradients = self.gradient(self.with_chosen(path, k / self.steps))
            total += sum(float(g[p]) for g, p in zip(gradients, path, strict=True))
        return total * sum(float(w[p]) for w, p in zip(self.clean, path, strict=False)) / self.steps


def expect_literal(got: Any, found: list[Literal], sites: list[str]) -> None:
    scores = [f.scores() for f in found]
    for n, site in enumerate(sites):
        wanted = np.mean([s[n] for s, _ in scores], 0)
        assert got.values[site] == pytest.approx(wanted, rel=1e-3, abs=1e-5 * np.abs(wanted).max())
        spread = np.std([s[n] for s, _ in scores], 0, ddof=1) / len(found) ** 0.5
        assert got.stderr[site] == pytest.approx(spread, rel=1e-2, abs=1e-5 * np.abs(wanted).max())
    for row, (literal, (_, path)) in enumerate(zip(found, scores, strict=True)):
        assert got.grids["path"].values[row, :-1].tolist() == path
        assert got.grids["path"].values[row, -1] == pytest.approx(literal.attribution(path), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "phi"])
def test_scores_and_path_of_a_language_model(name: str) -> None:
    model, ids = tiny(name), text(2, 6)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    got = MEASURES.make("neuron-path", {"steps": 4}).measure(Lab(model, ids))
    expect_literal(
        got, [Literal(model, {"input_ids": row[None]}, 4) for row in ids], [f"block.{n}.mlp.neuron" for n in range(4)]
    )


def test_scores_and_path_of_a_vision_transformer() -> None:
    model = vit()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    got = MEASURES.make("neuron-path").measure(Lab(model, [{"pixel_values": images}]))
    found = [Literal(model, {"pixel_values": image[None]}, 20) for image in images]
    expect_literal(got, found, [f"block.{n}.mlp.neuron" for n in range(3)])
    assert got.grids["path"].columns == (*got.values, "whole path")


def test_padding_and_length() -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (7, 4, 9)]
    measure = MEASURES.make("neuron-path", {"steps": 3, "sequences": 3, "length": 5})
    got = measure.measure(Lab(model, padded(rows, 3, side="left")))
    again = measure.measure(Lab(model, [{"input_ids": r[None, :5]} for r in rows]))
    for site, values in again.values.items():
        assert got.values[site] == pytest.approx(values, rel=1e-4, abs=1e-9)


def test_one_neuron_s_attribution_is_what_the_prediction_loses_without_it() -> None:
    """Completeness: the integral of a derivative; the left sum comes close with many steps."""
    model, ids = tiny("llama"), text(1, 6)
    lab = Lab(model, ids)
    run = Run(lab, {"input_ids": ids}, [lab.anatomy.tail(lab.anatomy.site("block.2.mlp.neuron"))], 400)
    neuron = int(run.clean[0].abs().argmax())

    def told(neurons: Tensor | None) -> float:
        with torch.no_grad():
            return float(run.logits([neurons], 1).softmax(-1)[0, run.label])

    without = run.clean[0].clone().unsqueeze(0)
    without[0, neuron] = 0
    loss = told(None) - told(without)
    assert abs(loss) > 1e-4
    assert run.attribution([neuron]) == pytest.approx(loss, rel=2e-2)


def test_the_last_position_alone_goes_through_the_head() -> None:
    model, ids = tiny("gemma2"), text(1, 6)
    lab = Lab(model, ids)
    run = Run(lab, {"input_ids": ids}, [lab.anatomy.tail(lab.anatomy.site("block.0.mlp.neuron"))], 2)
    assert run.cut
    with torch.no_grad():
        torch.testing.assert_close(run.logits([None], 1), model(ids).logits[:, -1], rtol=1e-5, atol=1e-5)


def test_experts_have_no_path() -> None:
    got = MEASURES.make("neuron-path").measure(Lab(tiny("mixtral"), text(1, 6)))
    assert not got.values
    assert got.missing == {"": "the model has no MLP"}


def test_vectors_are_no_probabilities() -> None:
    model = vit()
    with pytest.raises(UnsupportedError, match="no probabilities"):
        MEASURES.make("neuron-path").measure(Lab(model.vit, [{"pixel_values": torch.zeros(1, 3, 8, 8)}]))  # type: ignore[arg-type]


def test_models_that_no_library_knows() -> None:
    got = MEASURES.make("neuron-path", {"steps": 2}).measure(Lab(NanoGPT().eval(), text(1, 6)))
    assert [len(v) for v in got.values.values()] == [128] * 4


@pytest.mark.parametrize("options", [{"steps": 0}, {"sequences": 0}, {"length": 1}])
def test_options(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make("neuron-path", options)
