"""EoRA (arXiv 2410.21271): corrections by the eigenspace of the inputs, against the formula, over other rewrites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.core.documents import Receipt, Step
from lamina.core.errors import InputError, LaminaError, UnsupportedError
from lamina.core.registry import REWRITES
from lamina.core.sites import Cost
from lamina.exporters.hf import save_checkpoint
from lamina.lab import Lab
from lamina.lab.moments import input_moments
from lamina.lab.order import merged
from lamina.papers.rank.eora import correction
from lamina.rewrites.factorise import factors_of
from lamina.testing.models import text, tiny

ROUND = {"rewrite": "round", "options": {"type": "Q4_0"}}
OVERS: list[dict[str, Any]] = [
    ROUND,
    {"rewrite": "gptq", "options": {"type": "Q4_1", "damping": 0.02}},
    {"rewrite": "magnitude", "options": {"sparsity": 0.5, "rows": True}},
    {"rewrite": "wanda", "options": {"pattern": "2:4"}},
    {"rewrite": "svd", "options": {"rank": 6}},
    {"rewrite": "svd-llm", "options": {"rank": 6}},
]


def name_of(over: dict[str, Any]) -> str:
    return over["rewrite"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_of(sites: tuple[str, ...], over: Any, rank: Any = 4) -> Step:
    return Step(rewrite="eora", sites=sites, options={"over": over, "rank": rank})


def applied(lab: Lab, sites: tuple[str, ...], over: Any, rank: Any = 4) -> Receipt:
    return REWRITES.make("eora").apply(step_of(sites, over, rank), lab)


@torch.no_grad()
def caught(model: nn.Module, path: str, ids: Tensor) -> Tensor:
    """What enters a map [tokens, inputs], float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten(0, -2)))
    model(ids)
    handle.remove()
    return torch.cat(seen).double()


