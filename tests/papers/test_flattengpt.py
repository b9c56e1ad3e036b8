"""FlattenGPT against parallel execution written out, and its pruning against loops over heads and neurons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lamina.core.documents import Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import REWRITES, rewrite_of
from lamina.core.sites import Tie
from lamina.exporters.hf import form, save_checkpoint
from lamina.lab import Lab
from lamina.rewrites._flat import leverage
from lamina.rewrites._wide import joined
from lamina.rewrites.narrow import taken_over
from lamina.testing.models import text, tiny

IDS = text(4, 9)
F = Callable[[Tensor], Tensor]


def applied(model: Any, *blocks: int, width: float = 1, **options: Any) -> tuple[Lab, Any]:
    lab = Lab(model, IDS, batch_size=3)
    sites = tuple(f"block.{n}" for n in blocks)
    step = Step(rewrite="flatten", sites=sites, options={"width": width, **options})
    return lab, rewrite_of(step).apply(step, lab)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    out = model(ids)
    return getattr(out, "logits", out)


def parts(name: str, model: Any) -> tuple[Tensor, list[tuple[F, F]], F]:
    """The embedded text, attention and MLP of every block with their norms, and what comes after the last block."""
    places = torch.arange(IDS.shape[1])
    if name == "nanogpt":
        pairs = [(lambda x, b=b: b.mixes(b.before(x)), lambda x, b=b: b.feeds(b.between(x))) for b in model.blocks]
        return model.tokens(IDS) + model.places(places), pairs, lambda x: model.head(model.norm(x))
    if name == "gpt2":
        body = model.transformer
        pairs = [(lambda x, b=b: b.attn(b.ln_1(x))[0], lambda x, b=b: b.mlp(b.ln_2(x))) for b in body.h]
        return body.wte(IDS) + body.wpe(places), pairs, lambda x: model.lm_head(body.ln_f(x))
    beside = name == "gpt_neox"
    body = model.gpt_neox if beside else model.model
    start = (body.embed_in if beside else body.embed_tokens)(IDS)
    turned = {"position_embeddings": body.rotary_emb(start, places.unsqueeze(0)), "attention_mask": None}

    def attention(block: Any) -> F:
        core = block.attention if beside else block.self_attn
        return lambda x: core(block.input_layernorm(x), **turned)[0]

    pairs = [(attention(b), lambda x, b=b: b.mlp(b.post_attention_layernorm(x))) for b in body.layers]
    return start, pairs, lambda x: model.lm_head((body.final_layer_norm if beside else body.norm)(x))


@torch.no_grad()
def in_parallel(name: str, model: Any, groups: list[list[int]]) -> Tensor:
    """Of each group of blocks: all attentions on one stream, then all MLPs on one stream (or on the same one)."""
    x, blocks, end = parts(name, model)
    for group in groups:
        attended = sum(blocks[n][0](x) for n in group)
        wide = x if name == "gpt_neox" else x + attended
        x = x + attended + sum(blocks[n][1](wide) for n in group)
    return end(x)


@pytest.mark.parametrize("groups", [[[0], [1, 2], [3]], [[0, 1], [2, 3]], [[0], [1, 2, 3]]])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "nanogpt"])
def test_without_pruning_it_is_parallel_execution(name: str, groups: list[list[int]]) -> None:
    model = tiny(name)
    assert torch.allclose(in_parallel(name, model, [[0], [1], [2], [3]]), logits(model), atol=1e-5), "oracle is off"
    want = in_parallel(name, model, groups)
    assert float((want - logits(model)).abs().max()) > 1e-2
    count = max(map(len, groups))
    lab, receipt = applied(model, *(n for g in groups if len(g) > 1 for n in g), width=count, of=count)
    torch.testing.assert_close(logits(lab.model), want, rtol=1e-4, atol=5e-5)
    assert len(lab.anatomy.stacks[0].blocks) == len(groups)
    assert receipt.after == lab.anatomy.total()
    assert receipt.after.kv_bytes == receipt.before.kv_bytes, "as many heads in fewer entries"


def pruned_by_hand(model: Any, first: int, share: float, ridge: float = 10.0) -> Tensor:
    """Blocks `first` and the next of a NanoGPT as one, `share` times as wide; loops over tokens, heads and neurons."""
    x, _, end = parts("nanogpt", model)
    for number, block in enumerate(model.blocks):
        if number == first + 1:
            continue
        if number != first:
            x = x + block.mixes(block.before(x))
            x = x + block.feeds(block.between(x))
            continue
        pair = [model.blocks[first], model.blocks[first + 1]]
        x = x + _heads(pair, x, share)
        x = x + _neurons(pair, x, share, ridge)
    return end(x)


def _heads(pair: list[Any], x: Tensor, share: float) -> Tensor:
    """What the attention heads of the highest scores add, the others gone."""
    scores, adds, biases = [], [], 0
    for block in pair:
        heads, size = block.mixes.heads, x.shape[-1] // block.mixes.heads
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in block.mixes.qkv(block.before(x)).chunk(3, -1))
        biases = biases + block.mixes.out.bias
        for h in range(heads):
            weights = (q[:, :, h] @ k[:, :, h].transpose(1, 2) / size**0.5).masked_fill(
                torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf
            )
            z = weights.softmax(-1) @ v[:, :, h]
            out = block.mixes.out.weight[:, h * size : (h + 1) * size]
            root = (out.T @ out).diagonal().sqrt()
            scores.append(float((z * root).norm()))
            adds.append(z @ out.T)
    count = round(share * len(scores) / 2)
    best = sorted(range(len(scores)), key=lambda n: -scores[n])[:count]
    return sum(adds[n] for n in best) + biases


def _neurons(pair: list[Any], x: Tensor, share: float, ridge: float) -> Tensor:
    """What the neurons of the highest leverage add, with a last map that makes up for the others."""
    psi = torch.cat([b.feeds[1](b.feeds[0](b.between(x))) for b in pair], -1)
    down = torch.cat([b.feeds[2].weight for b in pair], 1).T  # [neurons, width] as in the paper
    bias = sum(b.feeds[2].bias for b in pair)
    rows = psi.flatten(0, 1)
    c = rows.T @ rows / len(rows)
    level = ridge * torch.linalg.svdvals(c).mean()
    scores = (c @ torch.linalg.inv(c + level * torch.eye(len(c)))).diagonal()
    count = round(share * len(c) / 2)
    keep = torch.tensor(sorted(sorted(range(len(c)), key=lambda n: -float(scores[n]))[:count]))
    s = torch.eye(len(c))[:, keep]
    gram = s.T @ c @ s + level * torch.eye(count)
    made = s.T @ down + torch.linalg.inv(gram) @ s.T @ c @ (torch.eye(len(c)) - s @ s.T) @ down
    return psi @ s @ made + bias


@pytest.fixture
def doubles() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("first", "share"), [(0, 1.0), (1, 1.0), (2, 0.5), (1, 1.5), (1, 2.0)])
def test_pruning_is_the_papers(doubles: None, first: int, share: float) -> None:
    model = tiny("nanogpt").double()
    with torch.no_grad():
        want = pruned_by_hand(model, first, share)
    lab, receipt = applied(model, first, first + 1, width=share)
    torch.testing.assert_close(logits(lab.model), want, rtol=1e-5, atol=1e-5)  # sums of moments are in float32
    block = lab.model.blocks[first]
    assert block.feeds[0].out_features == round(share * 128)
    assert block.mixes.heads == round(share * 4)
    assert receipt.after == lab.anatomy.total()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_pair_with_an_empty_block_loses_nothing(name: str) -> None:
    """All maps of one block are zero: pruned to the width of one, the pair is the other block, exactly."""
    for empty, kept in ((2, 1), (1, 2)):
        model = tiny(name)
        block = Lab(model, IDS).anatomy.stacks[0].blocks[empty]
        with torch.no_grad():
            for module in model.get_submodule(block.path).modules():
                if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                    module.weight.zero_()
                    if module.bias is not None:
                        module.bias.zero_()
        dense = logits(model)
        lab, receipt = applied(model, 1, 2)
        torch.testing.assert_close(logits(lab.model), dense, rtol=1e-4, atol=2e-5, msg=f"block {kept} was not kept")
        assert form(lab.model, [receipt]) == "stock"


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(3, 30), keep=st.integers(1, 5), gone=st.integers(1, 5), ridge=st.floats(0.01, 20),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_compensation_is_ridge_least_squares(tokens: int, keep: int, gone: int, ridge: float, seed: int) -> None:
    """argmin_W ‖Z W₀ - Z_k W‖² + n λ ‖W - W_k‖², by lstsq of the stacked system; leverage is that of ridge."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, keep + gone, generator=draw, dtype=torch.float64)
    weight = torch.randn(4, keep + gone, generator=draw, dtype=torch.float64)
    c = z.T @ z / tokens
    scores, level = leverage(c, ridge)
    assert level == pytest.approx(ridge * float(torch.linalg.svdvals(c).mean()))
    values = torch.linalg.eigvalsh(c)
    assert float(scores.sum()) == pytest.approx(float((values / (values + level)).sum()), abs=1e-9)
    columns = list(range(keep, keep + gone))
    mean = float(c.diagonal()[:keep].mean())
    made = taken_over(weight, c, columns, level / mean)[:, :keep]
    root = (tokens * level) ** 0.5 * torch.eye(keep, dtype=torch.float64)
    stacked = torch.cat([z[:, :keep], root])
    target = torch.cat([z @ weight.T, root @ weight[:, :keep].T])
    torch.testing.assert_close(made, torch.linalg.lstsq(stacked, target).solution.T, rtol=1e-6, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(units=st.integers(1, 5), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), blocks=st.integers(1, 3))
