"""FoldGPT (arXiv 2407.00928): gates learnt in plain loops, and what the blocks that share become."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES, REWRITES
from lamina.lab import Lab
from lamina.papers.depth.foldgpt import BETAS, START, Gates, batched, gated
from lamina.rewrites._adapt import adapt, distance, tails
from lamina.testing.bench import fresh
from lamina.testing.bench import lab as bench
from lamina.testing.models import own_text, padded, text, tiny


def loss_with(model: Any, ids: Tensor, gates: list[float]) -> float:
    """Mean next-token loss of a Llama, block by block: h + g (block(h) - h)."""
    body = model.model
    with torch.no_grad():
        h = body.embed_tokens(ids)
        places = torch.arange(ids.shape[1])[None]
        turns = body.rotary_emb(h, places)
        for layer, gate in zip(body.layers, gates, strict=True):
            out = layer(h, position_embeddings=turns, position_ids=places)
            out = out[0] if isinstance(out, tuple) else out
            h = h + gate * (out - h)
        logits = model.lm_head(body.norm(h)).double()
    log_p, total, count = logits.log_softmax(-1), 0.0, 0
    for row in range(len(ids)):
        for t in range(ids.shape[1] - 1):
            total -= float(log_p[row, t, ids[row, t + 1]])
            count += 1
    return total / count


def cost_of(model: Any, ids: Tensor, free: list[float], price: float, pull: float) -> float:
    gates = [1 / (1 + math.exp(-a)) for a in free]
    mean = sum(gates) / len(gates)
    return loss_with(model, ids, gates) + price * sum(pull * g - abs(g - mean) for g in gates)


def test_the_slope_is_that_of_finite_differences() -> None:
    model, ids = tiny("llama").double(), text(3, 9)
    method, free = Gates(price=0.3, pull=1.5), [1.0, -0.4, 0.3, 2.0]
    got = method.slope(Lab(model, ids, batch_size=2), torch.tensor(free, dtype=torch.float64, requires_grad=True))
    step = 3e-3  # norms compute in float32
    for n in range(4):
        up, down = ([*free[:n], free[n] + s, *free[n + 1 :]] for s in (step, -step))
        want = (cost_of(model, ids, up, 0.3, 1.5) - cost_of(model, ids, down, 0.3, 1.5)) / (2 * step)
        assert float(got[n]) == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_gates_are_adams_written_out() -> None:
    model, ids = tiny("llama").double(), text(2, 8)
    method = Gates(steps=4, price=0.2)
    free, first, second = [START] * 4, [0.0] * 4, [0.0] * 4
    for step in range(1, 5):
        given = torch.tensor(free, dtype=torch.float64, requires_grad=True)
        slope = method.slope(Lab(model, ids), given).tolist()
        for n in range(4):
            first[n] = BETAS[0] * first[n] + (1 - BETAS[0]) * slope[n]
            second[n] = BETAS[1] * second[n] + (1 - BETAS[1]) * slope[n] ** 2
            m, v = first[n] / (1 - BETAS[0] ** step), second[n] / (1 - BETAS[1] ** step)
            free[n] -= method.rate * m / (math.sqrt(v) + 1e-8)
    got = method.measure(Lab(model, ids))
    assert list(got.values) == [f"block.{n}" for n in range(4)]
    assert got.stderr == {}
    for n in range(4):
        assert got[f"block.{n}"] == pytest.approx(1 / (1 + math.exp(-free[n])), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "falcon"])
def test_open_gates_change_nothing_and_a_closed_one_is_an_absent_block(name: str) -> None:
    model, anatomy, ids = fresh(name)
    lab = Lab(model, ids, anatomy=anatomy)
    batch = lab.batches[0]
    with torch.no_grad():
        want = lab.forward(batch)
        with gated(lab, torch.ones(4)):
            assert torch.equal(lab.forward(batch), want)
        closed = torch.ones(4)
        closed[2] = 0
        with gated(lab, closed):
            got = lab.forward(batch)
        with lab.ablate(["block.2"]):
            torch.testing.assert_close(got, lab.forward(batch), rtol=1e-5, atol=1e-5)
        assert torch.equal(lab.forward(batch), want)


def test_gates_are_in_the_order_of_the_blocks_true_prices() -> None:
    lab = bench("llama", "block.2")
    got = MEASURES.make("foldgpt").measure(lab)
    true = {s: lab.loss([s]) for s in got.values}
    assert sorted(true, key=lambda s: got[s]) == sorted(true, key=lambda s: true[s])


def test_only_a_part_of_a_long_text_is_read() -> None:
    model = tiny("llama")
    lab = Lab(model, own_text(model, 12))
    got = MEASURES.make("foldgpt", {"sequences": 4, "length": 6, "steps": 3}).measure(lab)
    assert lab.counts.blocks == lab.counts.backwards == 3 * 4 * 6 * 4
    again = MEASURES.make("foldgpt", {"sequences": 99, "length": 6, "steps": 3}).measure(lab.part(4, 6))
    for site, value in got.values.items():
        np.testing.assert_allclose(value, again.values[site], rtol=1e-6)


def test_sequences_of_one_shape_come_together() -> None:
    ids = [text(1, n, seed=n)[0] for n in (9, 9, 5, 7)]
    lab = batched(Lab(tiny("llama"), [{"input_ids": r[None]} for r in ids]))
    assert [list(b["input_ids"].shape) for b in lab.batches] == [[2, 9], [1, 5], [1, 7]]
    long = batched(Lab(tiny("llama"), text(11, 5), batch_size=1))
    assert [len(b["input_ids"]) for b in long.batches] == [8, 3]


def test_the_recipe_drops_the_blocks_of_the_lowest_gates(rows: Any) -> None:
    lab = bench("llama", "block.2")
    steps = rows.plan("foldgpt", lab, Budget(keep=0.7))
    assert steps[0].sites == ("block.2",)
    assert all(s.rewrite == "drop" for s in steps)


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"sequences": 0}, {"length": 1}, {"rate": 0.0}, {"price": -1.0}],
)
def test_options_of_gates_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make("foldgpt", options)


def test_a_model_that_predicts_nothing_is_refused() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99)).eval()
    lab = Lab(model, text(2, 8))
    with pytest.raises(UnsupportedError, match="no next tokens"):
        MEASURES.make("foldgpt").measure(lab)
    with pytest.raises(UnsupportedError, match="no next tokens"):
        fold(lab, "block.0", "block.1")


def fold(lab: Lab, *sites: str, **options: Any) -> Any:
    return REWRITES.make("foldgpt", options).apply(Step(rewrite="foldgpt", sites=sites, options=options), lab)


FOUR = tuple(f"block.{n}" for n in range(4))


def test_without_steps_it_is_sharing_the_first_of_each_pair() -> None:
    ids = text(3, 9)
    lab, other = Lab(tiny("llama"), ids), Lab(tiny("llama"), ids)
    receipt = fold(lab, *FOUR, steps=0)
    plan = Step(rewrite="share", sites=FOUR)
    shared = REWRITES.make("share", {"by": "first", "group": 2}).apply(plan, other)
    assert receipt.after == shared.after
    with torch.no_grad():
        assert torch.equal(lab.model(ids).logits, other.model(ids).logits)
    ups = [layer.mlp.up_proj.weight.data_ptr() for layer in lab.model.model.layers]
    assert ups[0] == ups[1] != ups[2] == ups[3]


def test_training_moves_vectors_alone_and_lowers_the_loss() -> None:
    ids = own_text(tiny("gpt_neox"), 32)
    plain, lab = Lab(tiny("gpt_neox"), ids, batch_size=8), Lab(tiny("gpt_neox"), ids, batch_size=8)
    fold(plain, "block.1", "block.2", steps=0)
    receipt = fold(lab, "block.1", "block.2")
    before, after = plain.model.state_dict(), lab.model.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved
    assert all(before[k].ndim == 1 and (".layers.1." in k or ".layers.2." in k) for k in moved)
    assert {k.rsplit(".", 2)[-2] for k in moved} >= {"input_layernorm", "post_attention_layernorm", "dense"}
    assert lab.loss() < plain.loss()
    assert receipt.after == lab.anatomy.total()
    assert not any(p.grad is not None for p in lab.model.parameters())
    assert all(p.requires_grad for p in lab.model.parameters())


def test_the_loss_is_the_texts_and_the_last_streams() -> None:
    ids = text(2, 7)
    dense, thin = Lab(tiny("llama"), ids), Lab(tiny("llama", seed=1), ids)
    batch = {"input_ids": ids}
    wanted = tails(dense, batch, 2)

    def streams(model: Any) -> list[Tensor]:
        held: list[Tensor] = []
        handles = [
            model.model.layers[n].register_forward_hook(
                lambda _, __, out: held.append((out[0] if isinstance(out, tuple) else out).detach())
            )
            for n in (2, 3)
        ]
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        return [h.double().flatten(0, 1) for h in held]

    off = [
        float((h[t] - y[t]) @ (h[t] - y[t])) / float(y[t] @ y[t])
        for h, y in zip(streams(thin.model), streams(dense.model), strict=True)
        for t in range(14)
    ]
    want = loss_with(thin.model, ids, [1.0] * 4) + 0.7 * sum(off) / len(off)
    assert float(distance(thin, batch, wanted, 0.7).detach()) == pytest.approx(want, rel=1e-5)
    assert float(distance(dense, batch, wanted, 0.7).detach()) == pytest.approx(dense.loss(), rel=1e-6)


def test_padding_is_not_trained_on() -> None:
    ids = [text(1, n, seed=n)[0] for n in (9, 5)]
    (together,) = padded(ids, 2)
    lab = Lab(tiny("llama", seed=1), [together])
    apart = [{"input_ids": r[None]} for r in ids]
    other = Lab(tiny("llama"), [together])
    one = float(distance(lab, together, tails(other, together, 1), 0.0).detach())
    assert one == pytest.approx(lab.on(apart).loss(), rel=1e-5)
    assert len(tails(other, together, 1)[0]) == 14


def test_a_network_without_vectors_is_shared_alone() -> None:
    ids = text(2, 8)
    lab = Lab(tiny("llama"), ids)
    for layer in lab.model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            layer.get_submodule(name).weight = None
    wanted = [[torch.zeros(16, 32)]]
    assert adapt(lab, ["block.1"], wanted, steps=2, rate=0.1, weight=1.0) == []


def test_a_loss_that_is_no_number_is_told() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    wanted = [[torch.full((16, 32), math.inf)]]
    with pytest.raises(InputError, match="no number at step 1"):
        adapt(lab, ["block.1"], wanted, steps=2, rate=0.1, weight=1.0)


def test_bfloat16_vectors_are_trained_in_float32() -> None:
    ids = own_text(tiny("llama"), 16)
    lab = Lab(copy.deepcopy(tiny("llama")).to(torch.bfloat16), ids)
    before = lab.model.model.layers[1].input_layernorm.weight.clone()
    fold(lab, "block.1", "block.2", steps=8, rate=1e-2)
    norm: nn.Module = lab.model.model.layers[1].input_layernorm
    assert norm.weight.dtype == torch.bfloat16
    assert not torch.equal(norm.weight, before)


@pytest.mark.parametrize("options", [{"steps": -1}, {"tail": 0}, {"tail_weight": -1.0}, {"rate": 0.0}, {"group": 1}])
def test_options_of_the_rewrite_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        REWRITES.make("foldgpt", options)


def test_sublayers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no block"):
        fold(Lab(tiny("llama"), text(2, 8)), "block.1.mlp", "block.2.mlp")
