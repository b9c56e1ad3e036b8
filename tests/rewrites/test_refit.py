"""Refit against normal equations that are written out in float64 on hand-placed hooks, and against planted truth."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.core.documents import Step
from lamina.core.errors import InputError, LaminaError, UnsupportedError
from lamina.core.registry import REWRITES
from lamina.lab import Lab
from lamina.rewrites.refit import RIDGE, kept_weights, refit_sites
from lamina.testing.models import NanoGPT, lively, padded, text, tiny


class Places(NamedTuple):
    blocks: str
    attention: str
    mlp: str
    scale: float = 1.0


_LLAMA = Places("model.layers", "self_attn.o_proj", "mlp.down_proj")
PLACES = {
    "llama": _LLAMA,
    "granite": _LLAMA._replace(scale=0.3),
    "gpt2": Places("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": Places("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "nanogpt": Places("blocks", "mixes.out", "feeds.2"),
}
GAPS = (
    ("block.2",),
    ("block.1.mlp", "block.2.mlp"),
    ("block.1.attention", "block.2", "block.3.mlp"),
    ("block.0.attention", "block.3"),
    ("block.3.mlp",),
)
WEIGHT = 2e-4
"""What float32 streams and sums leave of a weight's accuracy; the weights are of size 0.2."""


def order(depth: int = 4) -> list[str]:
    return [f"block.{n}.{part}" for n in range(depth) for part in ("attention", "mlp")]


def expanded(sites: tuple[str, ...]) -> set[str]:
    return {p for p in order() if p in sites or p.rpartition(".")[0] in sites}


def tail(model: nn.Module, name: str, site: str) -> Any:
    """The projection that ends a branch."""
    _, number, part = site.split(".")
    block: Any = model.get_submodule(PLACES[name].blocks)[int(number)]  # type: ignore[index]
    return block.get_submodule(getattr(PLACES[name], part))


def stored(module: Any) -> Tensor:
    """Weights [in, out]."""
    return module.weight.T if isinstance(module, nn.Linear) else module.weight


