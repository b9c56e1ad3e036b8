"""Task-loss matching (arXiv 2412.11299) against a map that is hooked into a copy and trained with Adam written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.maths.affine import affine
from lamina.testing.models import lively, own_text, text, tiny
from lamina.testing.planted import silence


def measured(lab: Lab, **options: Any) -> Scores:
    return MEASURES.make("task-matching", options).measure(lab)


def halves(model: Any, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean losses of the predictions of all sequences' first halves, and of their second halves."""
    early, late = [], []
    for row in rows:
        logits = model(row.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)
        for t in range(len(row) - 1):
            (early if t < (len(row) - 1) // 2 else late).append(-logits[t, row[t + 1]])
    return torch.stack(early).mean(), torch.stack(late).mean()


def literal(model: Any, rows: list[Tensor], block: int, steps: int, rate: float, ridge: float) -> list[float]:
    """Rises with the direct match and after training; distances of both."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.requires_grad_(False)
    layer, x, y = model.model.layers[block], [], []

    def note(_: Any, args: Any, out: Tensor) -> None:
        x.append(args[0][0])
        y.append(out[0])

    handle = layer.register_forward_hook(note)
    with torch.no_grad():
        dense = float(halves(model, rows)[1])
    handle.remove()
    first = [len(r) // 2 for r in rows]
    fx = torch.cat([s[:n] for s, n in zip(x, first, strict=True)])
    fy = torch.cat([s[:n] for s, n in zip(y, first, strict=True)])
    lx = torch.cat([s[n:] for s, n in zip(x, first, strict=True)]).double()
    ly = torch.cat([s[n:] for s, n in zip(y, first, strict=True)]).double()
    weights = [w.float() for w in affine(fx, fy - fx, ridge)]

    def look() -> tuple[float, float]:
        with torch.no_grad():
            rise = float(halves(model, rows)[1]) - dense
        guess = lx + lx @ weights[0].double() + weights[1].double()
        return rise, float(((guess - ly) ** 2).sum() / (ly**2).sum())

    handle = layer.register_forward_hook(lambda _, a, out: a[0] + a[0] @ weights[0] + weights[1])
    direct = look()
    mean, square = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step in range(1, steps + 1):
        weights = [w.detach().requires_grad_() for w in weights]
        gradients = torch.autograd.grad(halves(model, rows)[0], weights)
        moved = []
        for i, (w, gradient) in enumerate(zip(weights, gradients, strict=True)):
            g = gradient + 1e-5 * w.detach()
            mean[i] = 0.9 * mean[i] + 0.1 * g
            square[i] = 0.999 * square[i] + 0.001 * g * g
            size = (square[i] / (1 - 0.999**step)).sqrt() + 1e-8
            moved.append(w.detach() - rate * mean[i] / (1 - 0.9**step) / size)
        weights = moved
    trained = look()
    handle.remove()
    return [direct[0], trained[0], direct[1], trained[1]]


def test_is_the_papers_procedure() -> None:
    model = tiny("llama")
    rows = [own_text(model, 1, 12, seed=n)[0] for n in range(3)]
    lab = Lab(model, torch.stack(rows))
    got = measured(lab, steps=4, learning_rate=3e-3, ridge=0.05)
    grid = got.grids["matching"]
    assert grid.columns == ("direct", "trained", "distance of the direct", "distance of the trained")
    for n in range(4):
        wanted = literal(model, rows, n, 4, 3e-3, 0.05)
        assert grid.values[n] == pytest.approx(wanted, rel=1e-2, abs=2e-4)
        assert got[f"block.{n}"] == grid.values[n, 1]
    assert got.unit == ""


def test_training_fakes_likeness() -> None:
    """The paper's point: the loss falls while the states move away."""
    model = tiny("llama")
    lab = Lab(model, own_text(model, 64, 24))
    direct, trained, near, far = (
        measured(lab, steps=10, learning_rate=1e-3, sequences=None).grids["matching"].values.sum(0)
    )
    assert trained < direct
    assert far > near


def test_without_steps_the_direct_match_is_judged() -> None:
    grid = measured(Lab(tiny("llama"), text(4, 12)), steps=0).grids["matching"].values
    assert list(grid[:, 0]) == list(grid[:, 1])
    assert list(grid[:, 2]) == list(grid[:, 3])


def test_an_identity_block_is_matched_by_nothing() -> None:
    lab = Lab(tiny("gpt_neox"), text(4, 12))
    silence(lab.anatomy, "block.1")
    grid = measured(lab).grids["matching"].values
    assert grid[1, 0] == 0.0
    assert grid[1, 2] == 0.0


def test_the_model_is_not_trained() -> None:
    model = tiny("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measured(Lab(model, text(4, 12)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_what_predicts_no_tokens_is_refused() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    lab = Lab(lively(transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=99))), text(2, 8))
    with pytest.raises(UnsupportedError, match="predicts no next tokens"):
        measured(lab)


def test_wrong_options_are_refused() -> None:
    wrong = (({"steps": -1}, "steps is at least 0"), ({"learning_rate": 0.0}, "learning_rate is above 0"))
    for options, line in (*wrong, ({"ridge": 0.0}, "ridge is above 0"), ({"length": 0}, "length is at least 1")):
        with pytest.raises(InputError, match=line):
            MEASURES.make("task-matching", options)
