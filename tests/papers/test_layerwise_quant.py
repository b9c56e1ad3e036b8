"""Layer-wise quantization (arXiv 2406.17415): LIM and ZD against their definitions, number by number."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.core.sites import Kind, Site
from lamina.lab import Lab, Taps
from lamina.testing.models import text, tiny

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gemma2", "mixtral")
FLOAT32 = 3e-7


def zd(model: Any, **options: Any) -> dict[str, float]:
    found = MEASURES.make("zd", options).measure(Lab(model, text(1, 4)))
    return {k: float(v[0]) for k, v in found.values.items()}


def matrices(model: Any, literal: ModuleType, name: str, number: int) -> list[torch.Tensor]:
    return [p for p in literal.layers(model, name)[number].parameters() if p.ndim > 1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lim_is_minus_the_mean_cosine(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 10)
    wanted = {s: -v for s, v in literal.similarities(model, name, ids).items() if s.count(".") == 1}
    got = MEASURES.make("lim").measure(Lab(model, ids, batch_size=2))
    assert set(got.values) == set(wanted)
    for site, value in wanted.items():
        assert got[site] == pytest.approx(value, abs=FLOAT32), site


@pytest.mark.parametrize(("added", "wanted"), [("none", -1.0), ("orthogonal", 0.0), ("opposite", 1.0)])
def test_lim_of_identity_orthogonal_and_turned_streams(added: str, wanted: float) -> None:
    x = torch.randn(5, 8)
    turned = torch.stack([-x[:, 1::2], x[:, ::2]], -1).flatten(1)
    f = {"none": torch.zeros_like(x), "orthogonal": turned - x, "opposite": -2 * x}[added]
    model = tiny("llama")
    tally = MEASURES.make("lim").tally(Lab(model, text(1, 4)).anatomy)
    tally.add(Site("block.0", Kind.BLOCK, ""), Taps(x, f, torch.zeros(5, dtype=torch.long), 1))
    assert tally.scores()["block.0"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zd_is_counted_one_weight_at_a_time(name: str, two_sided: bool, literal: ModuleType) -> None:
    model, threshold = tiny(name), 1.3
    got = zd(model, two_sided=two_sided, threshold=threshold)
    assert len(got) == 4
    for number in (0, 2):
        weights = [float(w) for m in matrices(model, literal, name, number) for w in m.flatten().tolist()]
        mean = math.fsum(weights) / len(weights)
        sigma = math.sqrt(math.fsum((w - mean) ** 2 for w in weights) / len(weights))
        z = [(w - mean) / sigma for w in weights]
        count = sum((abs(v) if two_sided else v) > threshold for v in z)
        assert got[f"block.{number}"] == pytest.approx(-count / len(weights), abs=1e-12)


def test_zd_of_gaussian_weights() -> None:
    model = tiny("llama", intermediate_size=512)
    beyond = 0.5 * math.erfc(1 / math.sqrt(2))
    assert all(v == pytest.approx(-beyond, abs=0.006) for v in zd(model).values())
    assert all(v == pytest.approx(-2 * beyond, abs=0.008) for v in zd(model, two_sided=True).values())


def test_zd_does_not_change_when_all_weights_are_scaled_and_shifted(literal: ModuleType) -> None:
    model = tiny("llama")
    before = zd(model)
    with torch.no_grad():
        for matrix in matrices(model, literal, "llama", 1):
            matrix.mul_(2.5).add_(0.5)
    count = sum(m.numel() for m in matrices(model, literal, "llama", 1))
    assert zd(model) == pytest.approx(before, abs=2.5 / count)  # rounding may move a weight or two across


def test_zd_sees_the_sign_unless_it_is_two_sided(literal: ModuleType) -> None:
    model = tiny("llama")
    with torch.no_grad():
        for matrix in matrices(model, literal, "llama", 1):
            matrix.copy_((10 * matrix).exp())
    skewed, both = zd(model), zd(model, two_sided=True)
    with torch.no_grad():
        for matrix in matrices(model, literal, "llama", 1):
            matrix.neg_()
    assert zd(model)["block.1"] == 0.0 > skewed["block.1"] + 0.01
    assert zd(model, two_sided=True) == pytest.approx(both, abs=1e-9)


def test_zd_ranks_a_block_with_fewer_large_weights_higher(literal: ModuleType) -> None:
    model = tiny("llama")
    with torch.no_grad():
        for matrix in matrices(model, literal, "llama", 2):
            matrix.copy_(torch.where(torch.rand_like(matrix) < 0.02, 5.0, 0.01 * matrix))
    scores = zd(model)
    assert max(scores, key=lambda s: scores[s]) == "block.2"


def test_norms_and_biases_are_no_part_of_it() -> None:
    model = tiny("gpt2")
    before = zd(model)
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            if p.ndim == 1:
                p.add_(100.0)
    assert zd(model) == before


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_must_be_positive(threshold: float) -> None:
    with pytest.raises(InputError, match="threshold must be above 0"):
        MEASURES.make("zd", {"threshold": threshold})
