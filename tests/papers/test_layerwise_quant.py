"""Layer-wise quantization (arXiv 2406.17415): LIM and ZD against their definitions, number by number."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError
from lamina.core.registry import MEASURES, PLANNERS, REWRITES, row
from lamina.core.scores import Scores
from lamina.core.sites import Kind, Site
from lamina.lab import Lab, Taps
from lamina.testing.bench import expect_same, picture
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


BLOCKS = tuple(f"block.{n}" for n in range(4))
BITS = {"Q8_0": 8.5, "Q5_0": 5.5, "Q4_0": 4.5, "Q4_1": 5.0, "Q4_K": 4.5}


def scored(*values: float) -> Scores:
    return Scores(measure="lim", values={b: np.array([v]) for b, v in zip(BLOCKS, values, strict=True)})


def planned(lab: Lab, scores: Scores | None, budget: Budget, **options: Any) -> tuple[Step, ...]:
    return PLANNERS.make("layerwise-bits", options).plan(scores, budget, lab.anatomy)


def levels(steps: tuple[Step, ...]) -> dict[str, str]:
    return {s: step.options["type"] for step in steps for s in step.sites}


def taken(lab: Lab, kinds: dict[str, str]) -> int:
    """Bytes of the model with maps in these types."""
    total = sum(p.numel() * 4 for p in {id(p): p for p in lab.model.parameters()}.values())
    for site, kind in kinds.items():
        count = lab.anatomy.weight(site).numel()
        total -= count * 4 - round(count * BITS[kind] / 8)
    return total


@pytest.mark.parametrize("low", range(5))
def test_the_least_important_blocks_get_the_low_bits(low: int) -> None:
    lab, values = Lab(tiny("llama"), text(1, 4)), (-0.9, -0.2, -0.7, -0.4)
    ranked = [BLOCKS[n] for n in (0, 2, 3, 1)]
    wanted = {
        s.id: "Q4_0" if any(s.id.startswith(f"{b}.") for b in ranked[:low]) else "Q8_0" for s in lab.anatomy.linears()
    }
    budget = Budget(metric="bytes", limit=taken(lab, wanted))
    steps = planned(lab, scored(*values), budget)
    assert levels(steps) == wanted
    assert [s.options["type"] for s in steps] == [k for k in ("Q8_0", "Q4_0") if k in wanted.values()]
    assert all(s.rewrite == "round" for s in steps)
    if low < 4:
        assert levels(planned(lab, scored(*values), Budget(metric="bytes", limit=taken(lab, wanted) - 1))) != wanted
    before = lab.anatomy.total().bytes
    assert before - sum(int(s.why["bytes"]) for s in steps) == taken(lab, wanted)
    last = [REWRITES.make("round").apply(s, lab).after.bytes - before for s in steps]
    assert before + sum(last) == taken(lab, wanted)


def test_equal_scores_go_in_depth_order_and_the_protected_stay() -> None:
    lab = Lab(tiny("llama"), text(1, 4))
    half = {s.id: "Q4_0" if s.block == 1 else "Q8_0" for s in lab.anatomy.linears() if s.block}
    budget = Budget(metric="bytes", limit=taken(lab, half), protect=("block.0",))
    before = picture(lab.model)
    assert levels(planned(lab, scored(0, 0, 0, 0), budget)) == half
    expect_same(before, picture(lab.model), "the planner")


def test_maps_take_what_fits_them() -> None:
    lab = Lab(tiny("llama", intermediate_size=256), text(1, 4))
    all_high = taken(lab, {s.id: "Q5_0" for s in lab.anatomy.linears()})
    steps = planned(lab, scored(1, 2, 3, 4), Budget(metric="bytes", limit=all_high - 1), high="Q5_0", low="Q4_K")
    found = levels(steps)
    assert "Q4_K" in found.values()
    assert {s for s, k in found.items() if k == "Q4_K"} == {"block.0.mlp.down_proj"}
    assert len(found) == len(lab.anatomy.linears())
    odd = Lab(tiny("llama", intermediate_size=40), text(1, 4))
    kept = {s.id for s in odd.anatomy.linears()} - set(
        levels(planned(odd, scored(1, 2, 3, 4), Budget(metric="bytes", keep=0.9)))
    )
    assert kept == {f"{b}.mlp.down_proj" for b in BLOCKS}


@pytest.mark.parametrize("measure", ["lim", "zd"])
@pytest.mark.parametrize("rewrite", ["round", "gptq"])
def test_the_recipe_gives_two_levels(measure: str, rewrite: str) -> None:
    lab, entry = Lab(tiny("llama"), text(4, 12)), row(f"layerwise-bits-{measure}")
    scores = MEASURES.make(entry.measure).measure(lab)
    ends = [taken(lab, {s.id: kind for s in lab.anatomy.linears()}) for kind in ("Q8_0", "Q4_0")]
    budget = Budget(metric="bytes", limit=sum(ends) // 2)
    steps = PLANNERS.make(entry.planner, {"rewrite": rewrite}).plan(scores, budget, lab.anatomy)
    assert [s.options["type"] for s in steps] == ["Q8_0", "Q4_0"]
    low = {s.rsplit(".", 2)[0] for s in steps[1].sites}
    high = {s.rsplit(".", 2)[0] for s in steps[0].sites}
    assert not low & high
    assert max(float(scores[b]) for b in low) <= min(float(scores[b]) for b in high)
    for step in steps:
        REWRITES.make(rewrite).apply(step, lab)


@pytest.mark.parametrize(
    ("options", "budget", "scores", "words"),
    [
        ({}, Budget(metric="bytes", keep=0.1), scored(1, 2, 3, 4), "at most"),
        ({}, Budget(metric="parameters", keep=0.5), scored(1, 2, 3, 4), "fewer bits free no parameters"),
        ({}, Budget(metric="blocks", drop=1), scored(1, 2, 3, 4), "fewer bits free no blocks"),
        ({}, Budget(metric="bytes", keep=0.5), None, "no scores of all blocks"),
        ({"high": "Q9"}, Budget(metric="bytes", keep=0.5), None, "no type is named 'Q9'"),
        ({"high": "Q4_0", "low": "Q8_0"}, Budget(metric="bytes", keep=0.5), None, "more bits than low"),
    ],
)
def test_bad_plans(options: dict[str, Any], budget: Budget, scores: Scores | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        planned(Lab(tiny("llama"), text(1, 4)), scores, budget, **options)
