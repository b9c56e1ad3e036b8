"""LLM-Drop (arXiv 2406.15786) against its formula, token by token, and its choices against plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lamina.core.documents import Budget, Step
from lamina.core.registry import MEASURES, REWRITES
from lamina.core.sites import depth_key
from lamina.lab import Bench, Lab
from lamina.testing.models import padded, text, tiny

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gemma2", "granite", "mixtral")
FLOAT32 = 3e-7
"""What a float32 sum of 32 products may be off by, of a cosine."""
MODES = ("block", "attention", "mlp", "joint")


def of_mode(sites: Sequence[str], mode: str) -> list[str]:
    """Block: no part; the paper's joint mode: all attentions, then all MLPs."""
    attentions = [s for s in sites if s.endswith(".attention")]
    mlps = [s for s in sites if s.endswith((".mlp", ".moe"))]
    return {
        "block": [s for s in sites if s.count(".") == 1],
        "attention": attentions,
        "mlp": mlps,
        "joint": attentions + mlps,
    }[mode]


def in_unit(mode: str, count: int) -> Budget:
    return Budget(metric="blocks" if mode == "block" else "sublayers", drop=count)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cosine_is_the_papers_formula(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 10)
    wanted = literal.similarities(model, name, ids)
    got = MEASURES.make("cosine").measure(Lab(model, ids, batch_size=2))
    assert set(got.values) == set(wanted)
    for site, similarity in wanted.items():
        assert got[site] == pytest.approx(1 - similarity, abs=FLOAT32), site


def test_tokens_are_averaged_not_sequences_or_batches(literal: ModuleType) -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 12, 7)]
    alone = [literal.similarities(model, "llama", r.unsqueeze(0)) for r in rows]
    weights = torch.tensor([4.0, 12.0, 7.0], dtype=torch.float64)
    got = MEASURES.make("cosine").measure(Lab(model, padded(rows, 2)))
    for site in alone[0]:
        mean = float((torch.tensor([a[site] for a in alone], dtype=torch.float64) * weights).sum() / weights.sum())
        assert got[site] == pytest.approx(1 - mean, abs=FLOAT32), site


@pytest.mark.parametrize(
    ("name", "part"),
    [(n, p) for n in ARCHITECTURES for p in (0, 1) if (n, p) != ("mixtral", 1)],  # experts: no one map
)
def test_zeroed_projection_has_similarity_exactly_one(name: str, part: int, literal: ModuleType) -> None:
    site = literal.parts(name, "block.2")[part]
    model = literal.zeroed(tiny(name), name, [site])
    got = MEASURES.make("cosine").measure(Lab(model, text(2, 10)))
    assert got[site] == 0.0
    assert all(got[s] > 0.0 for s in got.values if s != site)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("mode", MODES)
def test_one_shot_choice_is_argsort_of_the_concatenated_vectors(
    name: str, mode: str, literal: ModuleType, rows: SimpleNamespace
) -> None:
    model, ids = tiny(name, seed=3), text(2, 10)
    similarity = literal.similarities(model, name, ids)
    units = of_mode(list(similarity), mode)
    vector = torch.tensor([similarity[u] for u in units], dtype=torch.float64)
    wanted = [units[i] for i in vector.argsort(descending=True)][:3]
    steps = rows.plan(f"llm-drop-{mode}", Lab(model, ids), in_unit(mode, 3))
    assert [s for step in steps for s in step.sites] == wanted
    assert [step.why["cosine"] for step in steps] == pytest.approx([1 - similarity[s] for s in wanted], abs=FLOAT32)


def test_joint_mode_does_not_rescale_between_kinds(rows: SimpleNamespace) -> None:
    """MLPs that are small next to all attentions go first, and only they."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1e-3)
    steps = rows.plan("llm-drop-joint", Lab(model, text(2, 10)), in_unit("joint", 4))
    assert {s for step in steps for s in step.sites} == {f"block.{n}.mlp" for n in range(4)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "granite"])
@pytest.mark.parametrize(
    "sites", [("block.0.attention", "block.2.mlp"), ("block.1",), ("block.3.attention", "block.0.mlp", "block.2")]
)
def test_dropping_equals_zeroed_projections(name: str, sites: tuple[str, ...], literal: ModuleType) -> None:
    model, ids = tiny(name), text(2, 10)
    wanted = literal.logits(literal.zeroed(model, name, sites), ids)
    lab = Lab(model, ids)
    REWRITES.make("drop").apply(Step(rewrite="drop", sites=sites), lab)
    torch.testing.assert_close(literal.logits(lab.model, ids), wanted, rtol=1e-5, atol=2e-5)


def iterated(
    model: Any, name: str, ids: torch.Tensor, mode: str, count: int, literal: ModuleType
) -> list[tuple[str, float]]:
    """Ablate, score, take the most similar one; the other half of a block that lost one is run."""
    gone: list[str] = []
    picks = []
    for _ in range(count):
        similarity = literal.similarities(literal.zeroed(model, name, gone), name, ids)
        left = [u for u in of_mode(list(similarity), mode) if u not in gone]
        best = max(sorted(left, key=depth_key), key=lambda u: similarity[u])
        gone.append(best)
        picks.append((best, 1 - similarity[best]))
    return picks


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "mode"), [(n, m) for n in ("llama", "gpt2", "gpt_neox") for m in MODES])
def test_iterative_is_a_loop_of_ablate_rescore_drop(
    name: str, mode: str, seed: int, literal: ModuleType, rows: SimpleNamespace
) -> None:
    model, ids = tiny(name, seed=seed), text(2, 8)
    wanted = iterated(model, name, ids, mode, 3, literal)
    steps = rows.plan(f"llm-drop-{mode}-iterative", Lab(model, ids), in_unit(mode, 3))
    assert [step.sites for step in steps] == [(site,) for site, _ in wanted]
    assert [step.why["cosine"] for step in steps] == pytest.approx([v for _, v in wanted], abs=FLOAT32)


def test_iterative_differs_from_one_shot_somewhere(rows: SimpleNamespace) -> None:
    """Else the tests above could not tell the two apart."""
    budget = in_unit("joint", 4)
    pairs = [
        [
            rows.plan(f"llm-drop-joint{word}", Lab(tiny("llama", seed=s), text(2, 8)), budget)
            for word in ("", "-iterative")
        ]
        for s in range(4)
    ]
    assert any([s.sites for s in a] != [s.sites for s in b] for a, b in pairs)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_scores_under_trial_ablation_are_those_of_the_thinned_network(name: str) -> None:
    """The code saves, reloads and scores the dropped model; a trial must see the same."""
    gone, ids = ("block.1.attention", "block.2.mlp"), text(2, 10)
    measure = MEASURES.make("cosine")
    tried = Bench(Lab(tiny(name), ids), measure).rescore(gone)
    lab = Lab(tiny(name), ids)
    REWRITES.make("drop").apply(Step(rewrite="drop", sites=gone), lab)
    thinned = measure.measure(lab)
    assert set(thinned.values) == set(tried.values) - set(gone)
    for site in thinned.values:
        assert thinned[site] == pytest.approx(tried[site], abs=FLOAT32), site