@torch.no_grad()
def seen(model: nn.Module, name: str, ids: Tensor, gone: set[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of every projection and the stream after it, flat over tokens; outputs of `gone` are masked to zero."""
    inputs, adds, entering, handles = {}, {}, {}, []

    def projected(site: str) -> Any:
        def hook(_: Any, args: Any, output: Tensor) -> Tensor:
            inputs[site] = args[0].flatten(0, -2).clone()
            out = torch.zeros_like(output) if site in gone else output
            adds[site] = out.flatten(0, -2).clone()
            return out

        return hook

    def opened(number: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            entering[number] = (args[0] if args else kwargs["hidden_states"]).flatten(0, -2).clone()

        return hook

    blocks: Any = model.get_submodule(PLACES[name].blocks)
    for number, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(opened(number), with_kwargs=True))
    handles += [tail(model, name, s).register_forward_hook(projected(s)) for s in order(len(blocks))]
    model(ids)
    for handle in handles:
        handle.remove()
    after = {}
    for number in range(len(blocks)):
        stream = entering[number]
        for part in ("attention", "mlp"):
            site = f"block.{number}.{part}"
            after[site] = stream = stream + PLACES[name].scale * adds[site]
    return inputs, after


def literal(
    model: nn.Module, name: str, ids: Tensor, gone: set[str], sites: tuple[str, ...], ridge: float
) -> nn.Module:
    """The docstring's formula, one branch after the other, as an augmented least-squares problem in float64."""
    dense, thin = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    truth = seen(dense, name, ids, set())[1]
    places = order()
    for site in [s for s in places if s in sites]:
        end = places.index(site)
        while end + 1 < len(places) and places[end + 1] in gone:
            end += 1
        inputs, after = seen(thin, name, ids, gone)
        z, x, y = inputs[site], after[site], truth[places[end]]
        weight = y.norm(dim=-1, keepdim=True).reciprocal()
        gram = (z * weight).T @ (z * weight)
        level = (ridge * gram.diagonal().mean()).sqrt() * torch.eye(len(gram)).double()
        left = torch.cat([z * weight, level])
        right = torch.cat([(y - x) * weight, torch.zeros(len(gram), y.shape[1]).double()])
        with torch.no_grad():
            stored(tail(thin, name, site)).add_(torch.linalg.lstsq(left, right).solution / PLACES[name].scale)
    return thin


def refitted(model: nn.Module, text_: Any, gone: tuple[str, ...], ridge: float | None = None, size: int = 4) -> Lab:
    """A lab on a copy of the model, refitted around the gap."""
    lab = Lab(copy.deepcopy(model), text_, batch_size=size)
    options = {"around": list(gone)} | ({} if ridge is None else {"ridge": ridge})
    step = Step(rewrite="refit", sites=refit_sites(lab.anatomy, gone), options=options)
    REWRITES.make("refit").apply(step, lab)
    return lab


@pytest.mark.parametrize("gone", GAPS)
@pytest.mark.parametrize("name", sorted(PLACES))
def test_weights_solve_the_written_out_normal_equations(name: str, gone: tuple[str, ...]) -> None:
    """Linear stores [out, in], Conv1D [in, out]; granite scales its branches; the MLP of gpt_neox runs in parallel."""
    model, ids = tiny(name), text(6, 12)
    lab = refitted(model, ids, gone)
    sites = refit_sites(lab.anatomy, gone)
    wanted = literal(model, name, ids, expanded(gone), sites, RIDGE)
    for site in order():
        got, due, before = (stored(tail(m, name, site)).detach().double() for m in (lab.model, wanted, model))
        if site in sites:
            assert (got - before).abs().max() > 10 * WEIGHT, f"{site} is as before"
            torch.testing.assert_close(got, due, rtol=0, atol=WEIGHT, msg=lambda m, s=site: f"{s}: {m}")
        else:
            assert torch.equal(got, before), site


@pytest.mark.parametrize("ridge", [0.01, 3.0])
def test_ridge_is_relative_to_the_gram_matrix(ridge: float) -> None:
    model, ids, gone = tiny("llama"), text(8, 16), ("block.2",)
    lab = refitted(model, ids, gone, ridge)
    sites = refit_sites(lab.anatomy, gone)
    wanted = literal(model, "llama", ids, expanded(gone), sites, ridge)
    for site in sites:
        got, due = (stored(tail(m, "llama", site)).double() for m in (lab.model, wanted))
        torch.testing.assert_close(got, due, rtol=0, atol=5 * WEIGHT)


def test_only_weights_of_the_sites_change() -> None:
    """Biases, norms and embeddings stay, bit for bit."""
    model = tiny("gpt2")
    lab = refitted(model, text(6, 12), ("block.2",))
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, lab.model.state_dict()[k])]
    sites = refit_sites(lab.anatomy, ("block.2",))
    assert set(changed) == {
        n + ".weight" for n, m in lab.model.named_modules() if any(m is tail(lab.model, "gpt2", s) for s in sites)
    }


def planted() -> NanoGPT:
    """The MLP of block 1 reads only what the attention of block 1 wrote, and is linear: exactly B W z for its inputs z.

    Nothing else writes to the last 8 numbers of the stream, and blocks after it are live.
    """
    model = lively(NanoGPT()).eval()
    with torch.no_grad():
        model.tokens.weight[:, 24:] = 0
        model.places.weight[:, 24:] = 0
        for number, block in enumerate(model.blocks):
            for module in (block.mixes.out, block.feeds[2]):
                module.bias.zero_()
                if number == 0:
                    module.weight[24:] = 0
        block = model.blocks[1]
        block.between = nn.Identity()
        block.feeds = nn.Linear(32, 32, bias=False)
        lively(block.feeds, 7)
        block.feeds.weight[:, :24] = 0
    return model


