"""Damage against a slow, literal version on a Llama that is written out, planted truth, and true ablations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Judge, Lab
from lamina.lab.probes import noise_of
from lamina.papers.sensitivity.damage import BOUNDS, FLOOR, KAPPA, REMAINS, Damage
from lamina.testing.measures import check_errors_are_over_sequences
from lamina.testing.models import own_text, padded, text, tiny
from lamina.testing.planted import silence

# ---------------------------------------------------------------- the oracle: one sequence at a time, loops all the way


def norm(x: Tensor, module: Any) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def turned(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions of [tokens, width of a head]."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x)).unsqueeze(1) / base ** (torch.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attention(layer: Any, x: Tensor) -> Tensor:
    h, mine = norm(x, layer.input_layernorm), layer.self_attn
    q, k, v = (p(h).unflatten(-1, (-1, mine.head_dim)) for p in (mine.q_proj, mine.k_proj, mine.v_proj))
    heads = []
    for i in range(q.shape[1]):
        group = i // (q.shape[1] // k.shape[1])
        logits = turned(q[:, i]) @ turned(k[:, group]).T / mine.head_dim**0.5
        logits = logits.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        heads.append(logits.softmax(-1) @ v[:, group])
    return mine.o_proj(torch.cat(heads, -1))


def mlp(layer: Any, x: Tensor) -> Tensor:
    h = norm(x, layer.post_attention_layernorm)
    return layer.mlp.down_proj(nn.functional.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))


def oracle(
    model: Any, rows: list[Tensor], kappa: float, probes: str, chunk: int, window: int, seed: int
) -> dict[str, float]:
    """The formula, sublayer by sublayer, sequence by sequence, window by window, token by token."""
    total: dict[str, float] = {}
    bends: dict[str, float] = {}
    predicted = sum(len(r) - 1 for r in rows)
    for ids in rows:
        x = model.model.embed_tokens(ids).detach().requires_grad_()
        entering, added, leaving, names = [], [], [], []
        for number, layer in enumerate(model.model.layers):
            at = x
            for name, branch in (("attention", attention), ("mlp", mlp)):
                f = branch(layer, x)
                entering, added = [*entering, x], [*added, f]
                x = x + f
                leaving, names = [*leaving, x], [*names, f"block.{number}.{name}"]
            entering, added, leaving = [*entering, at], [*added, x - at], [*leaving, x]
            names.append(f"block.{number}")
        p = model.lm_head(norm(x, model.model.norm))[:-1].softmax(-1)
        loss = -sum(p[t, ids[t + 1]].log() for t in range(len(ids) - 1))
        drawn = torch.randn(p.shape, generator=noise_of(ids.tolist(), "fisher", seed))
        q = p.detach()
        tilted = torch.stack([q[t].sqrt() * drawn[t] - q[t] * (q[t].sqrt() @ drawn[t]) for t in range(len(q))])
        noisy = (tilted * p.log()).sum()  # Σ tilted = 0: the normalisation of the softmax drops out
        g = torch.autograd.grad(loss, leaving, retain_graph=True)
        z = torch.autograd.grad(noisy, leaving)
        curving = {"loss": [g], "fisher": [z], "both": [g, z]}[probes]
        for i, name in enumerate(names):
            f, xs = added[i].detach(), entering[i].detach()
            slope = -sum(float(g[i][t] @ f[t]) for t in range(len(ids)))
            bend = 0.0
            for start in range(0, len(ids), window):
                inside = range(start, min(start + window, len(ids)))
                squares = []
                for c in curving:
                    pieces = [range(m, min(m + chunk, len(ids))) for m in inside[::chunk]]
                    squares.append(sum(sum(float(c[i][t] @ f[t]) for t in piece) ** 2 for piece in pieces))
                curvature = np.mean(squares) / (2 * len(inside))
                share = np.mean([float(f[t].norm() / xs[t].norm()) for t in inside])
                bend += len(inside) * share * curvature**0.5
            total[name] = total.get(name, 0.0) + (slope + kappa * bend) / predicted
            bends[name] = bends.get(name, 0.0) + kappa * bend / predicted
    return {name: max(value, FLOOR + REMAINS * bends[name]) for name, value in total.items()}


@pytest.mark.parametrize("probes", ["loss", "fisher", "both"])
@pytest.mark.parametrize(("chunk", "window", "lengths"), [(2, 4, (13, 9, 2, 12)), (8, 64, (20, 6)), (1, 1, (5,))])
def test_equals_the_literal_version(probes: str, chunk: int, window: int, lengths: tuple[int, ...]) -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in lengths]
    found = Damage(probes=probes, chunk=chunk, window=window, kappa=1.3, seed=7).measure(Lab(model, padded(rows, 3)))
    want = oracle(model, rows, 1.3, probes, chunk, window, 7)
    assert found.unit == "nats"
    assert set(found.values) == set(want)
    for site, value in want.items():
        assert found[site] == pytest.approx(value, rel=2e-4, abs=2e-6), site


# ---------------------------------------------------------------- planted truth, layouts, costs


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "olmo2", "granite", "mixtral", "nanogpt"])
def test_a_silenced_branch_scores_the_floor_and_nothing_else_does(name: str) -> None:
    model = tiny(name)
    lab = Lab(model, own_text(model))
    silent = lab.anatomy.sublayers[3].id
    silence(lab.anatomy, silent)
    scores = Damage().measure(lab)
    assert scores[silent] == FLOOR
    assert all(scores[s] > FLOOR for s in scores.values if s != silent)
    assert scores.ranked()[0] == silent


def test_gone_on_trial_counts_as_silent() -> None:
    model = tiny("llama")
    lab = Lab(model, own_text(model))
    with lab.ablate(["block.1.mlp", "block.3"]):
        scores = Damage().measure(lab)
    floors = {s for s in scores.values if scores[s] == FLOOR}
    assert floors == {"block.1.mlp", "block.3", "block.3.attention", "block.3.mlp"}


def same(a: Scores, b: Scores, relative: float = 1e-4) -> None:
    scale = max(float(v[0]) for v in b.values.values())
    for site in b.values:
        assert abs(a[site] - b[site]) <= relative * scale, site


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_padding_and_batches_do_not_count(name: str) -> None:
    model = tiny(name)
    rows = [text(1, n, seed=n)[0] for n in (17, 9, 12, 9, 14, 2)]
    alone = Damage(chunk=2, window=4).measure(Lab(model, [{"input_ids": r.unsqueeze(0)} for r in rows]))
    for side in ("left", "right"):
        same(Damage(chunk=2, window=4).measure(Lab(model, padded(rows, 4, side=side))), alone)


@pytest.mark.parametrize("sequences", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("probes", ["loss", "both"])
def test_takes_at_most_four_passes(sequences: int, probes: str) -> None:
    lab = Lab(tiny("llama"), text(sequences, 12))
    Damage(probes=probes).measure(lab)
    assert lab.counts.blocks + lab.counts.backwards <= 4 * lab.tokens * lab.depth
    given = Lab(lab.model, text(sequences, 12))
    Damage(probes=probes, kappa=1.0).measure(given)
    assert given.passes == (2 if probes == "loss" else 3)


def test_kappa_is_what_true_ablations_ask_for() -> None:
    """Where all sequences are one and the same, the fit is the median over the chosen sublayers of the exact ratio."""
    model = tiny("llama")
    ids = own_text(model, 1, 24).repeat(8, 1)
    lab = Lab(model, ids)
    tally = Damage().tallied(lab)
    rises = Judge(lab, "loss")
    late = [s.id for s in lab.anatomy.sublayers if s.block is not None and s.block >= 2]
    ratios = []
    for site in late:
        parts = tally.parts[site]
        ratios.append((rises.value([site]) * parts.count.sum() - parts.slope.sum()) / parts.bend.sum())
    want = np.clip(np.median(ratios), KAPPA["both"] / BOUNDS, KAPPA["both"] * BOUNDS)
    assert tally.settings[-1] == pytest.approx(want, rel=1e-3)


def test_short_texts_and_given_kappa_are_not_ablated() -> None:
    assert Damage().tallied(Lab(tiny("llama"), text(1, 12))).settings[-1] == KAPPA["both"]
    assert Damage(kappa=0.5).tallied(Lab(tiny("llama"), text(8, 12))).settings[-1] == 0.5


def test_tallies_of_parts_add_up() -> None:
    model, ids = tiny("llama"), text(6, 12)
    whole, first, second = (Damage(kappa=2.0).tallied(Lab(model, x)) for x in (ids, ids[:2], ids[2:]))
    same(first.merge(second).scores(), whole.scores(), 1e-6)
    for site, error in whole.scores().stderr.items():
        assert first.merge(second).scores().stderr[site] == pytest.approx(error, rel=1e-4)


def test_errors_are_over_sequences_where_kappa_is_given() -> None:
    check_errors_are_over_sequences(Damage(kappa=1.85))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": "all"}, "probes is one of loss, fisher, both, not 'all'"),
        ({"chunk": 0}, "window is a multiple of chunk"),
        ({"chunk": 7}, "window is a multiple of chunk"),
        ({"kappa": -1.0}, "kappa is at least 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"measure damage: {message}"):
        MEASURES.make("damage", options)


# ---------------------------------------------------------------- the real one


@pytest.mark.real
@pytest.mark.slow
def test_follows_true_ablations_of_a_real_model() -> None:
    """SmolLM2-135M in bfloat16, 8 × 256 tokens of the default prose: every fifth sublayer against its true ablation."""
    from scipy.stats import spearmanr

    from lamina.core.documents import Data
    from lamina.lab.load import load
    from lamina.lab.texts import prepare

    loaded = load("smollm2-135m", dtype="bfloat16")
    data = prepare(Data(sequences=8, length=256, heldout_sequences=1), loaded.tokenizer)
    lab = Lab(loaded.model, data.calibration)
    scores = Damage().measure(lab)
    assert lab.passes <= 4
    sites = [s.id for s in lab.anatomy.sublayers][::5]
    assert len(sites) == 12
    judge = Judge(lab, "loss", batch_size=8)
    true = np.array([judge.value([s]) for s in sites])
    predicted = np.array([scores[s] for s in sites])
    assert spearmanr(predicted, true).statistic > 0.85
    assert np.median(np.abs(predicted - true) / true) < 0.35
    ranked = scores.ranked()
    assert ranked.index("block.0.mlp") > len(ranked) - 6
