"""ECoFLaP's ratios (arXiv 2310.02998): the allocation's own laws, and the widths that follow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.core.documents import Budget
from lamina.core.errors import InputError
from lamina.core.registry import MEASURES, PLANNERS
from lamina.core.scores import Scores
from lamina.lab import Bench, Lab
from lamina.papers.sensitivity.ecoflap import allocate
from lamina.testing.models import text, tiny

GROUPS = st.lists(st.tuples(st.floats(0, 10), st.integers(5, 4000)), min_size=1, max_size=8)


@given(GROUPS, st.floats(0.05, 1), st.floats(0, 0.3))
def test_all_is_given_out_and_no_group_gets_less_or_more_than_it_may(
    groups: list[tuple[float, int]], share: float, spread: float
) -> None:
    scores, sizes = [s for s, _ in groups], [n for _, n in groups]
    least = max(share - spread, 0.0)
    keep = max(int(share * sum(sizes)), sum(math.ceil(n * least) for n in sizes))
    kept = allocate(scores, sizes, min(keep, sum(sizes)), least)
    assert sum(kept) == min(keep, sum(sizes))
    assert all(math.ceil(n * least) <= k <= n for k, n in zip(kept, sizes, strict=True))


def test_equal_groups_keep_equal_shares_and_scores_set_the_rest_apart() -> None:
    assert allocate([2.0] * 4, [100] * 4, 240, 0.3) == [60] * 4
    # 30 of each first; 80 are left, 20, 20 and 40 of them by score
    assert allocate([1.0, 1.0, 2.0], [100] * 3, 170, 0.3) == [50, 50, 70]
    # 110 are left: 2, 4 and 70 of 106, as the third is full; of 34 then 9 and 26, one too many, which the third gives
    assert allocate([1.0, 3.0, 96.0], [100] * 3, 200, 0.3) == [41, 60, 99]
    assert allocate([0.0, 0.0], [10, 30], 20, 0.0) == [10, 10]


@torch.no_grad()
def literal_energies(model: Any, ids: Any) -> dict[str, list[float]]:
    """‖W_:,j‖² mean x_j² of each neuron, and summed over each KV group's columns, token by token."""
    found: dict[str, list[float]] = {}
    for n, layer in enumerate(model.model.layers):
        for site, module, size in (
            (f"block.{n}.mlp.neuron", layer.mlp.down_proj, 1),
            (f"block.{n}.attention.kv_group", layer.self_attn.o_proj, 16),
        ):
            met: list[Any] = []
            handle = module.register_forward_pre_hook(lambda m, args, met=met: met.append(args[0][0]))
            for row in ids:
                model(row.unsqueeze(0))
            handle.remove()
            tokens = torch.cat(met).double()
            each = [float((module.weight[:, j].double() ** 2).sum() * (tokens[:, j] ** 2).sum() / len(tokens))
                    for j in range(tokens.shape[1])]  # fmt: skip
            found[site] = [sum(each[i : i + size]) for i in range(0, len(each), size)]
    return found


@pytest.mark.parametrize("planner", ["ecoflap", "struct-prune"])
def test_units_of_least_energy_go(planner: str) -> None:
    ids = text(3, 9)
    lab = Lab(tiny("llama"), ids)
    want = literal_energies(tiny("llama"), ids)
    steps = PLANNERS.make(planner, {"multiple": 4}).plan(
        Scores(measure="none", values={}), Budget(keep=0.8), lab.anatomy, Bench(lab)
    )
    cut = {s: g for step in steps for s, g in step.options["gone"].items()}
    assert any("neuron" in s for s in cut)
    for site, gone in cut.items():
        stay = [e for n, e in enumerate(want[site]) if n not in gone]
        assert max(want[site][n] for n in gone) <= min(stay) * (1 + 1e-6)


def test_blocks_that_the_loss_hangs_on_stay_wider() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    maps = {s.id: s.block for s in lab.anatomy.linears()}
    scores = Scores(measure="zeroth-order", values={s: np.array([1.0 + 3.0 * (b == 2)]) for s, b in maps.items()})
    options = {"multiple": 1, "spread": 0.3, "kinds": ("neuron",)}
    steps = PLANNERS.make("ecoflap", options).plan(scores, Budget(keep=0.8), lab.anatomy, Bench(lab))
    left = {s: 64 - len(g) for s, g in steps[0].options["gone"].items()}
    others = {left[f"block.{n}.mlp.neuron"] for n in (0, 1, 3)}
    assert len(others) == 1
    assert left.get("block.2.mlp.neuron", 64) > others.pop()
    even = PLANNERS.make("ecoflap", {**options, "spread": 0.0})
    left = {
        s: 64 - len(g)
        for s, g in even.plan(scores, Budget(keep=0.8), lab.anatomy, Bench(lab))[0].options["gone"].items()
    }
    assert len(set(left.values())) == 1


def test_scores_are_taken_where_none_are_given() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    own = MEASURES.make("zeroth-order").measure(lab)
    method = PLANNERS.make("ecoflap", {"multiple": 2})
    given_ = method.plan(own, Budget(keep=0.8), lab.anatomy, Bench(lab))
    assert given_ == method.plan(Scores(measure="none", values={}), Budget(keep=0.8), lab.anatomy, Bench(lab))


@pytest.mark.parametrize("options", [{"spread": 1.0}, {"spread": -0.1}, {"multiple": 0}, {"kinds": ("channel",)}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        PLANNERS.make("ecoflap", options)
