"""Adaptive MLP Pruning (arXiv 2603.08100): the entropy's first-order terms by plain autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import lively, padded, text, tiny

ENDS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2")


def entropy(logits: Tensor) -> Tensor:
    """-Σ p log p, summed over rows."""
    p = logits.double().softmax(-1)
    return -(p * p.log()).sum()


def literal(model: Any, inputs: list[dict[str, Tensor]]) -> list[np.ndarray]:
    """Σ over tokens of a · ∂H/∂a of every sequence: [layers] of [sequences, neurons]."""
    maps = [m for n, m in model.named_modules() if n.endswith(ENDS)]
    rows: list[list[np.ndarray]] = [[] for _ in maps]
    for one in inputs:
        met: list[Tensor] = []

        def keep(_: Any, args: Any, met: list[Tensor] = met) -> Any:
            met.append(args[0].detach().requires_grad_() if not args[0].requires_grad else args[0])
            met[-1].retain_grad()
            return (met[-1],)

        handles = [m.register_forward_pre_hook(keep) for m in maps]
        logits = model(**one).logits[0]
        for handle in handles:
            handle.remove()
        entropy(logits[:-1] if logits.ndim == 2 else logits).backward()
        for found, activation in zip(rows, met, strict=True):
            assert activation.grad is not None
            terms = activation.detach().double() * activation.grad.double()
            found.append(terms.flatten(0, -2).sum(0).numpy())
        model.zero_grad()
    return [np.stack(r) for r in rows]


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    settings = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    config = ViTConfig(**settings, image_size=8, patch_size=4, num_labels=7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lively(ViTForImageClassification(config)).eval()


def expect(got: Any, terms: list[np.ndarray], count: int) -> None:
    for n, found in enumerate(terms):
        sizes = np.abs(found)
        scale = sizes.max()
        assert got.values[f"block.{n}.mlp.neuron"] == pytest.approx(sizes.mean(0), rel=1e-3, abs=1e-5 * scale)
        wanted = sizes.std(0, ddof=1) / count**0.5
        assert got.stderr[f"block.{n}.mlp.neuron"] == pytest.approx(wanted, rel=1e-2, abs=1e-5 * scale)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_terms_are_those_of_autograd(name: str) -> None:
    model, ids = tiny(name), text(3, 7)
    terms = literal(model, [{"input_ids": row[None]} for row in ids])
    expect(MEASURES.make("entropy-taylor").measure(Lab(model, ids, batch_size=2)), terms, 3)
    got = MEASURES.make("entropy-taylor", {"signed": True}).measure(Lab(model, ids))
    for n, found in enumerate(terms):
        scale = np.abs(found).max()
        assert got.values[f"block.{n}.mlp.neuron"] == pytest.approx(found.mean(0), rel=1e-3, abs=1e-5 * scale)


def test_padding_and_unequal_lengths() -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (7, 3, 9)]
    terms = literal(model, [{"input_ids": r[None]} for r in rows])
    expect(MEASURES.make("entropy-taylor").measure(Lab(model, padded(rows, 3, side="left"))), terms, 3)


def test_a_vision_transformer_has_one_prediction_per_image() -> None:
    model = vit()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    terms = literal(model, [{"pixel_values": i[None]} for i in images])
    assert len(terms) == 3
    expect(MEASURES.make("entropy-taylor").measure(Lab(model, [{"pixel_values": images}])), terms, 3)


def test_neurons_that_write_nothing_score_zero_and_can_go() -> None:
    model, ids = tiny("llama"), text(2, 7)
    before = model(ids).logits
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[:, [3, 40]] = 0  # type: ignore[index,operator]
    got = MEASURES.make("entropy-taylor").measure(Lab(model, ids)).values["block.1.mlp.neuron"]
    assert np.flatnonzero(got == 0).tolist() == [3, 40]
    after = model(ids).logits
    assert not torch.equal(before, after)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[[3, 40]] = 0  # type: ignore[index,operator]
    assert torch.equal(model(ids).logits, after)


def test_the_term_is_what_a_small_cut_changes() -> None:
    """(H(a) - H((1 - ε) a)) / ε, of one neuron at every position of a sequence."""
    model, ids = tiny("gpt2").double(), text(1, 6)
    got = MEASURES.make("entropy-taylor", {"signed": True}).measure(Lab(model, ids))
    module: Any = model.get_submodule("transformer.h.2.mlp.c_proj")
    step = 1e-5

    def cut(_: Any, args: Any) -> Any:
        x = args[0].clone()
        x[..., 17] *= 1 - step
        return (x,)

    with torch.no_grad():
        whole = float(entropy(model(ids).logits[0, :-1]))
        handle = module.register_forward_pre_hook(cut)
        less = float(entropy(model(ids).logits[0, :-1]))
        handle.remove()
    assert got.values["block.2.mlp.neuron"][17] == pytest.approx((whole - less) / step, rel=1e-2)


def test_vectors_have_no_entropy() -> None:
    model: Any = vit()
    lab = Lab(model.vit, [{"pixel_values": torch.zeros(2, 3, 8, 8)}])
    with pytest.raises(UnsupportedError, match="no distributions"):
        MEASURES.make("entropy-taylor").measure(lab)


def test_experts_have_no_neurons_here() -> None:
    got = MEASURES.make("entropy-taylor").measure(Lab(tiny("mixtral"), text(2, 6)))
    assert not got.values
