"""M-SMoE (arXiv 2310.01334): use, likeness, alignment and merging by loops, and mixtures token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import PLANNERS, REWRITES
from lamina.core.sites import Kind
from lamina.exporters.hf import form, save_checkpoint
from lamina.lab import Bench, Lab
from lamina.papers.experts.mc_smoe import Usage, groups_of, usage
from lamina.rewrites._experts import aligned, layout, merged, tensors
from lamina.testing import zoo
from lamina.testing.models import text, tiny


def step(groups: dict[str, Any]) -> Step:
    return Step(rewrite="merge-experts", sites=tuple(groups), options={"groups": groups})


@torch.no_grad()
def met(model: Any, ids: Tensor, layer: int) -> Tensor:
    """What enters a mixture, [tokens, width]."""
    held: list[Tensor] = []
    handle = model.model.layers[layer].mlp.register_forward_pre_hook(lambda m, args: held.append(args[0]))
    model(ids)
    handle.remove()
    return held[0].flatten(0, 1)


def two_best(moe: Any, token: Tensor) -> list[int]:
    return (moe.gate.weight @ token).argsort(descending=True)[:2].tolist()


def expert(gate_up: Tensor, down: Tensor, token: Tensor) -> Tensor:
    gate, up = (gate_up @ token).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * up)


@torch.no_grad()
def grouped(moe: Any, tokens: Tensor, count: int) -> tuple[list[list[int]], list[float]]:
    """Groups with their heads first, and the share of choices of each expert."""
    use = [0] * 4
    for token in tokens:
        for one in two_best(moe, token):
            use[one] += 1
    logits = (tokens @ moe.gate.weight.T).double()
    heads = sorted(range(4), key=lambda e: (-use[e], e))[:count]
    groups = {h: [h] for h in heads}
    for e in range(4):
        if e not in heads:
            cosines = [float(torch.cosine_similarity(logits[:, e], logits[:, h], dim=0)) for h in heads]
            groups[heads[int(np.argmax(cosines))]].append(e)
    return [groups[h] for h in sorted(heads)], [u / sum(use) for u in use]


def together(moe: Any, group: list[int], use: list[float]) -> tuple[Tensor, Tensor]:
    """The mean of a group's experts by use, neurons in the order of the first."""
    gate_up, down = moe.experts.gate_up_proj.double(), moe.experts.down_proj.double()
    total = sum(use[e] for e in group)
    wide, back = (t[group[0]] * use[group[0]] / total for t in (gate_up, down))
    for e in group[1:]:
        first, other = gate_up[group[0]], gate_up[e]
        cost = first[:64] @ other[:64].T + first[64:] @ other[64:].T + down[group[0]].T @ down[e]
        order = linear_sum_assignment(cost.numpy(), maximize=True)[1]
        both = torch.cat([other[:64][order], other[64:][order]])
        wide, back = wide + both * use[e] / total, back + down[e][:, order] * use[e] / total
    return wide.float(), back.float()


