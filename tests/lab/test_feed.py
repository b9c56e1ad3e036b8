"""What tallies may ask for beside the stream, against transformers' own numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from lamina.core.errors import LaminaError
from lamina.core.sites import Kind, Site
from lamina.lab import Lab, Taps
from lamina.lab.feed import feeding
from lamina.lab.gradients import stream_gradients
from lamina.testing.bench import expect_same, picture
from lamina.testing.models import padded, text, tiny

ROWS = (10, 4, 7)


class Asks:
    def __init__(self, *wants: str) -> None:
        self.wants = frozenset(wants)
        self.seen: dict[str, list[Taps]] = {}
        self.maps: dict[str, list[torch.Tensor]] = {}

    def add(self, site: Site, taps: Taps) -> None:
        self.seen.setdefault(site.id, []).append(taps)
        if taps.attention is not None:
            self.maps.setdefault(site.id, []).extend(taps.attention.weights(i) for i in range(taps.sequences))

    def scores(self) -> Any:
        return self


def asked(lab: Lab, *wants: str) -> Asks:
    return lab.stream([Asks(*wants)])[0]  # type: ignore[list-item,return-value]


def eager(model: Any) -> Any:
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation("eager")
    return twin.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mistral", "phi", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_weights_are_those_of_the_slow_path(name: str, side: str) -> None:
    model = tiny(name)
    (batch,) = padded([text(1, n, seed=n)[0] for n in ROWS], 3, side=side)
    with torch.no_grad():
        want = eager(model)(**batch, output_attentions=True, use_cache=False).attentions
    for one in (model, eager(model)):
        maps = asked(Lab(one, [batch]), "attention").maps
        for number, attention in enumerate(want):
            for row, length in enumerate(ROWS):
                keep = batch["attention_mask"][row].bool()
                due = attention[row][:, keep][:, :, keep]
                got = maps[f"block.{number}.attention"][row]
                assert got.shape == (4, length, length)
                torch.testing.assert_close(got, due, rtol=1e-5, atol=1e-5)


def test_attention_of_an_encoder_looks_both_ways() -> None:
    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model, ids = BertModel(config).eval(), text(2, 7)
    with torch.no_grad():
        want = eager(model)(ids, output_attentions=True).attentions
    maps = asked(Lab(model, ids), "attention").maps
    for number, attention in enumerate(want):
        torch.testing.assert_close(torch.stack(maps[f"block.{number}.attention"]), attention, rtol=1e-5, atol=1e-6)


def test_some_queries_alone() -> None:
    lab = Lab(tiny("llama"), text(1, 9))
    taken: list[torch.Tensor] = []

    class Last(Asks):
        def add(self, site: Site, taps: Taps) -> None:
            if taps.attention is not None:
                whole = taps.attention.weights(0)
                taken.append(taps.attention.weights(0, torch.tensor([2, 8])) - whole[:, [2, 8]])

    lab.stream([Last("attention")])  # type: ignore[list-item]
    assert len(taken) == 4
    assert max(float(t.abs().max()) for t in taken) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "nanogpt"])
def test_inner_inputs_and_linear_maps(name: str) -> None:
    """The columns that heads and neurons own, times the tail's weights, are what the branch adds (but for norms)."""
    lab = Lab(tiny(name), text(2, 6))
    found = asked(lab, "inner", "linears").seen
    for linear in lab.anatomy.linears():
        taps = found[linear.id][0]
        assert taps.x.shape == (12, lab.anatomy.weight(linear).shape[1])
    for head in lab.anatomy.of_kind(Kind.HEAD, Kind.NEURON):
        site = head.id.rpartition(".")[0]
        inner = found[site][0].inner
        assert inner is not None
        assert inner.shape[1] == sum(map(len, lab.anatomy.columns(head)))
        if name not in ("gemma2",):
            module = lab.model.get_submodule(lab.anatomy.tail(head))
            torch.testing.assert_close(module(inner), found[site][0].added, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_behind() -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    lab.anatomy.units("block.0")
    before = picture(lab.model)
    asked(lab, "inner", "linears", "attention")
    expect_same(before, picture(lab.model), "a pass with all taps")

    class Fails(Asks):
        def add(self, site: Site, taps: Taps) -> None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        lab.stream([Fails("inner", "linears", "attention")])  # type: ignore[list-item]
    expect_same(before, picture(lab.model), "a pass that failed")


def test_only_who_asks_gets_linear_maps() -> None:
    lab = Lab(tiny("llama"), text(1, 5))
    plain, full = Asks(), Asks("linears")
    lab.stream([plain, full])  # type: ignore[list-item]
    assert {s for s in full.seen if s not in plain.seen} == {s.id for s in lab.anatomy.linears()}
    assert set(plain.seen) == {s.id for s in lab.anatomy.sites}


def test_an_unknown_tap_is_refused() -> None:
    with pytest.raises(LaminaError, match=r"no tap is named weight.*known: attention"):
        Lab(tiny("llama"), text(1, 5)).stream([Asks("weight")])  # type: ignore[list-item]


def test_one_block_alone() -> None:
    lab = Lab(tiny("llama"), text(2, 5))
    block = lab.anatomy.stacks[0].blocks[2]
    tally = Asks("inner")
    rows = next(lab.rows())
    with torch.no_grad(), feeding(lab.anatomy, rows, [tally], only=block):  # type: ignore[list-item]
        lab.forward(rows.batch)
    assert set(tally.seen) == {"block.2", "block.2.attention", "block.2.mlp"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_gradient_pass_hands_out_the_same(name: str) -> None:
    """What the forward alone shows, and beside it gradients of the inner inputs and of the weights."""
    model = tiny(name)
    lab = Lab(model, text(2, 6))
    plain = asked(lab, "inner", "linears", "attention")
    graded = Asks("inner", "linears", "attention")
    stream_gradients(lab, [graded], probes=["loss"])  # type: ignore[list-item]
    assert set(graded.seen) == set(plain.seen)
    for site, (taps,) in plain.seen.items():
        other = graded.seen[site][0]
        torch.testing.assert_close(other.x, taps.x, rtol=1e-4, atol=1e-5)
        if taps.inner is not None:
            assert other.inner_gradient is not None
            torch.testing.assert_close(other.inner, taps.inner, rtol=1e-4, atol=1e-5)
            assert other.inner_gradient.shape == (1, *taps.inner.shape)
    for site, maps in plain.maps.items():
        for one, two in zip(maps, graded.maps[site], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_gradients_of_weights_are_autograds_sequence_by_sequence(name: str) -> None:
    model, rows = tiny(name), [text(1, n, seed=n)[0] for n in ROWS]
    tally = Asks("weights")
    stream_gradients(Lab(model, padded(rows, 3, side="left")), [tally], probes=["loss"])  # type: ignore[list-item]
    for number, row in enumerate(rows):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum")
        loss.backward()
        for site in ("block.1.attention", "block.2.mlp"):
            taps = tally.seen[site][number]
            assert taps.sequences == 1
            assert taps.weights
            for parameter, (weight, gradient) in taps.weights.items():
                due = dict(model.named_parameters())[parameter]
                assert torch.equal(weight, due)
                torch.testing.assert_close(gradient, due.grad, rtol=1e-3, atol=1e-4)
    model.zero_grad()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_inner_gradients_are_autograds() -> None:
    model, ids = tiny("llama"), text(1, 7)
    tally = Asks("inner")
    stream_gradients(Lab(model, ids), [tally], probes=["loss", "entropy"])  # type: ignore[list-item]
    held: list[torch.Tensor] = []
    tail = model.model.layers[1].mlp.down_proj
    handle = tail.register_forward_pre_hook(lambda _, a: held.append(a[0]))
    logits = model(ids).logits[0]
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
    p = logits[:-1].softmax(-1)
    entropy = -(p * p.log()).sum()
    for place, what in enumerate((loss, entropy)):
        (want,) = torch.autograd.grad(what, held, retain_graph=True)
        got = tally.seen["block.1.mlp"][0].inner_gradient
        assert got is not None
        torch.testing.assert_close(got[place], want[0], rtol=1e-3, atol=1e-5)
