"""LayerBoost (arXiv 2604.22050): linear attention number by number, the fit of the output map, and who gets what."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import MEASURES, PLANNERS, REWRITES, row
from lamina.core.scores import Scores
from lamina.exporters.hf import save_checkpoint
from lamina.lab import Lab
from lamina.papers.heads.layerboost import _fit
from lamina.rewrites.attention import core_of
from lamina.rewrites.lamina_attention import FEATURES, ROWS, by_features, by_states, in_turn
from lamina.testing.models import padded, text, tiny

CLOSE = {"rtol": 1e-4, "atol": 3e-5}
ATTENTIONS = tuple(f"block.{n}.attention" for n in range(4))


def phi(x: float, kind: str) -> float:
    if kind == "relu":
        return max(x, 0.0)
    return x + 1 if x > 0 else math.exp(x)


def literal(q: Tensor, k: Tensor, v: Tensor, sees: Callable[[int, int, int], bool], kind: str, scale: float) -> Tensor:
    """o_t = Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s) over the s that t of a row sees; [batch, tokens, heads, size]."""
    (rows, heads, tokens, _), count, share = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    out = torch.zeros(rows, tokens, heads, v.shape[-1], dtype=torch.float64)
    root = scale**0.5
    fq, fk = ([[[[phi(x * root, kind) for x in t] for t in h] for h in b] for b in x.tolist()] for x in (q, k))
    for b in range(rows):
        for h in range(heads):
            for t in range(tokens):
                under = 0.0
                for s in range(count):
                    if sees(b, t, s):
                        weight = sum(x * y for x, y in zip(fq[b][h][t], fk[b][h // share][s], strict=True))
                        under += weight
                        out[b, t, h] += weight * v[b, h // share, s].double()
                out[b, t, h] /= under or 1.0
    return out.float()


def drawn(tokens: int, seed: int = 0, rows: int = 2, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, 4, tokens, 6), (rows, groups, tokens, 6), (rows, groups, tokens, 5))
    q, k, v = (torch.randn(s, generator=generator) for s in shapes)
    return q, k, v


@pytest.mark.parametrize("kind", list(FEATURES))
@given(tokens=st.integers(1, 9), seed=st.integers(0, 99), groups=st.sampled_from([1, 2, 4]))
@settings(max_examples=12, deadline=None)
def test_both_forms_are_the_sum_over_the_past(kind: str, tokens: int, seed: int, groups: int) -> None:
    q, k, v = drawn(tokens, seed, groups=groups)
    want = literal(q, k, v, lambda _, t, s: s <= t, kind, 0.3)
    causal = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    torch.testing.assert_close(by_features(q, k, v, causal, FEATURES[kind], 0.3), want, **CLOSE)
    torch.testing.assert_close(by_states(q, k, v, FEATURES[kind], 0.3), want, **CLOSE)


@pytest.mark.parametrize("tokens", [ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 20])
def test_running_sums_are_the_direct_sums(tokens: int) -> None:
    q, k, v = drawn(tokens, 3)
    causal = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    for feature in FEATURES.values():
        direct = by_features(q, k, v, causal, feature, 0.4)
        torch.testing.assert_close(by_states(q, k, v, feature, 0.4), direct, **CLOSE)


@pytest.mark.parametrize("window", [1, 3, 12, 40])
def test_a_window_is_the_direct_sum_and_a_long_one_is_all(window: int) -> None:
    q, k, v = drawn(12, 5)
    core = lambda *args: (by_features(*args, FEATURES["elu"], 0.3), None)  # noqa: E731
    got, _ = in_turn(core, q, k, v, None, window, 0)
    torch.testing.assert_close(got, literal(q, k, v, lambda _, t, s: 0 <= t - s < window, "elu", 0.3), **CLOSE)
    if window >= 12:
        torch.testing.assert_close(got, by_states(q, k, v, FEATURES["elu"], 0.3), **CLOSE)


def linear(model: nn.Module, sites: tuple[str, ...] = ATTENTIONS, ids: Tensor | None = None, **options: Any) -> Any:
    """The model with linear attentions, by the rewrite; the same model."""
    lab = Lab(model, text(4, 12) if ids is None else ids)
    REWRITES.make("linear-attention").apply(Step(rewrite="linear-attention", sites=sites, options=options), lab)
    return lab.model


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, use_cache=False, **inputs).logits


NAMES = ("llama", "gpt2", "gpt_neox", "phi", "qwen3")


@pytest.mark.parametrize(("name", "kind"), [*((n, k) for n in NAMES for k in ("sdpa", "eager")), ("gemma2", "eager")])
def test_a_model_attends_behind_its_rotary_embedding(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, seen = text(2, 9), {ATTENTIONS[1]: 0, ATTENTIONS[2]: 4}
    dense: Any = tiny(name, attn_implementation="eager")
    anatomy = Lab(dense, ids).anatomy
    cores = {id(core_of(anatomy, s)[1]): w for s, w in seen.items()}
    home = importlib.import_module(type(core_of(anatomy, ATTENTIONS[0])[1]).__module__)
    stock = home.eager_attention_forward

    def mine(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Any:
        if id(module) not in cores:
            return stock(module, q, k, v, mask, **options)
        window = cores[id(module)] or 99
        scale = options.get("scaling") or q.shape[-1] ** -0.5

        def sees(row: int, t: int, s: int) -> bool:
            return bool(mask[min(row, len(mask) - 1), 0, t, s] == 0) and t - s < window

        return literal(q, k, v, sees, "elu", scale), None

    monkeypatch.setattr(home, "eager_attention_forward", mine)
    want = logits(dense, ids)
    monkeypatch.undo()
    model = linear(tiny(name, attn_implementation=kind), tuple(seen), window=seen, ridge=0)
    torch.testing.assert_close(logits(model, ids), want, **CLOSE)
    assert (logits(tiny(name), ids) - want).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 5])
def test_long_padded_and_cached_texts_agree(window: int) -> None:
    model = linear(tiny("llama"), window=window)
    rows = [text(1, n, seed=n)[0] for n in (2 * ROWS + 9, 30, ROWS)]
    (batch,) = padded(rows, 3, side="left")
    together = logits(model, batch.pop("input_ids"), **batch)
    for n, one in enumerate(rows):
        alone = logits(model, one[None])[0]
        torch.testing.assert_close(together[n, -len(one) :], alone, rtol=1e-3, atol=1e-4)
        past = model(one[None, : len(one) // 2], use_cache=True).past_key_values
        rest = model(one[None, len(one) // 2 :], past_key_values=past, use_cache=True).logits
        torch.testing.assert_close(rest[0], alone[len(one) // 2 :], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def entering(model: Any, module: nn.Module, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten(0, -2)))
    model(ids, use_cache=False)
    handle.remove()
    return torch.cat(seen).double()


@torch.no_grad()
def test_output_maps_are_fitted_in_turn_on_the_stream_as_it_is() -> None:
    ids, ridge = text(6, 16), 0.05
    model, hand = linear(tiny("llama"), ATTENTIONS[1:3], ids, ridge=ridge), tiny("llama")
    lab: Any = Lab(hand, ids)
    for n in (1, 2):
        module: Any = hand.model.layers[n].self_attn.o_proj  # type: ignore[union-attr,index]
        z = entering(hand, module, ids)
        step = Step(rewrite="linear-attention", sites=ATTENTIONS[n : n + 1], options={"ridge": 0})
        REWRITES.make("linear-attention").apply(step, lab)
        u = entering(hand, module, ids)
        weight = module.weight.double()
        root = (ridge * (u.T @ u).diagonal().mean()) ** 0.5 * torch.eye(u.shape[1], dtype=torch.float64)
        wanted = torch.linalg.lstsq(torch.cat([u, root]), torch.cat([z @ weight.T, root @ weight.T])).solution.T
        made = model.model.layers[n].self_attn.o_proj.weight
        torch.testing.assert_close(made.double(), wanted, rtol=1e-3, atol=1e-4)
        assert (made - weight).abs().max() > 1e-2
        module.weight.copy_(made)
    torch.testing.assert_close(logits(model, ids), logits(hand, ids), **CLOSE)


@torch.no_grad()
def test_a_fitted_map_loses_less() -> None:
    ids, dense = text(24, 24), tiny("llama")
    other, want = text(8, 24, seed=9), logits(dense, text(8, 24, seed=9))
    off = {
        ridge: float((logits(linear(tiny("llama"), ATTENTIONS[:1], ids, ridge=ridge), other) - want).square().mean())
        for ridge in (0, 0.01)
    }
    assert off[0.01] < 0.97 * off[0]


def test_what_enters_as_before_leaves_the_map_alone() -> None:
    module, x = nn.Linear(8, 5), [torch.randn(20, 8), torch.randn(7, 8)]
    before = module.weight.detach().clone()
    _fit(module, x, x, 0.1)
    torch.testing.assert_close(module.weight.detach(), before, rtol=1e-5, atol=1e-6)


def test_the_checkpoint_has_the_linear_attention(tmp_path: Path) -> None:
    lab, ids = Lab(tiny("qwen3"), text(2, 12)), text(2, 20)
    step = Step(rewrite="linear-attention", sites=ATTENTIONS[1:], options={"feature": "relu", "window": 7})
    receipt = REWRITES.make("linear-attention").apply(step, lab)
    assert receipt.after == lab.anatomy.total()
    save_checkpoint(lab.model, [receipt], None, tmp_path / "layerboost")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "layerboost", trust_remote_code=True)
    torch.testing.assert_close(logits(again, ids), logits(lab.model, ids), **CLOSE)
    (said,) = REWRITES.method("linear-attention").remarks(receipt)
    assert "3 attentions" in said
    assert "no memory is saved" in said


@pytest.mark.parametrize(
    ("name", "sites", "options", "said"),
    [
        ("llama", ATTENTIONS[:1], {"feature": "exp"}, "feature is one of"),
        ("llama", ATTENTIONS[:1], {"ridge": -1.0}, "ridge is not below 0"),
        ("llama", ATTENTIONS[:1], {"window": -1}, "whole number of tokens from 0"),
        ("llama", ATTENTIONS[:1], {"sinks": 2}, "no option 'sinks'"),
        ("llama", ("block.0.mlp",), {}, "no attention"),
        ("falcon", ATTENTIONS[:1], {}, "not looked up"),
    ],
)
def test_what_cannot_be_done_is_told(name: str, sites: tuple[str, ...], options: dict[str, Any], said: str) -> None:
    lab = Lab(tiny(name), text(2, 8))
    before = {k: v.clone() for k, v in lab.model.state_dict().items()}
    step = Step(rewrite="linear-attention", sites=sites, options=options)
    with pytest.raises(LaminaError, match=said):
        REWRITES.make("linear-attention").apply(step, lab)
    assert all(torch.equal(v, before[k]) for k, v in lab.model.state_dict().items())


def planned(lab: Lab, budget: Budget, **options: Any) -> tuple[Step, ...]:
    values = dict(zip(ATTENTIONS, (0.4, 0.1, 0.3, 0.2), strict=True))
    scores = Scores(measure="leave-one-out", values={s: np.array([v]) for s, v in values.items()})
    return PLANNERS.make("layerboost", options).plan(scores, budget, lab.anatomy)


def test_the_least_go_the_next_become_linear_the_rest_stay() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    steps = planned(lab, Budget(metric="sublayers", drop=1), linear=0.5, window=16)
    assert [(s.rewrite, s.sites) for s in steps] == [
        ("drop", ("block.1.attention",)),
        ("linear-attention", ("block.2.attention", "block.3.attention")),
    ]
    assert steps[1].options == {"window": 16}
    assert steps[1].why == {"leave-one-out": 0.3}
    for step in reversed(steps):
        REWRITES.make(step.rewrite).apply(step, lab)
    assert torch.isfinite(logits(lab.model, text(2, 8))).all()


def test_shares_protection_and_nothing_to_do() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    one = Budget(metric="sublayers", drop=1)
    assert [s.rewrite for s in planned(lab, one)] == ["drop"]
    assert planned(lab, Budget(metric="sublayers", drop=0), linear=1.0) == ()
    everything = planned(lab, one, linear=1.0, window=0)
    assert everything[-1].sites == tuple(ATTENTIONS[n] for n in (0, 2, 3))
    assert everything[-1].options == {}
    kept = Budget(metric="sublayers", drop=1, protect=("block.1", "block.3.attention"))
    assert [s.sites for s in planned(lab, kept, linear=1.0)] == [ATTENTIONS[2:3], ATTENTIONS[:1]]
    none = [s.rewrite for s in planned(Lab(tiny("falcon"), text(2, 8)), one, linear=1.0)]
    assert none == ["drop"], "no attention of this model takes another function"


def test_the_recipe_ranks_attentions_by_the_loss_without_them() -> None:
    lab, entry = Lab(tiny("llama"), text(4, 12)), row("layerboost")
    scores = MEASURES.make(entry.measure).measure(lab)
    planner = PLANNERS.make(entry.planner, {**entry.planner_options, "kinds": entry.kinds})
    dropped, changed = planner.plan(scores, Budget(metric="sublayers", drop=1), lab.anatomy)
    order = sorted(ATTENTIONS, key=lambda s: float(scores[s]))
    assert dropped.sites == (order[0],)
    assert set(changed.sites) == set(order[1:3])


@pytest.mark.parametrize(("options", "said"), [({"linear": 1.5}, r"linear lies in"), ({"window": -1}, "not below 0")])
def test_bad_planners(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        PLANNERS.make("layerboost", options)
