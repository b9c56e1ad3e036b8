"""Factual recall (arXiv 2403.19521): path patching into the final residual, sender by sender, with hooks by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.lab.probes import noise_of
from lamina.papers.heads.factual_recall import ends
from lamina.testing.models import NanoGPT, padded, text, tiny

HEADS, SIZE = 4, 8


def modules(model: Any, name: str, number: int) -> tuple[nn.Module, Any, Any, nn.Module]:
    """The attention's last map, the module whose output its block adds, that of the MLP, and the last norm."""
    if name == "gpt2":
        layer = model.transformer.h[number]
        return layer.attn.c_proj, layer.attn.c_proj, layer.mlp, model.transformer.ln_f
    if name == "gpt_neox":
        layer = model.gpt_neox.layers[number]
        return layer.attention.dense, layer.attention.dense, layer.mlp, model.gpt_neox.final_layer_norm
    layer = model.model.layers[number]
    added = layer.post_attention_layernorm if name == "gemma2" else layer.self_attn.o_proj
    mlp = layer.post_feedforward_layernorm if name == "gemma2" else layer.mlp
    return layer.self_attn.o_proj, added, mlp, model.model.norm


class Seen:
    """One forward over one prompt: inputs and outputs of the modules above, at the last token, [layer]."""

    def __init__(self, model: Any, name: str, ids: Tensor) -> None:
        self.inner: list[Tensor] = []
        self.mlp: list[Tensor] = []
        handles = []

        def first(value: Any) -> Tensor:
            return value if isinstance(value, Tensor) else value[0]

        for number in range(4):
            last, _, mlp, norm = modules(model, name, number)
            handles.append(last.register_forward_pre_hook(lambda _, a: self.inner.append(a[0].view(-1, 32)[-1])))
            handles.append(mlp.register_forward_hook(lambda _, a, out: self.mlp.append(first(out).view(-1, 32)[-1])))
        handles.append(norm.register_forward_pre_hook(lambda _, a: setattr(self, "final", a[0][0, -1])))
        model(ids.unsqueeze(0), use_cache=False)
        for handle in handles:
            handle.remove()


def metric(model: Any, name: str, final: Tensor, answer: int) -> float:
    """Answer's logit minus mean logit."""
    logits = model.lm_head(modules(model, name, 0)[3](final[None, None]))[0, 0]
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if not cap else cap * torch.tanh(logits / cap)
    return float(logits[answer] - logits.double().mean())


def adds(model: Any, name: str, number: int, inner: Tensor) -> Tensor:
    """What the attention adds to the stream when this enters its last map."""
    last, added, _, _ = modules(model, name, number)
    made = last(inner[None, None])
    return (made if added is last else added(made))[0, 0]


@torch.no_grad()
def literal(model: Any, name: str, prompts: list[Tensor], corrupted: list[Tensor], answers: list[int]) -> np.ndarray:
    """Δ [prompts, layers, heads + 1]: every head, then the MLP; and the clean metric [prompts]."""
    clean, wrong = ([Seen(model, name, p) for p in rows] for rows in (prompts, corrupted))
    base = np.array([metric(model, name, c.final, a) for c, a in zip(clean, answers, strict=True)])
    change = np.zeros((len(prompts), 4, HEADS + 1))
    for row, (seen, answer) in enumerate(zip(clean, answers, strict=True)):
        for n in range(4):
            for head in range(HEADS):
                own = slice(head * SIZE, (head + 1) * SIZE)
                inner = seen.inner[n].clone()
                inner[own] = torch.stack([w.inner[n][own] for w in wrong]).mean(0)
                final = seen.final + adds(model, name, n, inner) - adds(model, name, n, seen.inner[n])
                change[row, n, head] = metric(model, name, final, answer) - base[row]
            mlp = torch.stack([w.mlp[n] for w in wrong]).mean(0) - seen.mlp[n]
            change[row, n, HEADS] = metric(model, name, seen.final + mlp, answer) - base[row]
    return np.concatenate([change.reshape(len(prompts), -1), base[:, None]], 1)


def shuffled(prompt: Tensor, seed: int = 0) -> Tensor:
    return prompt[torch.randperm(len(prompt), generator=noise_of(prompt.tolist(), "order", seed))]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_effects_are_those_of_path_patching(name: str) -> None:
    model, ids = tiny(name), text(5, 9)
    got = MEASURES.make("direct-effect").measure(Lab(model, ids, batch_size=2))
    prompts, answers = list(ids[:, :-1]), ids[:, -1].tolist()
    found = literal(model, name, prompts, [shuffled(p) for p in prompts], answers)
    change, base = found[:, :-1].reshape(5, 4, HEADS + 1), np.abs(found[:, -1])
    mlp = "moe" if name == "mixtral" else "mlp"
    for n in range(4):
        wanted = np.abs(change[:, n]).sum(0) / base.sum()
        site = f"block.{n}.attention.head"
        assert got.values[site] == pytest.approx(wanted[:HEADS], rel=1e-3, abs=1e-6)
        assert got.values[f"block.{n}.{mlp}"] == pytest.approx(wanted[HEADS:], rel=1e-3, abs=1e-6)
        signed = change[:, n].sum(0) / base.sum()
        assert got.grids["heads"].values[n] == pytest.approx(signed[:HEADS], rel=2e-3, abs=1e-6)
        assert got.grids["mlps"].values[n] == pytest.approx(signed[HEADS:], rel=2e-3, abs=1e-6)
        spread = np.abs(change[:, n, 0]) - wanted[0] * base
        assert got.stderr[site][0] == pytest.approx(np.sqrt((spread**2).sum() * 5 / 4) / base.sum(), rel=1e-2)