def test_units_stand_side_by_side_run_by_run(units: int, sizes: list[int], blocks: int) -> None:
    """A fused tensor of queries, keys and values keeps them in this order, whatever the units."""
    starts = [units * sum(sizes[:n]) for n in range(len(sizes))]
    ties = [Tie("w", 0, size, start) for size, start in zip(sizes, starts, strict=True)][::-1]
    values = [{"w": torch.arange(units * sum(sizes)) + 1000 * j} for j in range(blocks)]
    kept = [(j, i) for j in range(blocks) for i in range(units) if (i + j) % 2 == 0]
    want = [
        1000 * j + start + i * size + r
        for size, start in zip(sizes, starts, strict=True)
        for j, i in kept
        for r in range(size)
    ]
    if kept:
        assert joined(values, ties, kept)["w"].tolist() == want


def test_pruned_to_one_blocks_shape_it_is_a_plain_checkpoint(tmp_path: Path) -> None:
    lab, receipt = applied(tiny("llama"), 1, 2)
    assert form(lab.model, [receipt]) == "stock"
    assert receipt.after.kv_bytes == receipt.before.kv_bytes * 3 // 4
    save_checkpoint(lab.model, [receipt], None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(lab.model), rtol=1e-5, atol=1e-6)
    assert loaded.config.num_hidden_layers == 3


