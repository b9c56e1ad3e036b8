"""Trial ablation: the branch adds zero and is not computed, and all of it undoes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lamina.anatomy.trial import forward_of, inputs_recorded, shorted, silenced
from lamina.testing.bench import expect_same, fresh, lab, picture, text
from lamina.testing.models import NAMES
from lamina.testing.planted import added, silence
from lamina.testing.rewrites import logits


@pytest.mark.parametrize("name", NAMES)
def test_ablated_equals_silent_by_weights(name: str) -> None:
    """Two ways to silence a branch that share no code: not running it, and zero weights."""
    for place in range(2):
        bench = lab(name)
        site = bench.anatomy.parts("block.2")[place].id
        with bench.ablate([site]):
            tried = logits(bench.model, text())
        silence(bench.anatomy, site)
        torch.testing.assert_close(tried, logits(bench.model, text()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_ablated_branches_are_not_computed(name: str) -> None:
    bench = lab(name)
    site = bench.anatomy.parts("block.1")[1].id
    branch, block = bench.anatomy.branch(site), bench.model.get_submodule(bench.anatomy.block(site).path)
    inside = [m for p in (branch.core, *branch.own) for m in block.get_submodule(p).modules() if m.__class__.__module__]
    ran: list[str] = []
    held = [
        m.register_forward_hook(lambda m, *_: ran.append(type(m).__name__)) for m in inside if not list(m.children())
    ]
    logits(bench.model, text())
    assert ran
    ran.clear()
    with bench.ablate([site]):
        logits(bench.model, text())
        sizes = added(bench.anatomy)
    for handle in held:
        handle.remove()
    leaves = {type(block.get_submodule(p)).__name__ for p in (branch.core, *branch.own)}
    assert set(ran) <= leaves
    assert sizes[site] == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fails", [False, True])
def test_all_is_undone(name: str, fails: bool) -> None:
    bench = lab(name)
    before, want = picture(bench.model), logits(bench.model, text())
    try:
        with bench.ablate(["block.0.attention", "block.2"]):
            assert not torch.equal(logits(bench.model, text()), want)
            if fails:
                raise ValueError("stop")
    except ValueError:
        assert fails
    expect_same(before, picture(bench.model), "the trial")
    assert torch.equal(logits(bench.model, text()), want)


def test_an_error_inside_a_branch_undoes_all() -> None:
    bench = lab("llama")
    before = picture(bench.model)
    with pytest.raises(RuntimeError), bench.ablate(["block.0.attention"]):
        bench.model(torch.zeros(1, 3, 3, dtype=torch.long))
    expect_same(before, picture(bench.model), "the trial")


def test_trials_nest_and_repeat() -> None:
    bench = lab("gemma2")
    before, ids = picture(bench.model), text()
    with bench.ablate(["block.0.attention", "block.2.mlp"]):
        both = logits(bench.model, ids)
    with bench.ablate(["block.2.mlp"]), bench.ablate(["block.0.attention"]):
        assert torch.equal(logits(bench.model, ids), both)
    with bench.ablate(["block.2.mlp"]), bench.ablate(["block.2.mlp"]):
        once = logits(bench.model, ids)
    with bench.ablate(["block.2.mlp"]):
        assert torch.equal(logits(bench.model, ids), once)
    expect_same(before, picture(bench.model), "nested trials")


def test_a_forward_set_by_others_comes_back() -> None:
    bench = lab("llama")
    module: Any = bench.model.get_submodule(bench.anatomy.site("block.1.mlp").path)
    mine = module.forward
    module.forward = mine
    with silenced(bench.model, bench.anatomy, "block.1.mlp"):
        assert module.forward is not mine
    assert module.__dict__["forward"] is mine
    with forward_of(module, lambda x: x):
        pass
    assert module.__dict__["forward"] is mine


@pytest.mark.parametrize("name", NAMES)
def test_recorded_streams_in_the_place_of_blocks(name: str) -> None:
    model, anatomy, ids = fresh(name)
    before, want = picture(model), logits(model, ids)
    (stack,) = anatomy.stacks
    with inputs_recorded(model, stack) as calls:
        logits(model, ids)
    assert len(calls) == 4
    last: list[torch.Tensor] = []
    block = model.get_submodule(stack.blocks[-1].path)
    handle = block.register_forward_hook(lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out))
    logits(model, ids)
    handle.remove()
    with shorted(model, stack, lambda: last[0]):
        assert torch.equal(logits(model, ids), want)
    expect_same(before, picture(model), "the recording")