@torch.no_grad()
def test_exactly_linear_gap_is_made_up_for_on_any_text() -> None:
    """With hardly any ridge, the thinned network is the dense one, also on text that it was not fitted on."""
    model, other = planted(), text(3, 20, seed=9)
    dense, gone = model(other), ("block.1.mlp",)
    lab = refitted(model, text(8, 16), gone, ridge=1e-7)
    REWRITES.make("drop").apply(Step(rewrite="drop", sites=gone), lab)
    error = (lab.model(other) - dense).abs().max()
    bare = Lab(planted(), text(2, 8))
    REWRITES.make("drop").apply(Step(rewrite="drop", sites=gone), bare)
    assert error < 1e-3 * dense.abs().max()
    assert (bare.model(other) - dense).abs().max() > 100 * error


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
def test_fewer_tokens_than_features_are_fitted_exactly(name: str) -> None:
    """24 tokens, 64 features before the gap: without a ridge the dense stream is met, and so are the logits."""
    model, ids, gone = tiny(name), text(2, 12), ("block.2.attention",)
    lab = refitted(model, ids, gone, ridge=1e-8)
    REWRITES.make("drop").apply(Step(rewrite="drop", sites=gone), lab)
    dense = model(ids).logits
    assert (lab.model(ids).logits - dense).abs().max() < 5e-3 * dense.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "granite"])
def test_thinned_streams_come_nearer_to_the_dense_ones(name: str) -> None:
    """On the text of the fit, at the end of the network, each token weighted as in the fit."""
    model, ids, gone = tiny(name), text(8, 16), ("block.1.mlp", "block.2")
    lab = refitted(model, ids, gone)
    dense = seen(model, name, ids, set())[1]["block.3.mlp"]
    bare, fitted = (seen(m, name, ids, expanded(gone))[1]["block.3.mlp"] for m in (model, lab.model))
    near, far = (((s - dense).norm(dim=-1) / dense.norm(dim=-1)).square().mean() for s in (fitted, bare))
    assert near < 0.7 * far