def test_all_blocks_twice_as_wide_are_a_plain_checkpoint_too(tmp_path: Path) -> None:
    model = tiny("llama")
    want = in_parallel("llama", model, [[0, 1], [2, 3]])
    lab, receipt = applied(model, 0, 1, 2, 3, width=2)
    assert form(lab.model, [receipt]) == "stock"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), want, rtol=1e-4, atol=2e-5)
    wide = loaded.config
    found = wide.num_hidden_layers, wide.num_attention_heads, wide.num_key_value_heads, wide.intermediate_size
    assert found == (2, 8, 4, 128)
    with torch.no_grad():
        made = loaded.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    assert made.shape == (1, IDS.shape[1] + 3)


def test_one_wide_block_among_others_needs_the_loader(tmp_path: Path) -> None:
    lab, receipt = applied(tiny("gpt2"), 1, 2, width=2)
    assert form(lab.model, [receipt]) == "shim"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(loaded), logits(lab.model), rtol=1e-5, atol=1e-6)


def test_widths_are_told_run_by_run() -> None:
    lab, _ = applied(tiny("llama"), 0, 1, 2, 3, width={"block.0": 1, "block.2": 1.5})
    widths = [layer.mlp.down_proj.in_features for layer in lab.model.model.layers]
    assert widths == [64, 96]
    assert [layer.self_attn.o_proj.in_features for layer in lab.model.model.layers] == [32, 48]


@pytest.mark.parametrize(
    ("name", "sites", "words"),
    [
        ("qwen3", ("block.1", "block.2"), "serves all units"),
        ("mixtral", ("block.1", "block.2"), "no attention or MLP"),
        ("gemma2", ("block.1", "block.2"), "no attention or MLP"),
        ("falcon", ("block.1", "block.2"), "no bias that could take the norm's"),
        ("llama", ("block.1", "block.3"), "no run of neighbours"),
        ("llama", ("block.2", "block.1"), "no run of neighbours"),
        ("llama", ("block.1",), "no runs of 2"),
        ("llama", ("block.1", "block.9"), "no such block"),
    ],
)
def test_what_can_not_stand_side_by_side_is_refused_in_one_line(name: str, sites: tuple[str, ...], words: str) -> None:
    lab = Lab(tiny(name), IDS)
    step = Step(rewrite="flatten", sites=sites)
    problems = REWRITES.make("flatten").check(step, lab.anatomy)
    assert any(words in p.what for p in problems), problems
    assert all("\n" not in p.what for p in problems)
    before = logits(lab.model)
    with pytest.raises(LaminaError):
        rewrite_of(step).apply(step, lab)
    assert torch.equal(logits(lab.model), before)


def test_blocks_that_compute_otherwise_are_told_apart() -> None:
    """GPT-2 may divide scores by the number of the layer: the same weights then do something else."""
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    step = Step(rewrite="flatten", sites=("block.1", "block.2"))
    problems = REWRITES.make("flatten").check(step, Lab(model, IDS).anatomy)
    assert problems[0].what == "it does not work as block.1 does"


def test_bad_options_are_refused() -> None:
    for options in ({"of": 1}, {"ridge": 0.0}):
        with pytest.raises(InputError):
            REWRITES.make("flatten", options)
    lab = Lab(tiny("llama"), IDS)
    for width in (0, 2.5):
        step = Step(rewrite="flatten", sites=("block.1", "block.2"), options={"width": width})
        assert "width" in REWRITES.make("flatten").check(step, lab.anatomy)[0].what
