"""OWL (arXiv 2310.05175): outliers counted over concatenated scores, and sparsities that follow from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError
from lamina.core.registry import PLANNERS, REWRITES
from lamina.lab import Bench, Lab
from lamina.papers.sparsity.owl import outlier_share
from lamina.rewrites.sparsify import InputPowers
from lamina.testing.bench import expect_same, picture
from lamina.testing.models import padded, text, tiny

MODELS = ("llama", "gpt2", "gpt_neox", "mixtral", "nanogpt")
BLOCKS = tuple(f"block.{n}" for n in range(4))


def planned(lab: Lab, keep: float = 0.4, protect: tuple[str, ...] = (), **options: Any) -> tuple[Step, ...]:
    budget = Budget(metric="parameters", keep=keep, protect=protect)
    return PLANNERS.make("owl", options).plan(None, budget, lab.anatomy, Bench(lab))


def sparsity(lab: Lab, **asked: Any) -> dict[str, float]:
    (step,) = planned(lab, **asked)
    return dict(step.options["sparsity"])


@torch.no_grad()
def shares(model: nn.Module, lab: Lab, batches: list[dict[str, Tensor]], threshold: float) -> dict[str, float]:
    """Of each block all scores in one vector, and how many exceed the threshold times its mean, in percent."""
    seen: dict[str, list[Tensor]] = {}
    for site in lab.anatomy.linears():
        seen[site.path] = []
        model.get_submodule(site.path).register_forward_pre_hook(lambda _, a, p=site.path: seen[p].append(a[0]))
    for batch in batches:
        model(**batch)
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])).bool() for b in batches]
    found = {}
    for block in BLOCKS:
        scores = []
        for site in lab.anatomy.linears(block):
            x = torch.cat([t.reshape(*m.shape, -1)[m].double() for t, m in zip(seen[site.path], masks, strict=True)])
            scores.append((lab.anatomy.weight(site).double().abs() * x.square().mean(0).sqrt()).flatten())
        everything = torch.cat(scores)
        found[block] = 100 * float((everything > threshold * everything.mean()).double().mean())
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threshold", [2.0, 5.0])
def test_sparsities_follow_from_the_outliers_of_blocks(name: str, threshold: float) -> None:
    ids = text(5, 9)
    lab = Lab(tiny(name), ids, batch_size=2)
    d = shares(tiny(name), lab, [{"input_ids": ids}], threshold)
    least, most = min(d.values()), max(d.values())
    r = {b: (d[b] - least) / (most - least) * 0.16 for b in BLOCKS}
    keep = {b: r[b] - sum(r.values()) / 4 + 0.4 for b in BLOCKS}
    got = sparsity(lab, threshold=threshold)
    assert list(got) == [s.id for s in lab.anatomy.linears()]
    for block in BLOCKS:
        for site in lab.anatomy.linears(block):
            assert got[site.id] == pytest.approx(1 - keep[block], abs=1e-9), site.id
    assert lab.passes == 1


def test_padding_is_no_input() -> None:
    batches = padded([text(1, n, seed=n)[0] for n in (9, 4, 7, 12)], 2, side="left")
    lab = Lab(tiny("llama"), batches)
    d = shares(tiny("llama"), lab, batches, 3.0)
    seen = InputPowers([s.id for s in lab.anatomy.linears()])
    lab.stream([seen], score=False)
    for block in BLOCKS:
        maps = [s.id for s in lab.anatomy.linears(block)]
        assert outlier_share(lab.anatomy, maps, seen, 3.0) == pytest.approx(d[block], abs=1e-6)


def test_a_block_with_planted_outliers_keeps_most() -> None:
    """The threshold is that of the block: one map of tiny weights makes outliers of all others."""
    lab = Lab(tiny("llama"), text(5, 9))
    with torch.no_grad():
        for site in lab.anatomy.linears("block.2.mlp"):
            weight = lab.anatomy.weight(site)
            weight[:, ::16] *= 50
    got = sparsity(lab)
    by_block = {b: got[lab.anatomy.linears(b)[0].id] for b in BLOCKS}
    assert min(by_block, key=lambda b: by_block[b]) == "block.2"
    assert max(by_block.values()) - by_block["block.2"] == pytest.approx(0.16, abs=1e-9)


@pytest.mark.parametrize("keep", [0.95, 0.5, 0.03])
def test_the_density_is_the_budget(keep: float) -> None:
    """Also where a block would lose less than nothing, or all; and of what is pruned by it."""
    lab = Lab(tiny("llama"), text(5, 9))
    (step,) = planned(lab, keep=keep)
    sizes = {s.id: lab.anatomy.weight(s).numel() for s in lab.anatomy.linears()}
    zeros = sum(step.options["sparsity"].get(s, 0.0) * n for s, n in sizes.items())
    assert zeros / sum(sizes.values()) == pytest.approx(1 - keep, abs=1e-9)
    assert step.why["density"] == keep
    assert 0 < step.why["least"] <= step.why["most"] < 1
    assert REWRITES.make("wanda").check(step, lab.anatomy) == []
    receipt = REWRITES.make("wanda").apply(step, lab)
    left = sum(int((lab.anatomy.weight(s) != 0).sum()) for s in sizes)
    assert left / sum(sizes.values()) == pytest.approx(keep, abs=1 / 32)
    assert receipt.after == receipt.before


def test_blocks_of_other_size_weigh_by_their_weights() -> None:
    """A block that lost most of its MLP's rank: the mean over weights is the budget's, not that over blocks."""
    lab = Lab(tiny("llama"), text(5, 9))
    maps = tuple(s.id for s in lab.anatomy.linears("block.1.mlp"))
    REWRITES.make("svd").apply(Step(rewrite="svd", sites=maps, options={"rank": 2}), lab)
    got = sparsity(lab, threshold=2.0)
    sizes = {s: lab.anatomy.weight(s).numel() for s in got}
    assert len({sum(n for s, n in sizes.items() if s.startswith(f"{b}.")) for b in BLOCKS}) == 2
    assert sum(got[s] * n for s, n in sizes.items()) / sum(sizes.values()) == pytest.approx(0.6, abs=1e-9)


def test_what_is_protected_stays_dense_and_counts() -> None:
    lab = Lab(tiny("llama"), text(5, 9))
    got = sparsity(lab, keep=0.5, protect=("block.0", "block.2.mlp"))
    sizes = {s.id: lab.anatomy.weight(s).numel() for s in lab.anatomy.linears()}
    assert not [s for s in got if s.startswith(("block.0.", "block.2.mlp."))]
    assert [s for s in got if s.startswith("block.2.attention.")]
    assert sum(got[s] * sizes[s] for s in got) / sum(sizes.values()) == pytest.approx(0.5, abs=1e-9)


def test_twice_the_same_and_nothing_is_left_behind() -> None:
    lab = Lab(tiny("llama"), text(5, 9))
    before = picture(lab.model)
    first = planned(lab, rewrite="sparsegpt")
    expect_same(before, picture(lab.model), "owl")
    assert first == planned(Lab(tiny("llama"), text(5, 9), batch_size=5), rewrite="sparsegpt")
    assert first[0].rewrite == "sparsegpt"
    assert Step.from_data(first[0].to_data()) == first[0]
    assert planned(lab, keep=1.0) == ()


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(metric="bytes", keep=0.5), "zeros free no bytes"),
        (Budget(metric="blocks", drop=1), "zeros free no blocks"),
        (Budget(metric="parameters", limit=1000), "zeros free no parameters"),
        (Budget(metric="parameters", keep=0.3, protect=BLOCKS[:3]), "too small a part"),
        (Budget(metric="parameters", keep=0.3, protect=BLOCKS), "too small a part"),
    ],
)
def test_budgets_that_zeros_can_not_meet(budget: Budget, words: str) -> None:
    lab = Lab(tiny("llama"), text(5, 9))
    with pytest.raises(InputError, match=words):
        PLANNERS.make("owl").plan(None, budget, lab.anatomy, Bench(lab))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rewrite": "drop"}, "the rewrite drop takes no sparsity"),
        ({"rewrite": "wnada"}, "did you mean wanda"),
        ({"threshold": 0.0}, "threshold is above 0"),
        ({"spread": 0.5}, "spread is at least 0 and below 0.5"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    lab = Lab(tiny("llama"), text(5, 9))
    with pytest.raises(InputError, match=words):
        planned(lab, **options)


def test_it_needs_a_text() -> None:
    lab = Lab(tiny("llama"), text(5, 9))
    with pytest.raises(InputError, match="needs a bench"):
        PLANNERS.make("owl").plan(None, Budget(metric="parameters", keep=0.5), lab.anatomy)
