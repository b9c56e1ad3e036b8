"""The removal of norms against fake norms written out, and the paper's way to say one with a LayerNorm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lamina.core.documents import Step
from lamina.core.errors import LaminaError
from lamina.core.registry import REWRITES, rewrite_of
from lamina.exporters.hf import form, save_checkpoint
from lamina.lab import Lab
from lamina.rewrites.lamina_layouts import Fixed
from lamina.testing.models import padded, text, tiny

IDS = text(4, 9)


class Fake(nn.Module):
    """y = (x - mean) / σ · g + b, by the card."""

    def __init__(self, norm: Any, sigma: float) -> None:
        super().__init__()
        self.norm, self.sigma = norm, sigma

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.norm, nn.LayerNorm):
            return x / self.sigma * self.norm.weight
        return (x - x.mean(-1, keepdim=True)) / self.sigma * self.norm.weight + self.norm.bias


def sigma_by_hand(model: Any, path: str) -> float:
    """One row, one position at a time; the first position is left out."""
    total, count = 0.0, 0
    for row in IDS:
        met: list[Tensor] = []
        module = model.get_submodule(path)
        handle = module.register_forward_pre_hook(lambda _, args, met=met: met.append(args[0]))
        logits(model, row.unsqueeze(0))
        handle.remove()
        for x in met[0][0, 1:]:
            centre = x.mean() if isinstance(module, nn.LayerNorm) else 0.0
            eps = module.eps if isinstance(module, nn.LayerNorm) else module.variance_epsilon
            total += float((((x - centre) ** 2).mean() + eps) ** 0.5)
            count += 1
    return total / count


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    out = model(ids)
    return getattr(out, "logits", out)


def applied(model: Any, *sites: str, **options: Any) -> tuple[Lab, Any]:
    lab = Lab(model, IDS, batch_size=3)
    step = Step(rewrite="no-norm", sites=sites, options=options)
    return lab, rewrite_of(step).apply(step, lab)


@pytest.mark.parametrize(
    ("name", "sites", "options", "paths"),
    [
        ("gpt2", ("block.1.mlp",), {}, ("transformer.h.1.ln_2",)),
        ("gpt2", ("block.2",), {"last": True}, ("transformer.h.2.ln_1", "transformer.h.2.ln_2", "transformer.ln_f")),
        ("phi", ("block.3",), {}, ("model.layers.3.input_layernorm",)),
        ("llama", ("block.0.attention",), {"last": True}, ("model.layers.0.input_layernorm", "model.norm")),
    ],
)
def test_norms_become_fake_norms(name: str, sites: tuple[str, ...], options: Any, paths: tuple[str, ...]) -> None:
    model, other = tiny(name), tiny(name)
    sigmas = {path: sigma_by_hand(other, path) for path in paths}
    dense = logits(other)
    for path, sigma in sigmas.items():
        other.set_submodule(path, Fake(other.get_submodule(path), sigma))
    want = logits(other)
    assert float((want - dense).abs().max()) > 1e-3
    lab, receipt = applied(model, *sites, **options)
    assert {p for p, m in lab.model.named_modules() if isinstance(m, Fixed)} == set(paths)
    torch.testing.assert_close(logits(lab.model), want, rtol=1e-4, atol=2e-5)
    assert receipt.before == receipt.after == lab.anatomy.total()


@settings(max_examples=20, deadline=None)
@given(width=st.integers(2, 20), sigma=st.floats(0.1, 30), seed=st.integers(0, 99))
def test_tokens_of_that_spread_see_the_norm_itself(width: int, sigma: float, seed: int) -> None:
    """With σ the token's own spread, a fake norm is the norm; so is a LayerNorm with eps 1e12 and gain 1e6 g / σ."""
    draw = torch.Generator().manual_seed(seed)
    norm = nn.LayerNorm(width, eps=1e-12).double()
    nn.init.normal_(norm.weight, generator=draw)
    nn.init.normal_(norm.bias, generator=draw)
    x = torch.randn(5, width, generator=draw, dtype=torch.float64)
    x = (x - x.mean(-1, keepdim=True)) / x.var(-1, keepdim=True, correction=0).sqrt() * sigma + 3
    fixed = Fixed(width, centred=True, bias=True).double()
    huge = nn.LayerNorm(width, eps=1e12).double()
    with torch.no_grad():
        fixed.weight.copy_(norm.weight / sigma)
        fixed.bias.copy_(norm.bias)
        huge.weight.copy_(norm.weight / sigma * 1e6)
        huge.bias.copy_(norm.bias)
    torch.testing.assert_close(fixed(x), norm(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(huge(x), fixed(x), rtol=1e-4, atol=1e-4)


def test_what_is_left_is_affine() -> None:
    """The logits are affine in the stream once the last norm is gone: contributions add up."""
    lab, _ = applied(tiny("nanogpt"), "block.3", last=True)
    model: Any = lab.model
    draw = torch.Generator().manual_seed(0)
    one, other, zero = torch.randn(32, generator=draw), torch.randn(32, generator=draw), torch.zeros(32)

    def end(x: Tensor) -> Tensor:
        return model.head(model.norm(x))

    with torch.no_grad():
        torch.testing.assert_close(end(one + other) - end(zero), end(one) + end(other) - 2 * end(zero))
        dense = tiny("nanogpt")
        bent = dense.head(dense.norm(one + other)) - dense.head(dense.norm(one)) - dense.head(dense.norm(other))
    assert float(bent.abs().max()) > 0.1, "a norm is not affine"


def test_without_a_mean_what_is_left_is_a_factor() -> None:
    """On the stream of an RMSNorm network nothing is centred, so that each channel has a factor and that is all."""
    lab = Lab(tiny("gpt2"), IDS)
    step = Step(rewrite="rms-norm", sites=tuple(f"block.{n}" for n in range(4)))
    rewrite_of(step).apply(step, lab)
    step = Step(rewrite="no-norm", sites=("block.1", "block.2"))
    rewrite_of(step).apply(step, lab)
    fixed = [m for m in lab.model.modules() if isinstance(m, Fixed)]
    assert len(fixed) == 4
    assert not any(m.centred for m in fixed)


def test_padding_and_first_tokens_do_not_count() -> None:
    rows = [r[:n] for r, n in zip(IDS, (9, 5, 7, 3), strict=True)]
    step = Step(rewrite="no-norm", sites=("block.1",))
    found = []
    for batches in (padded(rows, 4), padded(rows, 1)):
        lab = Lab(tiny("gpt2"), batches)
        rewrite_of(step).apply(step, lab)
        found.append(lab.model.transformer.h[1].ln_1.weight)
    torch.testing.assert_close(*found)
    with pytest.raises(LaminaError, match="no token"):
        rewrite_of(step).apply(step, Lab(tiny("gpt2"), padded([r[:1] for r in rows], 4)))


def test_a_checkpoint_without_norms_loads(tmp_path: Path) -> None:
    lab, receipt = applied(tiny("gpt2"), "block.1", "block.2.mlp", last=True)
    assert form(lab.model, [receipt]) == "shim"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(loaded), logits(lab.model), rtol=1e-5, atol=1e-6)


def test_a_norm_that_two_sublayers_share_is_the_blocks() -> None:
    lab = Lab(tiny("phi"), IDS)
    method = REWRITES.make("no-norm")
    problems = method.check(Step(rewrite="no-norm", sites=("block.1.mlp",)), lab.anatomy)
    assert "serves it alone" in problems[0].what
    assert method.check(Step(rewrite="no-norm", sites=("block.1",)), lab.anatomy) == []
    assert "no such site" in method.check(Step(rewrite="no-norm", sites=("norm.1",)), lab.anatomy)[0].what
