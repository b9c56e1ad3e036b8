"""Layouts against networks written out sublayer by sublayer: x_i = x_{i-1} + f_i(an earlier stream)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_kinds import bert
from torch import Tensor
from transformers import AutoModelForCausalLM

from lamina.anatomy import Anatomy
from lamina.core.documents import Step
from lamina.core.errors import LaminaError
from lamina.core.registry import REWRITES, rewrite_of
from lamina.exporters.hf import form, save_checkpoint
from lamina.lab import Lab
from lamina.lab.walk import Walk
from lamina.testing.models import text, tiny
from lamina.testing.planted import silence

IDS = text(3, 9)
F = Callable[[Tensor], Tensor]


def applied(name: str, model: Any, *blocks: int) -> tuple[Lab, Any]:
    lab = Lab(model, IDS)
    step = Step(rewrite=name, sites=tuple(f"block.{n}" for n in blocks))
    return lab, rewrite_of(step).apply(step, lab)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    out = model(ids)
    return getattr(out, "logits", out)


def sublayers(name: str, model: Any) -> tuple[Tensor, list[F], Callable[[Tensor], Tensor]]:
    """The embedded text, every sublayer with its norms as a function of the stream, and what comes after the last."""
    if name == "nanogpt":
        start = model.tokens(IDS) + model.places(torch.arange(IDS.shape[1]))
        found: list[F] = []
        for block in model.blocks:
            found.append(lambda x, b=block: b.mixes(b.before(x)))
            found.append(lambda x, b=block: b.feeds(b.between(x)))
        return start, found, lambda x: model.head(model.norm(x))
    body = model.model
    start, found = body.embed_tokens(IDS), []
    turned = body.rotary_emb(start, torch.arange(IDS.shape[1]).unsqueeze(0))
    for block in body.layers:

        def attend(x: Tensor, b: Any = block) -> Tensor:
            return b.self_attn(hidden_states=x, position_embeddings=turned, attention_mask=None)[0]

        if name == "llama":
            found.append(lambda x, b=block, a=attend: a(b.input_layernorm(x)))
            found.append(lambda x, b=block: b.mlp(b.post_attention_layernorm(x)))
        else:  # olmo2: norms behind
            found.append(lambda x, b=block, a=attend: b.post_attention_layernorm(a(x)))
            found.append(lambda x, b=block: b.post_feedforward_layernorm(b.mlp(x)))
    return start, found, lambda x: model.lm_head(body.norm(x))


@torch.no_grad()
def by_hand(name: str, model: Any, layout: str, blocks: Sequence[int]) -> Tensor:
    """All streams are kept; each sublayer reads the one that its layout says."""
    start, functions, end = sublayers(name, model)
    streams = [start]
    for number, function in enumerate(functions):
        block, place = divmod(number, 2)
        back = 0
        if block in blocks:
            back = place if layout == "parallel" else min(1, number)
        streams.append(streams[-1] + function(streams[number - back]))
    return end(streams[-1])


@pytest.mark.parametrize("layout", ["parallel", "ladder"])
@pytest.mark.parametrize("blocks", [(0,), (2,), (0, 1), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("name", ["llama", "olmo2", "nanogpt"])
def test_the_model_computes_what_a_loop_over_sublayers_computes(
    name: str, blocks: tuple[int, ...], layout: str
) -> None:
    model = tiny(name)
    dense, want = logits(model), by_hand(name, model, layout, blocks)
    assert torch.allclose(dense, by_hand(name, model, layout, ()), atol=1e-5), "the loop is not the model"
    if layout == "parallel" or blocks != (0,):
        assert float((want - dense).abs().max()) > 1e-2, "the layout makes no difference, nothing is tested"
    lab, receipt = applied(layout, model, *blocks)
    torch.testing.assert_close(logits(lab.model), want, rtol=1e-4, atol=2e-5)
    assert receipt.before == receipt.after == lab.anatomy.total()
    assert lab.anatomy.certify().worst < 1e-5


def test_the_form_with_two_streams_is_the_ladder() -> None:
    """A and M as in the paper's blocks: A' = M + f(A), M' = A' + g(M)."""
    model = tiny("llama")
    with torch.no_grad():
        start, functions, end = sublayers("llama", model)
        a = m = start
        for number in range(4):
            a_next = m + functions[2 * number](a)
            m, a = a_next + functions[2 * number + 1](m), a_next
        want = end(m)
    lab, _ = applied("ladder", model, 0, 1, 2, 3)
    torch.testing.assert_close(logits(lab.model), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", ["parallel", "ladder"])
def test_sublayers_that_add_nothing_make_no_difference(layout: str) -> None:
    model = tiny("llama")
    silence(Anatomy.of(model), "block.1.attention", "block.1.mlp", "block.0.mlp")
    before = logits(model)
    lab, _ = applied(layout, model, 1)
    torch.testing.assert_close(logits(lab.model), before, rtol=1e-5, atol=1e-5)


def test_two_steps_are_one_and_a_block_that_goes_is_not_left_out_behind_it() -> None:
    once, _ = applied("ladder", tiny("llama"), 1, 2)
    model = tiny("llama")
    applied("ladder", model, 1)
    twice, _ = applied("ladder", model, 2)
    torch.testing.assert_close(logits(twice.model), logits(once.model), rtol=1e-5, atol=1e-6)
    start, functions, end = sublayers("llama", tiny("llama"))
    drop = Step(rewrite="drop", sites=("block.1",))
    rewrite_of(drop).apply(drop, once)
    streams = [start]
    with torch.no_grad():
        for f, place in ((0, 0), (1, 1), (4, 2), (5, 2), (6, 4), (7, 5)):
            streams.append(streams[-1] + functions[f](streams[place]))
        torch.testing.assert_close(logits(once.model), end(streams[-1]), rtol=1e-4, atol=2e-5)


def test_walks_and_gradients_go_through_a_ladder() -> None:
    lab, _ = applied("ladder", tiny("llama"), 1, 2, 3)
    walk = Walk(lab)
    for _ in range(4):
        walk.step()
    with torch.no_grad():
        want = logits(lab.model)
        got = torch.cat([lab.model.lm_head(lab.model.model.norm(s)) for s in walk.streams])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    lab.model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in lab.model.parameters())


@pytest.mark.parametrize("layout", ["parallel", "ladder"])
def test_a_checkpoint_brings_its_layout_along(layout: str, tmp_path: Path) -> None:
    lab, receipt = applied(layout, tiny("llama"), 1, 2)
    assert form(lab.model, [receipt]) == "shim"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(loaded), logits(lab.model), rtol=1e-5, atol=1e-6)
    assert list(loaded.state_dict()) == list(tiny("llama").state_dict()), "names of weights stay"
    assert float((logits(loaded) - logits(tiny("llama"))).abs().max()) > 1e-2


@settings(max_examples=10, deadline=None)
@given(blocks=st.sets(st.integers(0, 3), min_size=1), seed=st.integers(0, 5))
def test_any_blocks_of_any_model_in_float64(blocks: set[int], seed: int) -> None:
    model = tiny("nanogpt", seed=seed).double()
    want = by_hand("nanogpt", model, "ladder", sorted(blocks))
    lab, _ = applied("ladder", model, *sorted(blocks))
    torch.testing.assert_close(logits(lab.model), want, rtol=1e-10, atol=1e-10)


def test_what_can_not_be_laid_out_is_refused_in_one_line() -> None:
    model, sample = bert()
    post = Anatomy.of(model, sample)
    beside = Anatomy.of(tiny("gpt_neox"))
    cases = [
        (post, post.stacks[0].blocks[1].site.id, "more to the stream"),
        (beside, "block.1", "earlier stream already"),
    ]
    for anatomy, site, words in cases:
        for name in ("parallel", "ladder"):
            problems = REWRITES.make(name).check(Step(rewrite=name, sites=(site,)), anatomy)
            assert problems, name
            assert words in problems[0].what
            assert "\n" not in problems[0].what
    lab, _ = applied("ladder", tiny("llama"), 1)
    with pytest.raises(LaminaError, match="earlier stream already"):
        rewrite_of(step := Step(rewrite="parallel", sites=("block.1",))).apply(step, lab)
