"""Layer Sustainability Analysis (arXiv 2202.02626): relative errors by hand, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.lab.probes import noise_of
from lamina.papers.robustness.sustainability import _streams
from lamina.testing.models import lively, padded, text, tiny
from lamina.testing.planted import silence


def measured(lab: Lab, **options: Any) -> Scores:
    return MEASURES.make("sustainability", options).measure(lab)


@torch.no_grad()
def states(model: Any, embedded: Tensor) -> list[Tensor]:
    """What a llama's layers return on these embeddings, float64."""
    found: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _, __, out: found.append(out.double())) for m in model.model.layers]
    model(inputs_embeds=embedded, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def noisy(x: Tensor, owners: Any, epsilon: float) -> Tensor:
    """Normal numbers of each sequence's own, relative to the root mean square of each token."""
    moved = x.clone()
    for row, owner in enumerate(owners):
        noise = torch.randn(x.shape[1:], generator=noise_of(int(owner), "perturbed", 0))
        for token in range(x.shape[1]):
            moved[row, token] += epsilon * x[row, token].square().mean().sqrt() * noise[token]
    return moved


def relative(clean: list[Tensor], moved: list[Tensor]) -> list[float]:
    """‖φ(x) - φ(x')‖_F / ‖φ(x)‖_F over the whole batch, flattened."""
    return [float((a - b).flatten().norm() / a.flatten().norm()) for a, b in zip(clean, moved, strict=True)]


def test_noise_is_the_papers_formula() -> None:
    model, ids = tiny("llama"), text(3, 9)
    lab = Lab(model, ids)
    x = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]
    moved = noisy(x, next(lab.rows()).owners, 0.03)
    wanted = relative(states(model, x), states(model, moved))
    got = measured(Lab(model, ids, batch_size=2), epsilon=0.03)
    assert [got[f"block.{n}"] for n in range(4)] == pytest.approx(wanted, rel=1e-4)
    grid = got.grids["sustainability"]
    assert grid.columns == ("error", "error over that before", "most vulnerable")
    before = float((x - moved).norm() / x.norm())
    assert grid.values[:, 1] == pytest.approx(np.array(wanted) / np.array([before, *wanted[:-1]]), rel=1e-3)
    limit = np.mean(wanted) + np.std(wanted)
    assert list(grid.values[:, 2]) == [float(w > limit) for w in wanted]


def test_fgsm_is_one_signed_step_of_the_embeddings() -> None:
    model, ids = tiny("llama"), text(3, 9)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    model(inputs_embeds=x, labels=ids, use_cache=False).loss.backward()
    assert x.grad is not None
    size = x.detach().square().mean(-1, keepdim=True).sqrt()
    moved = x.detach() + 0.03 * size * x.grad.sign()
    wanted = relative(states(model, x.detach()), states(model, moved))
    model.zero_grad(set_to_none=True)
    lab = Lab(model, ids)
    got = measured(lab, attack="fgsm", epsilon=0.03)
    assert [got[f"block.{n}"] for n in range(4)] == pytest.approx(wanted, rel=1e-3)
    assert lab.counts.backwards == lab.depth * lab.tokens


class _Relu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class _Homogeneous(nn.Module):
    """Residual ReLU blocks without biases and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(99, 16)
        self.blocks = nn.ModuleList(_Relu() for _ in range(3))
        self.head = nn.Linear(16, 99, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_homogeneous_net_hands_a_scale_on() -> None:
    """x' = (1 + c) x: the relative error is |c| behind every layer."""
    lab = Lab(lively(_Homogeneous()), text(3, 9))
    rows = next(lab.rows())
    clean = _streams(lab, rows, {})
    moved = _streams(lab, rows, {"block.0": clean["before block.0"] * 1.25})
    for n in range(3):
        error = (clean[f"block.{n}"] - moved[f"block.{n}"]).norm() / clean[f"block.{n}"].norm()
        assert float(error) == pytest.approx(0.25, rel=1e-5)


def test_without_a_perturbation_nothing_moves() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    rows = next(lab.rows())
    clean = _streams(lab, rows, {})
    again = _streams(lab, rows, {"block.0": clean["before block.0"]})
    assert all(torch.equal(clean[k], again[k]) for k in clean)


def test_an_identity_block_has_the_error_of_its_predecessor() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    silence(lab.anatomy, "block.2")
    got = measured(lab)
    assert got["block.2"] == got["block.1"]
    assert got.grids["sustainability"].values[2, 1] == 1.0


def test_small_errors_grow_in_proportion() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    one, ten = measured(lab, epsilon=1e-4), measured(lab, epsilon=1e-3)
    for block in one.values:
        assert ten[block] == pytest.approx(10 * one[block], rel=2e-2)


def test_all_tokens_are_in_one_norm_and_padding_in_none() -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 11, 7)]
    squares = np.zeros((3, 2))
    for i, row in enumerate(rows):
        lab = Lab(model, row.unsqueeze(0))
        x = model.get_input_embeddings()(row.unsqueeze(0)).detach()  # type: ignore[operator]
        clean, moved = states(model, x), states(model, noisy(x, next(lab.rows()).owners, 0.01))
        squares[i] = float((clean[1] - moved[1]).square().sum()), float(clean[1].square().sum())
    for side in ("left", "right"):
        got = measured(Lab(model, padded(rows, 3, side=side)))
        wanted = np.sqrt(squares[:, 0].sum() / squares[:, 1].sum())
        assert got["block.1"] == pytest.approx(wanted, rel=1e-3)
        left = [np.delete(squares, i, 0).sum(0) for i in range(3)]
        one_out = np.array([np.sqrt(a / b) for a, b in left])
        spread = np.sqrt(2 / 3 * ((one_out - one_out.mean()) ** 2).sum())
        assert got.stderr["block.1"][0] == pytest.approx(spread, rel=0.3)


def test_the_first_token_can_be_left_out() -> None:
    model, ids = tiny("llama"), text(3, 9)
    lab = Lab(model, ids)
    x = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]
    clean, moved = states(model, x), states(model, noisy(x, next(lab.rows()).owners, 0.01))
    wanted = relative([c[:, 1:] for c in clean], [m[:, 1:] for m in moved])
    got = measured(lab, first=False)
    assert [got[f"block.{n}"] for n in range(4)] == pytest.approx(wanted, rel=1e-3)


def test_an_attack_needs_a_loss_noise_does_not() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    lab = Lab(lively(transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=99))), text(2, 8))
    assert measured(lab)["block.1"] > 0
    with pytest.raises(UnsupportedError, match="attack fgsm: the model predicts no next tokens"):
        measured(lab, attack="fgsm")


def test_passes_of_one_module_are_told_apart() -> None:
    import transformers

    sizes = {"hidden_size": 32, "embedding_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=3, vocab_size=99, max_position_embeddings=64)
    got = measured(Lab(lively(transformers.AlbertForMaskedLM(config)), text(2, 8)))
    assert len({got[f"block.{n}"] for n in range(3)}) == 3


def test_wrong_options_are_refused() -> None:
    wrong = (({"attack": "pgd"}, "attack is one of noise, fgsm"), ({"epsilon": 0.0}, "epsilon is above 0"))
    for options, line in (*wrong, ({"sequences": 0}, "sequences is at least 1")):
        with pytest.raises(InputError, match=line):
            MEASURES.make("sustainability", options)