@pytest.mark.parametrize("name", sorted(PLACES))
def test_costs_nothing(name: str) -> None:
    """Forecast, receipt before and after, and the anatomy found anew all agree."""
    gone, model = ("block.1.mlp", "block.2"), tiny(name)
    lab = Lab(model, text(4, 12))
    step = Step(rewrite="refit", sites=refit_sites(lab.anatomy, gone), options={"around": list(gone)})
    rewrite, total, keys = (
        REWRITES.make("refit"),
        lab.anatomy.total(),
        {k: v.shape for k, v in model.state_dict().items()},
    )
    assert rewrite.forecast(step, lab.anatomy) == total
    receipt = rewrite.apply(step, lab)
    assert receipt.before == receipt.after == total == Anatomy.of(lab.model).total()
    assert receipt.sites == step.sites
    assert receipt.options == step.options
    assert {k: v.shape for k, v in lab.model.state_dict().items()} == keys
    assert all(p.requires_grad and p.grad is None for p in lab.model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    model, gone = tiny("llama"), ("block.1.mlp", "block.2.attention")
    rows = [text(1, n, seed=n)[0] for n in (16, 9, 12, 5, 14, 16, 11, 13)]
    alone = refitted(model, [{"input_ids": r.unsqueeze(0)} for r in rows], gone)
    together = refitted(model, padded(rows, 4, side=side), gone)
    for site in refit_sites(alone.anatomy, gone):
        a, b = (tail(lab.model, "llama", site).weight for lab in (alone, together))
        torch.testing.assert_close(a, b, rtol=0, atol=WEIGHT)


def test_batching_does_not_count() -> None:
    model, gone, ids = tiny("gpt2"), ("block.1",), text(6, 12)
    one, many = refitted(model, ids, gone, size=1), refitted(model, ids, gone, size=6)
    for site in refit_sites(one.anatomy, gone):
        a, b = (tail(lab.model, "gpt2", site).weight for lab in (one, many))
        torch.testing.assert_close(a, b, rtol=0, atol=WEIGHT)


@cache
def dense_anatomy() -> Anatomy:
    return Anatomy.of(tiny("llama"))


@settings(max_examples=60)
@given(gone=st.sets(st.sampled_from(order()), max_size=7))
def test_sites_start_before_the_first_gap(gone: set[str]) -> None:
    """The last branch before the first gap, and every kept one after it: what stays in front is the dense network."""
    anatomy = dense_anatomy()
    got = refit_sites(anatomy, gone)
    assert not set(got) & gone
    if not gone:
        assert got == ()
        return
    first = min(order().index(s) for s in gone)
    later = {s for n, s in enumerate(order()) if n > first and s not in gone}
    assert set(got) <= later | ({order()[first - 1]} if first else set())
    if first:
        assert order()[first - 1] in got
    assert list(got) == [s for s in order() if s in got]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_branches_that_end_in_a_norm_are_refused(name: str) -> None:
    """Before anything is changed; asked for its sites, such a model has none."""
    lab = Lab(tiny(name), text(4, 12))
    assert refit_sites(lab.anatomy, ["block.2"]) == ()
    before = {k: v.clone() for k, v in lab.model.state_dict().items()}
    step = Step(rewrite="refit", sites=("block.1.mlp",), options={"around": ["block.2"]})
    rewrite = REWRITES.make("refit")
    assert [p.where for p in rewrite.check(step, lab.anatomy)] == ["block.1.mlp"]
    with pytest.raises(UnsupportedError, match=r"block\.1\.mlp: .*linear map"):
        rewrite.apply(step, lab)
    assert all(torch.equal(before[k], v) for k, v in lab.model.state_dict().items())


def test_experts_are_passed_over_attentions_are_not() -> None:
    lab = refitted(tiny("mixtral"), text(6, 12), ("block.1.moe",))
    assert refit_sites(lab.anatomy, ["block.1.moe"]) == ("block.1.attention", "block.2.attention", "block.3.attention")
    changed = [k for k, v in tiny("mixtral").state_dict().items() if not torch.equal(v, lab.model.state_dict()[k])]
    assert changed == [f"model.layers.{n}.self_attn.o_proj.weight" for n in (1, 2, 3)]
    assert refit_sites(lab.anatomy, ["block.2.attention", "block.3"]) == ()


@pytest.mark.parametrize(
    "step",
    [
        Step(rewrite="refit", sites=("block.9.mlp",), options={"around": ["block.2"]}),
        Step(rewrite="refit", sites=("block.1.mlp",), options={"around": ["block.9"]}),
        Step(rewrite="refit", sites=("block.1.mlp",)),
    ],
    ids=["unknown site", "unknown gap", "no gap"],
)
def test_bad_steps_are_one_line(step: Step) -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    with pytest.raises(LaminaError) as caught:
        REWRITES.make("refit").apply(step, lab)
    assert isinstance(caught.value, InputError | UnsupportedError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_kept_weights_come_back(name: str) -> None:
    """Also after an error, and where a site is named twice."""
    lab = Lab(tiny(name), text(4, 12))
    gone = ("block.1.mlp", "block.2")
    sites = refit_sites(lab.anatomy, gone)
    before = {k: v.clone() for k, v in lab.model.state_dict().items()}
    step = Step(rewrite="refit", sites=sites, options={"around": list(gone)})

    def trial() -> None:
        with kept_weights(lab, [*sites, *sites]):
            REWRITES.make("refit").apply(step, lab)
            assert any(not torch.equal(before[k], v) for k, v in lab.model.state_dict().items())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial()
    assert all(torch.equal(before[k], v) for k, v in lab.model.state_dict().items())
    assert all(p.requires_grad for p in lab.model.parameters())
