"""D-Rank (arXiv 2509.25622): ranks by effective rank, against the formula in loops; what queries give to values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.anatomy.makers import makers
from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError
from lamina.core.registry import MEASURES, PLANNERS, REWRITES
from lamina.lab import Bench, Lab
from lamina.papers.rank.d_rank import Group, rebalanced, shared_out
from lamina.testing.bench import expect_same, picture
from lamina.testing.models import text, tiny


def planned(lab: Lab, budget: Budget, **options: Any) -> tuple[Step, ...]:
    return PLANNERS.make("d-rank", options).plan(None, budget, lab.anatomy, Bench(lab))


def keeping(share: float, **more: Any) -> Budget:
    return Budget(metric="parameters", keep=share, **more)


@torch.no_grad()
def caught(model: nn.Module, path: str, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten(0, -2)))
    model(ids)
    handle.remove()
    return torch.cat(seen).double()


def spread(weights: list[Tensor], inputs: list[Tensor]) -> float:
    """exp of the entropy of the squared singular values of S [W_1ᵀ W_2ᵀ …], S a Cholesky factor."""
    gram = torch.zeros(inputs[0].shape[1], inputs[0].shape[1], dtype=torch.float64)
    for x in inputs:
        gram += x.T @ x
    sigma = torch.linalg.svdvals(torch.linalg.cholesky(gram).T @ torch.cat([w.T for w in weights], 1))
    energy = [float(s) ** 2 for s in sigma]
    shares = [e / sum(energy) for e in energy]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def exact(model: Any, ids: Tensor, lab: Lab, size: int, need: int) -> dict[str, tuple[float, int]]:
    """Site → k by the formula, before rounding, and ω; nothing is capped."""
    names = {s.id.split(".", 2)[2] for s in lab.anatomy.linears()}
    theta = need / sum(lab.anatomy.weight(s).numel() for s in lab.anatomy.linears())
    found = {}
    for name in names:
        last = name in ("attention.o_proj", "attention.dense", "mlp.down_proj", "mlp.fc2")
        n = 1 if last else size
        runs = [[f"block.{b}.{name}" for b in range(start, start + n)] for start in range(0, 4, n)]
        r, omega, weights = [], [], 0
        for run in runs:
            maps = [lab.anatomy.weight(s).detach().double() for s in run]
            r.append(spread(maps, [caught(model, lab.anatomy.site(s).path, ids) for s in run]))
            omega.append(maps[0].shape[1] + n * maps[0].shape[0])
            weights += sum(m.numel() for m in maps)
        bottom = sum(math.sqrt(x * w) for x, w in zip(r, omega, strict=True))
        for run, x, w in zip(runs, r, omega, strict=True):
            k = (1 - theta) * weights * math.sqrt(x / w) / bottom
            found |= dict.fromkeys(run, (k, w))
    return found


@pytest.mark.parametrize(("name", "size", "rewrite"), [("llama", 1, "svd-llm"), ("phi", 2, "basis-sharing")])
def test_ranks_are_those_of_the_formula(name: str, size: int, rewrite: str) -> None:
    """Maps of their own where queries share keys; else groups of two, but for the last map of a sublayer."""
    ids = text(8, 40)
    model = tiny(name)
    lab = Lab(model, ids, batch_size=3)
    need = math.ceil(lab.anatomy.total().parameters * 0.5)
    want = exact(model, ids, lab, size, need)
    (step,) = planned(lab, keeping(0.5), beta=0.0)
    assert step.rewrite == rewrite
    assert step.options.get("size", 1) == size
    assert step.sites == tuple(s.id for s in lab.anatomy.linears())
    for site, (k, _) in want.items():
        assert -1e-6 <= step.options["rank"][site] - math.floor(k + 1e-6) <= 1, site
    for kind in {s.split(".", 2)[2] for s in want}:
        held = [s for s in want if s.endswith(kind)]
        apart = 1 if kind.split(".")[1] in ("o_proj", "dense", "down_proj", "fc2") else size
        spent = sum(step.options["rank"][s] * want[s][1] for s in held) / apart
        budget = sum(want[s][0] * want[s][1] for s in held) / apart
        assert spent <= budget + 1e-6
        assert budget - spent < min(want[s][1] for s in held)
    assert lab.passes == 1


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2", "mixtral", "gemma2", "nanogpt"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7])
def test_the_budget_is_met_and_by_less_than_a_rank_of_each_kind(name: str, beta: float) -> None:
    lab = Lab(tiny(name), text(6, 30))
    whole, maps = lab.anatomy.total(), [lab.anatomy.weight(s) for s in lab.anatomy.linears()]
    share = 1 - 0.6 * sum(m.numel() for m in maps) / whole.parameters
    (step,) = planned(lab, keeping(share), beta=beta)
    method = REWRITES.make(step.rewrite, {k: v for k, v in step.options.items() if k != "rank"})
    assert method.check(step, lab.anatomy) == []
    receipt = method.apply(step, lab)
    slack = 7 * max(m.shape[1] + 2 * m.shape[0] for m in maps)
    assert whole.parameters * share - slack < receipt.after.parameters <= whole.parameters * share
    for key in ("parameters", "bytes", "macs"):
        assert step.why[key] == getattr(receipt.before, key) - getattr(receipt.after, key)


@pytest.mark.parametrize("metric", ["parameters", "bytes"])
def test_bytes_are_as_good_as_parameters(metric: Any) -> None:
    lab = Lab(tiny("llama").bfloat16(), text(6, 30))
    limit = getattr(lab.anatomy.total(), metric) * 0.6
    (step,) = planned(lab, Budget(metric=metric, limit=int(limit)))
    assert REWRITES.make(step.rewrite).apply(step, lab).after.__getattribute__(metric) <= limit
    (other,) = planned(Lab(tiny("llama").bfloat16(), text(6, 30)), Budget(metric=metric, keep=0.6))
    assert other.options == step.options


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.1, 500.0), min_size=1, max_size=6), st.integers(1, 40), st.floats(0.02, 0.9))
def test_no_ranks_of_the_same_cost_are_better(spreads: list[float], unit: int, share: float) -> None:
    """Where a rank costs the same: never worse than equal ranks; rank by rank is better by rounding alone."""
    groups = [Group(sites=(), spread=r, unit=unit, whole=unit * 60) for r in spreads]
    budget = share * sum(g.whole for g in groups)
    assume(budget >= unit * len(groups))
    got = shared_out(groups, budget)
    assert sum(g.unit * k if k else g.whole for k, g in zip(got, groups, strict=True)) <= budget + 1e-6
    assume(all(got) and max(got) < 59)
    loss = sum(g.spread / k for k, g in zip(got, groups, strict=True))
    equal = int(budget // (unit * len(groups)))
    assert loss <= sum(g.spread / equal for g in groups) * (1 + 1e-9)
    best = [1] * len(groups)
    while unit * (sum(best) + 1) <= budget + 1e-6:
        best[max(range(len(best)), key=lambda i: spreads[i] / (best[i] * (best[i] + 1)))] += 1
    least = sum(r / k for r, k in zip(spreads, best, strict=True))
    assert least * (1 - 1e-9) <= loss <= 1.1 * least


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1.0, 900.0), st.integers(1, 9)), min_size=2, max_size=6),
    st.floats(0.3, 0.8),
)
def test_loss_per_cost_is_the_same_everywhere(found: list[tuple[float, int]], share: float) -> None:
    """R / (k² ω) of groups that are neither at one nor whole, up to what rounding all of them leaves to one."""
    groups = [Group(sites=(), spread=r, unit=unit, whole=unit * 1000) for r, unit in found]
    budget, units = share * sum(g.whole for g in groups), sum(g.unit for g in groups)
    got = shared_out(groups, budget)
    inner = [(k, g) for k, g in zip(got, groups, strict=True) if 20 < k < 999]
    slopes = [
        [g.spread / ((k + d) ** 2 * g.unit) for d in (1, -units / g.unit)] for k, g in inner if k * g.unit > units
    ]
    for low, _ in slopes:
        assert all(low <= high for _, high in slopes)
    if slopes:
        slope = max(s[0] for s in slopes)
        whole = [g for k, g in zip(got, groups, strict=True) if k == 0]
        assert all(g.spread / (g.whole / g.unit) ** 2 / g.unit >= slope for g in whole)


def test_equal_spreads_give_equal_ranks_and_flat_ones_most() -> None:
    same = [Group(sites=(), spread=7.0, unit=48, whole=1024) for _ in range(4)]
    assert shared_out(same, 4 * 48 * 9) == [9, 9, 9, 9]
    mixed = [Group(sites=(), spread=r, unit=48, whole=10_000) for r in (1.0, 4.0, 16.0)]
    assert shared_out(mixed, 48 * 70) == [10, 20, 40]
    assert shared_out([Group(sites=(), spread=0.0, unit=48, whole=1024), *same[:1]], 48 * 11) == [1, 10]


def test_a_group_that_would_take_as_much_as_its_maps_stays_whole() -> None:
    groups = [Group(sites=(), spread=r, unit=48, whole=480) for r in (1.0, 1.0, 10_000.0)]
    assert shared_out(groups, 480 + 2 * 48 * 3) == [3, 3, 0]


def three(unit: tuple[int, int, int], whole: int, layers: int = 2, count: int = 1) -> list[list[Group]]:
    return [[Group(sites=(), spread=1.0, unit=u, whole=whole, count=count) for _ in range(layers)] for u in unit]


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=2),
    st.lists(st.integers(1, 60), min_size=2, max_size=2),
    st.lists(st.integers(1, 60), min_size=2, max_size=2),
    st.floats(0.0, 0.9),
)
def test_ranks_that_move_are_kept_in_number(q: list[int], k: list[int], v: list[int], beta: float) -> None:
    got = rebalanced(three((64, 64, 64), 64 * 1000), (q, k, v), beta)
    assert sum(map(sum, got)) == sum(q) + sum(k) + sum(v)
    for mine, before in zip((*got[0], *got[1]), (*q, *k), strict=True):
        assert before - round(beta * before) <= mine <= before
    more = [a - b for a, b in zip(got[2], v, strict=True)]
    assert abs(more[0] - more[1]) <= 1
    assert sum(more) == sum(round(beta * x) if x > 1 else 0 for x in (*q, *k))


def test_ranks_of_other_cost_move_by_what_they_take() -> None:
    groups = three((64, 48, 48), 64 * 1000)
    q, k, v = rebalanced(groups, ([20, 20], [10, 10], [10, 10]), 0.3)
    assert (q, k) == ([14, 14], [7, 7])
    assert v == [21, 21]
    assert 64 * 6 + 48 * 3 == 48 * 11


def test_larger_groups_of_values_get_more() -> None:
    groups = three((64, 64, 64), 64_000)
    groups[2] = [Group(sites=(), spread=1.0, unit=64, whole=64_000, count=n) for n in (3, 1)]
    assert rebalanced(groups, ([10, 10], [10, 10], [5, 5]), 0.2)[2] == [11, 7]


def test_values_that_are_full_stay_whole_and_the_rest_goes_back() -> None:
    groups = three((64, 64, 64), 64 * 12)
    q, k, v = rebalanced(groups, ([11, 11], [11, 11], [10, 10]), 0.5)
    assert v == [0, 0]
    given = 4 * round(5.5)
    assert sum(q) + sum(k) == 44 - given + (given - 2 * 2)
    assert rebalanced(groups, ([11, 0], [1, 11], [0, 0]), 0.5) == ([11, 0], [1, 11], [0, 0])


def test_in_a_plan_values_gain_what_queries_and_keys_lose() -> None:
    lab = Lab(tiny("phi"), text(6, 30))
    ranks = [planned(lab, keeping(0.55), beta=b)[0].options["rank"] for b in (0.0, 0.3)]
    sums = [{p: sum(r[f"block.{n}.attention.{p}_proj"] for n in range(4)) for p in "qkv"} for r in ranks]
    assert sum(sums[0].values()) == sum(sums[1].values())
    assert sums[1]["v"] > sums[0]["v"]
    assert sums[1]["q"] < sums[0]["q"]
    rest = [s for s in ranks[0] if not s.endswith(("q_proj", "k_proj", "v_proj"))]
    assert all(ranks[0][s] == ranks[1][s] for s in rest)


@pytest.mark.parametrize(
    ("name", "names", "group"),
    [
        ("llama", ("q_proj", "k_proj", "v_proj"), 2),
        ("phi", ("q_proj", "k_proj", "v_proj"), 1),
        ("qwen3", ("q_proj", "k_proj", "v_proj"), 2),
        ("gpt2", ("c_attn", "c_attn", "c_attn"), 1),
        ("falcon", ("query_key_value",) * 3, 4),
    ],
)
def test_the_maps_that_make_queries_keys_and_values(name: str, names: tuple[str, ...], group: int) -> None:
    anatomy = Anatomy.of(tiny(name))
    got = makers(anatomy, "block.2.attention")
    assert got is not None
    assert (got.query, got.key, got.value) == tuple(f"block.2.attention.{n}" for n in names)
    assert got.group == group
    assert got.apart == (len(set(names)) == 3)
    assert makers(anatomy, "block.2.mlp") is None


def test_the_spread_is_that_of_the_measure() -> None:
    """One map to a group, all tokens: ranks go with the root of the measure's scores."""
    lab = Lab(tiny("llama"), text(6, 30))
    scores = MEASURES.make("effective-rank", {"every": 1}).measure(lab)
    names = [f"block.{n}.mlp.up_proj" for n in range(4)]
    (step,) = planned(lab, keeping(0.5), beta=0.0)
    roots = [math.sqrt(scores[n]) for n in names]
    got = [step.options["rank"][n] for n in names]
    for rank, root in zip(got, roots, strict=True):
        assert rank == pytest.approx(root / sum(roots) * sum(got), abs=1.01)