@torch.no_grad()
def test_a_merged_mixture_is_that_of_the_formulas_token_by_token() -> None:
    ids = text(4, 10)
    dense: Any = tiny("mixtral")
    lab = Lab(tiny("mixtral"), ids, batch_size=3)
    counts = {1: 2, 2: 3}
    made = step({f"block.{n}.moe.expert": c for n, c in counts.items()})
    forecast = REWRITES.make("merge-experts").forecast(made, lab.anatomy)
    assert REWRITES.make("merge-experts").apply(made, lab).after == forecast == lab.anatomy.total()
    plans = {n: grouped(dense.model.layers[n].mlp, met(dense, ids, n), c) for n, c in counts.items()}

    def by_hand(moe: Any, n: int, x: Tensor) -> Tensor:
        groups, use = plans[n]
        parts = [together(moe, g, use) for g in groups]
        out = torch.zeros_like(x)
        for t, token in enumerate(x):
            best = two_best(moe, token)
            shares = (moe.gate.weight @ token)[best].softmax(0)
            for chosen, share in zip(best, shares, strict=True):
                home = next(i for i, g in enumerate(groups) if chosen in g)
                out[t] += share * expert(*parts[home], token)
        return out

    for n in counts:
        moe = dense.model.layers[n].mlp
        moe.forward = lambda x, m=moe, n=n: by_hand(m, n, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(lab.model(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_copies_of_one_expert_merge_into_it_however_their_neurons_stand(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = tiny("mixtral")
    draw = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        held = layer.mlp.experts
        for e in (1, 2, 3):
            order = torch.randperm(64, generator=draw)
            held.gate_up_proj[e] = torch.cat([held.gate_up_proj[0][:64][order], held.gate_up_proj[0][64:][order]])
            held.down_proj[e] = held.down_proj[0][:, order]
    ids = text(4, 10)
    want = model(ids).logits
    lab = Lab(model, ids)
    receipt = REWRITES.make("merge-experts").apply(step({f"block.{n}.moe.expert": 2 for n in range(4)}), lab)
    torch.testing.assert_close(lab.model(ids).logits, want, rtol=1e-4, atol=1e-5)
    assert lab.model.model.layers[0].mlp.experts.down_proj.shape[0] == 2
    assert lab.model.model.layers[0].mlp.gate.weight.shape[0] == 4
    assert form(lab.model, [receipt]) == "shim"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    torch.testing.assert_close(again(ids).logits, lab.model(ids).logits)


@pytest.mark.parametrize(
    ("name", "way"), [("mixtral", "halves"), ("gpt_oss", "pairs"), ("qwen3_moe", "halves"), ("deepseek_v2", "halves")]
)
@torch.no_grad()
def test_neurons_are_found_and_merging_with_no_share_is_the_first(name: str, way: str) -> None:
    model = tiny(name) if name == "mixtral" else zoo.build(name).model
    lab = Lab(model, text(2, 8) % 60 + 3)
    made = layout(lab.anatomy, lab.anatomy.of_kind(Kind.EXPERT)[0])
    held = tensors(model, made.path)
    assert {w for _, w in made.places.values()} == {way, "plain"}
    for key, value in held.items():
        if key in made.places:
            assert torch.equal(made.joined(key, made.split(key, value[1]), value[1]), value[1])
    alone, first = merged(made, held, [2, 0, 1], [1.0, 0.0, 0.0]), merged(made, held, [2], [0.3])
    for key, value in held.items():
        torch.testing.assert_close(alone[key], value[2].double())
        torch.testing.assert_close(first[key], value[2].double())
    half = merged(made, held, [3, 3], [0.2, 0.6])
    unused = merged(made, held, [3, 3], [0.0, 0.0])
    for key, value in held.items():
        torch.testing.assert_close(half[key], value[3].double())
        torch.testing.assert_close(unused[key], value[3].double())


@given(st.integers(2, 9), st.integers(0, 50))
def test_alignment_undoes_a_permutation(width: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(width, 12, generator=draw, dtype=torch.float64)
    order = torch.randperm(width, generator=draw)
    assert torch.equal(rows[order][aligned(rows, rows[order])], rows)


@given(st.lists(st.lists(st.integers(0, 30), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(0, 20))
def test_groups_add_up_and_go_to_where_use_is_even(counts: list[list[int]], more: int) -> None:
    held = {f"m{n}": np.array(c, dtype=float) for n, c in enumerate(counts)}
    total = min(2 * len(counts) + more, 4 * len(counts))
    found = groups_of(held, dict.fromkeys(held, 2), total)
    assert sum(found.values()) == total
    assert all(2 <= n <= 4 for n in found.values())
    shares = {n: sorted(c / max(c.max(), 1e-300), reverse=True) for n, c in held.items()}
    kept = [s for n, k in found.items() for s in shares[n][2:k]]
    gone = [s for n, k in found.items() for s in shares[n][k:]]
    assert not kept or not gone or min(kept) >= max(gone)


def test_groups_follow_use_and_likeness() -> None:
    scores = np.array([[4.0, 0.0, 3.9, -1.0], [0.0, 1.0, 0.1, 0.9], [3.9, 0.1, 4.0, 0.0], [-1.0, 0.9, 0.0, 1.0]])
    held = Usage(np.array([5.0, 9.0, 0.0, 2.0]), scores)
    assert held.groups(2) == [[0, 2], [1, 3]]
    assert held.groups(3) == [[0, 2], [1], [3]]
    assert held.frequency.sum() == 1
    assert held.likeness[0, 3] == pytest.approx((-1 / 2 + 1) / 2)


def test_padding_is_no_use() -> None:
    from lamina.testing.bench import lab_on
    from lamina.testing.models import padded

    rows = [text(1, n, seed=n)[0] for n in (9, 4, 7)]
    sites = [f"block.{n}.moe.expert" for n in range(4)]
    alone = usage(lab_on([{"input_ids": r.unsqueeze(0)} for r in rows], "mixtral"), sites)
    both = usage(lab_on(padded(rows, 3, side="left"), "mixtral"), sites)
    for site in sites:
        assert alone[site].counts.sum() == 2 * 20
        np.testing.assert_array_equal(alone[site].counts, both[site].counts)
        np.testing.assert_allclose(alone[site].scores, both[site].scores, rtol=1e-4, atol=1e-4)


def test_the_planner_keeps_as_many_groups_as_the_budget_allows() -> None:
    lab = Lab(tiny("mixtral"), text(4, 10))
    whole, method = lab.anatomy.total().parameters, REWRITES.make("merge-experts")
    for keep in (0.9, 0.7):
        (made,) = PLANNERS.make("mc-smoe").plan(None, Budget(keep=keep), lab.anatomy, Bench(lab))
        left = method.forecast(made, lab.anatomy).parameters
        assert left <= keep * whole < left + 3 * 32 * 64  # one group more is one expert too many
    with pytest.raises(InputError, match="at most"):
        PLANNERS.make("mc-smoe").plan(None, Budget(keep=0.3), lab.anatomy, Bench(lab))
    dense = Lab(tiny("llama"), text(2, 8))
    with pytest.raises(InputError, match="no experts"):
        PLANNERS.make("mc-smoe").plan(None, Budget(keep=0.9), dense.anatomy, Bench(dense))


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"block.0.moe.expert": 4}, "groups are from 2 to 3, not 4"),
        ({"block.0.moe.expert": 1}, "groups are from 2 to 3, not 1"),
        ({"block.0.attention.kv_group": 1}, "merging takes experts"),
        ({"block.9.moe.expert": 2}, "no such experts"),
        ({}, "names no groups"),
    ],
)
def test_what_cannot_be_merged_is_told(groups: dict[str, Any], said: str) -> None:
    with pytest.raises(LaminaError, match=said):
        REWRITES.make("merge-experts").apply(step(groups), Lab(tiny("mixtral"), text(2, 8)))


@pytest.mark.parametrize(("name", "said"), [("llama4_text", "tokens, choices and gates"), ("jetmoe", "not stacked in")])
def test_mixtures_that_do_not_tell_are_refused(name: str, said: str) -> None:
    lab = Lab(zoo.build(name).model, text(2, 8) % 60 + 3)
    site = lab.anatomy.of_kind(Kind.EXPERT)[0]
    with pytest.raises(LaminaError, match=said):
        REWRITES.make("merge-experts").apply(step({site.id: 3}), lab)