def test_padding_and_unequal_lengths() -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (9, 4, 9, 6)]
    got = MEASURES.make("direct-effect").measure(Lab(model, padded(rows, 2, side="left")))
    prompts, answers = [r[:-1] for r in rows], [int(r[-1]) for r in rows]
    found = literal(model, "llama", prompts, [shuffled(p) for p in prompts], answers)
    wanted = np.abs(found[:, :-1]).sum(0) / np.abs(found[:, -1]).sum()
    assert got.values["block.2.attention.head"] == pytest.approx(wanted.reshape(4, -1)[2, :HEADS], rel=1e-3)


def test_nothing_moves_where_the_corrupted_prompt_is_the_clean_one() -> None:
    lab = Lab(tiny("llama"), text(1, 8))
    prompt = lab.batches[0]["input_ids"][0, :-1]
    seen = ends(lab, [prompt])
    got = MEASURES.make("direct-effect").effects(lab, seen, ends(lab, [prompt]), torch.tensor([5]))
    assert all((v < 1e-6).all() for v in got.values.values())  # what rounding leaves
    assert all(np.isnan(e).all() for e in got.stderr.values())


@torch.no_grad()
def test_the_last_mlp_s_effect_is_what_a_forward_with_it_patched_shows() -> None:
    model, ids = tiny("llama"), text(3, 8)
    prompts, answers = list(ids[:, :-1]), ids[:, -1]
    got = MEASURES.make("direct-effect").measure(Lab(model, ids))
    last: Any = model.get_submodule("model.layers.3.mlp")
    mean = torch.stack([Seen(model, "llama", shuffled(p)).mlp[3] for p in prompts]).mean(0)

    def run(prompt: Tensor, answer: int, patch: bool) -> float:
        def put(_: Any, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[0, -1] = mean
            return out

        handle = last.register_forward_hook(put) if patch else None
        logits = model(prompt.unsqueeze(0)).logits[0, -1]
        if handle is not None:
            handle.remove()
        return float(logits[answer] - logits.mean())

    pairs = [(run(p, int(a), False), run(p, int(a), True)) for p, a in zip(prompts, answers, strict=True)]
    wanted = sum(abs(b - a) for a, b in pairs) / sum(abs(a) for a, _ in pairs)
    assert got["block.3.mlp"] == pytest.approx(wanted, rel=1e-4)


def test_what_is_seen_adds_up_to_the_final_residual() -> None:
    model, ids = tiny("gpt_neox"), text(2, 7)
    lab = Lab(model, ids)
    seen = ends(lab, list(ids))
    start = model.get_submodule("gpt_neox.embed_in")(ids[:, -1])
    torch.testing.assert_close(sum(seen.added.values(), start), seen.final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_what_heads_explain_of_an_mlp_is_a_least_squares_fit(name: str) -> None:
    model, ids = tiny(name), text(4, 8)
    got = MEASURES.make("direct-effect").measure(Lab(model, ids))
    seen = [Seen(model, name, p) for p in ids[:, :-1]]
    outputs, shares = [], {}
    with torch.no_grad():
        for n in range(4):
            last: Any = modules(model, name, n)[0]
            heads = []
            for head in range(HEADS):
                own = slice(head * SIZE, (head + 1) * SIZE)
                heads.append(torch.cat([last.weight[:, own] @ s.inner[n][own] for s in seen]).double())
            before = list(outputs)
            outputs += heads
            regressors = outputs if name == "llama" else before  # in parallel blocks the MLP does not see them
            goal = torch.cat([s.mlp[n] for s in seen]).double()
            if regressors:
                matrix = torch.stack(regressors, 1)
                alpha = torch.linalg.lstsq(matrix, goal).solution
                rest = goal - matrix @ alpha
                assert float((matrix.T @ rest).abs().max()) < 1e-9 * float(goal @ goal)  # at right angles
                shares[f"block.{n}.mlp"] = (1 - float(rest @ rest) / float(goal @ goal), alpha.numpy())
    grid, parts = got.grids["explained"], got.grids["coefficients"]
    assert grid.rows == parts.rows == tuple(shares)
    for row, (share, alpha) in enumerate(shares.values()):
        assert grid.values[row, 0] == pytest.approx(share, abs=1e-4)
        assert parts.values[row, : len(alpha)] == pytest.approx(alpha, abs=1e-3)
        assert np.isnan(parts.values[row, len(alpha) :]).all()


def test_models_without_heads_that_can_be_told_are_scored_by_their_mlps() -> None:
    got = MEASURES.make("direct-effect").measure(Lab(tiny("falcon_new"), text(3, 6)))
    assert set(got.values) == {f"block.{n}.mlp" for n in range(4)}
    assert "rows" in got.missing["block.0.attention.head"]


def test_models_that_no_library_knows() -> None:
    got = MEASURES.make("direct-effect").measure(Lab(NanoGPT().eval(), text(3, 6)))
    assert len(got.values) == 8


@pytest.mark.parametrize("options", [{"sequences": 0}, {"length": 1}])
def test_options(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make("direct-effect", options)


def test_sequences_too_short_for_a_prompt_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="3 tokens"):
        MEASURES.make("direct-effect").measure(Lab(tiny("llama"), text(2, 2)))