def test_planted_truth() -> None:
    """A block whose maps are of rank one gets less than the others."""
    model: Any = tiny("llama")
    with torch.no_grad():
        weight = model.model.layers[1].mlp.gate_proj.weight
        weight.copy_(weight[:, :1] @ weight[:1])
    (step,) = planned(Lab(model, text(6, 30)), keeping(0.5))
    ranks = [step.options["rank"][f"block.{n}.mlp.gate_proj"] for n in range(4)]
    assert ranks[1] < min(ranks[0], *ranks[2:]) / 2


def test_what_is_protected_stays_and_the_others_carry_the_budget() -> None:
    lab = Lab(tiny("phi"), text(6, 30))
    (step,) = planned(lab, keeping(0.75, protect=("block.0", "block.2.mlp")))
    assert not [s for s in step.sites if s.startswith(("block.0.", "block.2.mlp."))]
    receipt = REWRITES.make("basis-sharing").apply(step, lab)
    assert receipt.after.parameters <= 0.75 * receipt.before.parameters
    model: Any = lab.model
    one, two, three_ = (model.model.layers[n].self_attn.q_proj.down.weight.data_ptr() for n in (1, 2, 3))
    assert one == two != three_


def test_twice_the_same_and_nothing_is_left_behind() -> None:
    lab = Lab(tiny("phi"), text(6, 30))
    before = picture(lab.model)
    first = planned(lab, keeping(0.6))
    expect_same(before, picture(lab.model), "d-rank")
    assert first == planned(Lab(tiny("phi"), text(6, 30)), keeping(0.6))
    assert Step.from_data(first[0].to_data()) == first[0]
    assert planned(lab, keeping(1.0)) == ()


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(metric="blocks", drop=1), "budgets of parameters, or of bytes"),
        (Budget(metric="sublayers", keep=0.5), "budgets of parameters, or of bytes"),
        (Budget(metric="parameters", limit=1000), "at most"),
        (keeping(0.15), "at most"),
        (keeping(0.6, protect=tuple(f"block.{n}" for n in range(3))), "at most"),
    ],
)
def test_budgets_that_ranks_can_not_meet(budget: Budget, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught_:
        planned(Lab(tiny("llama"), text(6, 30)), budget)
    assert caught_.value.hint


def test_a_kind_of_maps_that_can_not_give_its_share_gives_what_it_can() -> None:
    """Rank one takes 9 % of a map [16, 32] and 4.7 % of one [64, 32]: below that the larger ones go on alone."""
    lab = Lab(tiny("llama"), text(6, 30))
    maps = sum(lab.anatomy.weight(s).numel() for s in lab.anatomy.linears())
    left = lab.anatomy.total().parameters - maps
    (step,) = planned(lab, Budget(metric="parameters", limit=left + int(0.08 * maps)))
    ranks = step.options["rank"]
    assert {ranks[f"block.{n}.attention.k_proj"] for n in range(4)} == {1}
    assert max(ranks.values()) > 1
    assert REWRITES.make("svd-llm").apply(step, lab).after.parameters <= left + 0.08 * maps


@pytest.mark.parametrize(
    ("options", "words"), [({"size": -1}, "size is"), ({"beta": 1.0}, "beta is"), ({"beta": -0.1}, "beta is")]
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        PLANNERS.make("d-rank", options)


def test_it_needs_a_text() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    with pytest.raises(InputError, match="needs a bench"):
        PLANNERS.make("d-rank").plan(None, keeping(0.5), lab.anatomy)
