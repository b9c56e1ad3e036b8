"""Hopping Too Late (arXiv 2406.12775): every pair of source and target run whole, with a hook on the target's layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.papers.heads.back_patching import back_patched, run_from
from lamina.testing.models import padded, text, tiny

LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


@torch.no_grad()
def literal(model: Any, name: str, ids: Tensor, answer: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Gains of all pairs, s ≤ t too, [4, 4]; whether the answer comes first there; whether it does as it is."""
    layers = model.get_submodule(LAYERS.get(name, "model.layers"))
    kept: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: kept.append(first(out)[0, -1].clone())) for layer in layers
    ]
    clean = model(ids.unsqueeze(0), use_cache=False).logits[0, -1].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    gains, says = np.zeros((4, 4)), np.zeros((4, 4))
    for source in range(4):
        for target in range(4):

            def put(_: Any, __: Any, out: Any, state: Tensor = kept[source]) -> Any:
                first(out)[0, -1] = state
                return out

            handle = layers[target].register_forward_hook(put)
            made = model(ids.unsqueeze(0), use_cache=False).logits[0, -1].double().log_softmax(-1)
            handle.remove()
            gains[source, target] = float(made[answer] - clean[answer])
            says[source, target] = float(int(made.argmax()) == answer)
    return gains, says, int(clean.argmax()) == answer


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_gains_are_those_of_whole_runs(name: str) -> None:
    model, ids = tiny(name), text(3, 9)
    got = MEASURES.make("back-patching").measure(Lab(model, ids, batch_size=2))
    found = [literal(model, name, row[:-1], int(row[-1])) for row in ids]
    gains = np.stack([g for g, _, _ in found])
    assert set(got.values) == {"block.1", "block.2", "block.3"}
    for source in range(1, 4):
        helped = np.maximum(gains[:, source, :source], 0).mean(1)
        assert got[f"block.{source}"] == pytest.approx(helped.mean(), abs=1e-5)
        assert got.stderr[f"block.{source}"][0] == pytest.approx(helped.std(ddof=1) / 3**0.5, abs=1e-5)
        assert got.grids["gain"].values[source, :source] == pytest.approx(gains.mean(0)[source, :source], abs=1e-5)
        assert np.isnan(got.grids["gain"].values[source, source:]).all()
        assert got.grids["first"].values[source, :source] == pytest.approx(
            np.mean([says[source, :source] for _, says, _ in found], 0)
        )
    assert max(np.abs(got.grids["gain"].values[1:, 0])) > 0.01


def test_putting_a_block_s_own_state_back_changes_nothing() -> None:
    model, ids = tiny("llama"), text(1, 8)[0]
    gains, _, _ = literal(model, "llama", ids, 5)
    assert np.diag(gains) == pytest.approx(0.0, abs=1e-5)
    lab = Lab(model, ids.unsqueeze(0))
    states: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: states.append(first(out)[0]))
        for layer in model.get_submodule("model.layers")  # type: ignore[attr-defined]
    ]
    with torch.no_grad():
        model(ids.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    for target in range(3):
        made = run_from(lab, ids, target, states[target], states[target][-1:])
        torch.testing.assert_close(made[0], states[3][-1], rtol=1e-5, atol=1e-5)


def test_a_block_that_passes_its_input_on_helps_no_more_than_the_one_before() -> None:
    from lamina.testing.planted import identity_block

    model = tiny("llama")
    anatomy, _ = identity_block(model, 2)
    gains, _, _ = back_patched(Lab(model, text(1, 8), anatomy=anatomy), text(1, 8)[0], 5)
    assert gains[2, 0] == pytest.approx(gains[1, 0], abs=1e-5)
    assert gains[2, 1] == pytest.approx(0.0, abs=1e-5)


def test_answers_found_again_are_counted() -> None:
    """The answer is what the patched model says: of some sequences right, and of none at first."""
    model, ids = tiny("llama"), text(4, 9)
    rows = []
    with torch.no_grad():
        for row in ids:
            words = [int(model(row[None, :-1]).logits[0, -1].topk(2).indices[i]) for i in (0, 1)]
            rows.append(torch.cat([row[:-1], torch.tensor(words[len(rows) % 2 : len(rows) % 2 + 1])]))
    got = MEASURES.make("back-patching").measure(Lab(model, torch.stack(rows)))
    found = [literal(model, "llama", r[:-1], int(r[-1])) for r in rows]
    later = np.tril(np.ones((4, 4)), -1).astype(bool)
    wanted = np.zeros((2, 2))
    for _, says, right in found:
        wanted[int(not right), int(says[later].any())] += 1
    assert got.grids["found"].values.tolist() == wanted.tolist()
    assert wanted[0].sum() == 2


def test_padding_and_length() -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (9, 5, 12)]
    got = MEASURES.make("back-patching", {"length": 6}).measure(Lab(model, padded(rows, 3, side="left")))
    cut = [r[:7] for r in rows]
    gains = np.stack([literal(model, "llama", r[:-1], int(r[-1]))[0] for r in cut])
    assert got["block.3"] == pytest.approx(np.maximum(gains[:, 3, :3], 0).mean(), abs=1e-5)


def test_what_it_costs() -> None:
    lab = Lab(tiny("llama"), text(2, 9))
    MEASURES.make("back-patching").measure(lab)
    assert lab.counts.blocks == 2 * 8 * (4 + 3 * 3 + 2 * 2 + 1)  # the clean run, then sources × blocks from each target


@pytest.mark.parametrize("options", [{"sequences": 0}, {"length": 1}])
def test_options(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make("back-patching", options)


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="3 tokens"):
        MEASURES.make("back-patching").measure(Lab(tiny("llama"), text(2, 2)))