def literal(lost: Tensor, x: Tensor, rank: int) -> Tensor:
    """As the paper writes it: C = X Xᵀ = Q Λ Qᵀ, SVD of lost Q √Λ, cut, times Λ^(-1/2) Qᵀ."""
    values, q = torch.linalg.eigh(x.T @ x)
    u, s, v = torch.linalg.svd(lost @ q @ torch.diag(values.sqrt()), full_matrices=False)
    b = u[:, :rank] @ torch.diag(s[:rank].sqrt())
    a = torch.diag(s[:rank].sqrt()) @ v[:rank] @ torch.diag(1 / values.sqrt()) @ q.T
    return b @ a


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99), st.data())
def test_no_other_correction_of_the_rank_is_better(out: int, inp: int, seed: int, data: st.DataObject) -> None:
    lost, x = drawn(out, inp, seed=seed), drawn(inp, 30, seed=seed + 1) * drawn(inp, 1, seed=seed + 2).exp()
    rank = data.draw(st.integers(1, min(out, inp)))
    a, b = correction(lost, rank, x @ x.T)
    assert (a.shape, b.shape) == ((rank, inp), (out, rank))
    error = float(((lost - b @ a) @ x).square().sum())
    tail = float(torch.linalg.svdvals(lost @ x)[rank:].square().sum())
    whole = float((lost @ x).square().sum())
    assert error == pytest.approx(tail, rel=1e-6, abs=1e-9 * whole)
    plain = torch.matmul(*reversed(factors_of(lost, rank)))
    assert error <= float(((lost - plain) @ x).square().sum()) + 1e-9 * whole
    other = drawn(out, rank, seed=seed + 3) @ drawn(rank, inp, seed=seed + 4)
    assert error <= float(((lost - other) @ x).square().sum()) + 1e-9 * whole
    if rank == min(out, inp):
        torch.testing.assert_close(b @ a, lost, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(literal(lost, x.T, rank), b @ a, rtol=1e-5, atol=1e-6)


def test_inputs_that_are_all_alike_give_the_plain_decomposition() -> None:
    lost = drawn(6, 9)
    a, b = correction(lost, 3, 2.5 * torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(b @ a, torch.matmul(*reversed(factors_of(lost, 3))))


@pytest.mark.parametrize("over", OVERS, ids=name_of)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_map_is_what_the_other_rewrite_makes_and_its_correction(name: str, over: dict[str, Any]) -> None:
    ids = text(6, 30)
    lab, alone = Lab(tiny(name), ids, batch_size=2), Lab(tiny(name), ids, batch_size=2)
    sites = tuple(s.id for s in lab.anatomy.linears("block.1"))
    paths = {s: lab.anatomy.site(s).path for s in sites}
    dense = {s: lab.anatomy.weight(s).detach().double() for s in sites}
    inputs = {s: caught(lab.model, p, ids) for s, p in paths.items()}
    biases = {p: getattr(lab.model.get_submodule(p), "bias", None) for p in paths.values()}
    own = {k: v for k, v in over["options"].items() if k in ("damping", "rows")}
    inner = Step(rewrite=over["rewrite"], sites=sites, options=over["options"])
    REWRITES.make(over["rewrite"], own).apply(inner, alone)
    receipt = applied(lab, sites, over)
    for site, path in paths.items():
        made: Any = lab.model.get_submodule(path)
        other: Any = alone.model.get_submodule(path)
        base = other.weight.T if type(other).__name__ == "Conv1D" else other.weight
        if "svd" in over["rewrite"]:
            assert type(made).__name__ == "Factors"
            assert made.down.weight.shape[0] == 6 + 4
        else:
            assert torch.equal(made.base.weight, base)
            assert made.down.weight.shape[0] == 4
        assert made.bias is None if biases[path] is None else torch.equal(made.bias, biases[path])
        lost, x = dense[site] - base.detach().double(), inputs[site]
        want = base.detach().double() + literal(lost, x, 4)
        off = ((made.weight.detach().double() - want) @ x.T).norm()
        assert float(off) < 1e-3 * float((lost @ x.T).norm()) + 1e-5
        plain = torch.matmul(*reversed(factors_of(lost, 4)))
        after, beside = ((dense[site] - w) @ x.T for w in (made.weight.detach().double(), base + plain))
        assert after.norm() <= beside.norm() * 1.0001
        assert after.norm() < (lost @ x.T).norm()
    assert receipt.options["over"]["rewrite"] == over["rewrite"]
    assert receipt.rewrite == "eora"


@pytest.mark.parametrize("over", OVERS, ids=name_of)
def test_the_forecast_is_the_other_ones_and_the_correction(over: dict[str, Any]) -> None:
    lab = Lab(tiny("llama"), text(4, 20))
    sites = tuple(s.id for s in lab.anatomy.linears("block.2.mlp"))
    rank = {s: 2 + n for n, s in enumerate(sites)}
    inner = Step(rewrite=over["rewrite"], sites=sites, options=over["options"])
    before = REWRITES.make(over["rewrite"]).forecast(inner, lab.anatomy)
    more = sum(r * (32 + 64) for r in rank.values())
    receipt = applied(lab, sites, over, rank)
    assert receipt.after == before + Cost(more, more * 4, more)
    real = lab.anatomy.total()
    assert (real.parameters, real.macs) == (receipt.after.parameters, receipt.after.macs)
    if over["rewrite"] not in ("round", "gptq"):
        assert real == receipt.after


def test_the_loss_of_the_network_comes_back() -> None:
    """The nearer to full rank, the nearer the logits are to the dense network's."""
    ids, off = text(6, 30), []
    sites = tuple(s.id for s in Lab(tiny("llama"), ids).anatomy.linears())
    with torch.no_grad():
        want = tiny("llama")(ids).logits
        for rank in (0, 4, 12, 16):
            lab = Lab(tiny("llama"), ids)
            over = {"rewrite": "magnitude", "options": {"sparsity": 0.5}}
            if rank:
                applied(lab, sites, over, rank)
            else:
                REWRITES.make("magnitude").apply(Step(rewrite="magnitude", sites=sites, options=over["options"]), lab)
            off.append(float((lab.model(ids).logits - want).norm()))
        assert off[0] > off[1] > off[2] > off[3]
        lab = Lab(tiny("llama"), ids)
        full = {s: min(lab.anatomy.weight(s).shape) for s in sites}
        applied(lab, sites, over, full)
        torch.testing.assert_close(lab.model(ids).logits, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("over", [ROUND, {"rewrite": "svd-llm", "options": {"rank": 6}}], ids=name_of)
def test_weights_on_trial_are_those_that_come_of_it(over: dict[str, Any]) -> None:
    lab = Lab(tiny("llama"), text(4, 20))
    sites = tuple(s.id for s in lab.anatomy.linears("block.1.mlp"))
    tried = REWRITES.make("eora").weights(step_of(sites, over), lab.anatomy, input_moments(lab, sites))
    applied(lab, sites, over)
    assert len(tried) == 3
    for path, weight in tried.items():
        made: Any = lab.model.get_submodule(path)
        torch.testing.assert_close(made.weight.double(), weight.double(), rtol=1e-4, atol=1e-5)


def test_what_tells_no_weights_can_not_be_tried() -> None:
    lab = Lab(tiny("llama"), text(4, 20))
    sites = ("block.1.mlp.up_proj",)
    if hasattr(REWRITES.make("magnitude"), "weights"):
        pytest.skip("zeros tell their weights")
    with pytest.raises(UnsupportedError, match="magnitude can't be tried"):
        REWRITES.make("eora").weights(
            step_of(sites, {"rewrite": "magnitude", "options": {"sparsity": 0.5}}),
            lab.anatomy,
            input_moments(lab, sites),
        )


@pytest.mark.parametrize("over", [ROUND, {"rewrite": "svd", "options": {"rank": 6}}], ids=name_of)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpoints_reload(name: str, over: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = text(2, 9)
    lab = Lab(tiny(name), ids)
    sites = tuple(s.id for s in lab.anatomy.linears("block.1")) + tuple(
        s.id for s in lab.anatomy.linears("block.3.mlp")
    )
    receipt = applied(lab, sites, over)
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, lab.model(ids).logits)


def test_sixteen_bits_stay() -> None:
    lab = Lab(tiny("llama").bfloat16(), text(4, 20))
    applied(lab, ("block.2.mlp.down_proj",), ROUND)
    made: Any = lab.model.get_submodule("model.layers.2.mlp.down_proj")
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert torch.equal(made.base.weight, REWRITES.make("round").weights(
        Step(rewrite="round", sites=("block.2.mlp.down_proj",), options={"type": "Q4_0"}),
        Lab(tiny("llama").bfloat16(), text(4, 20)).anatomy, None,
    )["model.layers.2.mlp.down_proj"])  # fmt: skip


def test_steps_over_the_same_rewrite_are_one_and_come_late() -> None:
    lab = Lab(tiny("llama"), text(4, 20))
    first, second = step_of(("block.1.mlp.up_proj",), ROUND), step_of(("block.2.mlp.up_proj",), ROUND, 3)
    svd = Step(rewrite="svd", sites=("block.0.mlp.up_proj",), options={"rank": 4})
    done = merged([first, second, svd], lab)
    assert [s.rewrite for s in done] == ["svd", "eora"]
    assert done[1].options == {"over": ROUND, "rank": {"block.1.mlp.up_proj": 4, "block.2.mlp.up_proj": 3}}
    other = {"rewrite": "round", "options": {"type": "Q8_0"}}
    assert len(merged([first, step_of(("block.2.mlp.up_proj",), other)], lab)) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"over": ROUND}, "tells no rank"),
        ({"rank": 4}, "does not tell over which rewrite"),
        ({"over": "round", "rank": 4}, "does not tell over which rewrite"),
        ({"over": {"rewrite": "rond"}, "rank": 4}, "did you mean round"),
        ({"over": {"rewrite": "round", "option": {}}, "rank": 4}, "over has no 'option'"),
        ({"over": {"rewrite": "round"}, "rank": 4}, "tells no type"),
        ({"over": {"rewrite": "gptq", "options": {"type": "Q4_0", "damping": 7}}, "rank": 4}, "damping must lie"),
        ({"over": {"rewrite": "svd", "options": {"rank": 40}}, "rank": 4}, "saves nothing"),
        ({"over": {"rewrite": "drop"}, "rank": 4}, "neither rounds, sparsifies nor factorises"),
        ({"over": {"rewrite": "eora"}, "rank": 4}, "neither rounds, sparsifies nor factorises"),
        ({"over": {"rewrite": "basis-sharing"}, "rank": 4}, "neither rounds, sparsifies nor factorises"),
        ({"over": ROUND, "rank": 0}, "ranks from 1 to 32"),
        ({"over": ROUND, "rank": 33}, "ranks from 1 to 32"),
    ],
)
def test_what_cannot_be_done_is_told(options: dict[str, Any], said: str) -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    before = {k: v.clone() for k, v in lab.model.state_dict().items()}
    with pytest.raises(LaminaError, match=said) as caught_:
        REWRITES.make("eora").apply(Step(rewrite="eora", sites=("block.1.mlp.up_proj",), options=options), lab)
    assert not isinstance(caught_.value, InputError)
    after = lab.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_maps_that_are_one_are_refused() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    REWRITES.make("share").apply(Step(rewrite="share", sites=("block.1.mlp", "block.2.mlp")), lab)
    over = {"rewrite": "magnitude", "options": {"sparsity": 0.5}}
    problems = REWRITES.make("eora").check(step_of(("block.1.mlp.up_proj",), over), lab.anatomy)
    assert [p.what for p in problems] == ["shares its weights with another map"]
