"""SliceGPT by hand: folded gains, the moment of the streams token by token, turned and sliced weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.core.documents import Budget, Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import PLANNERS, REWRITES
from lamina.exporters.hf import form, save_checkpoint
from lamina.lab import Lab
from lamina.rewrites import _rotate
from lamina.testing.bench import expect_same, picture
from lamina.testing.models import text, tiny

WRITES = ("o_proj", "down_proj")


def sliced(width: int = 24) -> Step:
    return Step(rewrite="slicegpt", sites=("channel",), options={"width": {"channel": width}})


def orthogonal(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(32, 32, generator=draw, dtype=torch.float64))[0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("qwen3", {}), ("mixtral", {}), ("granite", {}), ("qwen2", {"tie_word_embeddings": True})],
)
@torch.no_grad()
def test_a_turned_network_is_the_dense_one(name: str, changes: dict[str, Any]) -> None:
    model, ids = tiny(name, **changes), text(3, 10)
    want = model(ids).logits
    lab = Lab(model, ids)
    held = _rotate.basis(lab.anatomy, lab.anatomy.stacks[0])
    _rotate.turn(model, held, orthogonal())
    off = (model(ids).logits - want).abs().max() / want.abs().max()
    assert off < 1e-4
    moved = model.get_input_embeddings().weight - tiny(name, **changes).get_input_embeddings().weight
    assert moved.abs().max() > 0.1


@torch.no_grad()
def literal(model: Any, ids: Tensor, width: int) -> Any:
    """The sliced network, from the dense one's tensors and formulas alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    inputs: list[Tensor] = []
    norms = [n for layer in model.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(model.model.norm)
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, 1)))
    model(ids)
    moment = torch.zeros(32, 32, dtype=torch.float64)
    for token in torch.cat(inputs).double():
        unit = token / token.square().mean().sqrt()
        moment += torch.outer(unit, unit)
    moment += 0.01 * moment.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(moment)
    q = vectors[:, values.argsort(descending=True)[:width]]
    gains = {"lm_head.weight": model.model.norm.weight}
    for n, layer in enumerate(model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            gains[f"model.layers.{n}.self_attn.{name}.weight"] = layer.input_layernorm.weight
        for name in ("gate_proj", "up_proj"):
            gains[f"model.layers.{n}.mlp.{name}.weight"] = layer.post_attention_layernorm.weight
    made = {}
    for key, value in model.state_dict().items():
        weight = value.double()
        if value.ndim == 1:
            made[key] = torch.full((width,), (32 / width) ** 0.5)
        elif key in gains:
            made[key] = (weight * gains[key].double()) @ q
        elif key.split(".")[-2] in WRITES:
            made[key] = q.T @ weight
        else:
            made[key] = weight @ q
    data = {**model.config.to_dict(), "hidden_size": width, "head_dim": 8}
    small: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**data)).eval()
    small.load_state_dict({k: v.float() for k, v in made.items()})
    return small


@torch.no_grad()
def test_what_is_sliced_is_what_the_formulas_say(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = text(4, 12)
    lab, want = Lab(tiny("llama"), ids, batch_size=3), literal(tiny("llama"), ids, 24)
    method = REWRITES.make("slicegpt")
    forecast = method.forecast(sliced(), lab.anatomy)
    receipt = method.apply(sliced(), lab)
    assert receipt.after == forecast == lab.anatomy.total()
    torch.testing.assert_close(lab.model(ids).logits, want(ids).logits, rtol=1e-3, atol=1e-4)
    assert form(lab.model, [receipt]) == "stock"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(again(ids).logits, lab.model(ids).logits)
    assert again.config.hidden_size == 24


@torch.no_grad()
def test_a_stream_that_fills_a_part_of_its_space_loses_nothing() -> None:
    model, ids = tiny("llama"), text(4, 12)
    plane = orthogonal(3)[:, :20].float()
    flat = plane @ plane.T
    for name, p in model.named_parameters():
        if name.split(".")[-2] in WRITES:
            p.copy_(flat @ p)
        elif "embed" in name:
            p.copy_(p @ flat)
    want = model(ids).logits
    for width, near in ((24, True), (20, True), (16, False)):
        lab = Lab(tiny("llama"), ids)
        lab.model.load_state_dict(model.state_dict())
        REWRITES.make("slicegpt").apply(sliced(width), lab)
        off = float((lab.model(ids).logits - want).abs().max() / want.abs().max())
        assert (off < 1e-3) is near, (width, off)


@torch.no_grad()
def test_the_axes_of_most_energy_stay_and_not_the_first_channels() -> None:
    ids = text(8, 16)
    want = tiny("llama")(ids).logits
    offs = {}
    for rewrite in ("slicegpt", "narrow"):
        lab = Lab(tiny("llama"), ids)
        step = Step(rewrite="narrow", sites=("channel",), options={"gone": {"channel": list(range(24, 32))}})
        REWRITES.make(rewrite).apply(sliced() if rewrite == "slicegpt" else step, lab)
        offs[rewrite] = float((lab.model(ids).logits - want).norm())
    assert offs["slicegpt"] < offs["narrow"]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_a_tied_head_gets_weights_of_its_own(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = text(3, 9)
    lab = Lab(tiny(name, tie_word_embeddings=True), ids)
    forecast = REWRITES.make("slicegpt").forecast(sliced(), lab.anatomy)
    receipt = REWRITES.make("slicegpt").apply(sliced(), lab)
    assert forecast == lab.anatomy.total()
    assert forecast.parameters == sum(p.numel() for p in lab.model.parameters())
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    torch.testing.assert_close(again(ids).logits, lab.model(ids).logits)
    assert not torch.equal(again.get_input_embeddings().weight, again.get_output_embeddings().weight)


@pytest.mark.parametrize(
    ("name", "said"),
    [("gemma2", "scales what its sublayer adds"), ("olmo2", "scales what its sublayer adds"), ("gpt2", "no RMSNorm")],
)
def test_streams_that_cannot_be_turned_are_refused(name: str, said: str) -> None:
    lab = Lab(tiny(name), text(2, 8))
    with pytest.raises(LaminaError, match=said):
        REWRITES.make("slicegpt").apply(sliced(), lab)
    with pytest.raises(InputError, match=said):
        PLANNERS.make("slicegpt").plan(None, Budget(keep=0.8), lab.anatomy)


@pytest.mark.parametrize("width", [0, 32, 40, "24"])
def test_widths_outside_of_the_stream_are_refused(width: Any) -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    with pytest.raises(LaminaError, match="a width lies between 1 and 31"):
        REWRITES.make("slicegpt").apply(sliced(width), lab)
    with pytest.raises(InputError, match="damping"):
        REWRITES.make("slicegpt", {"damping": -1})


def test_a_network_that_is_not_the_same_when_turned_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tiny("llama", tie_word_embeddings=True), text(2, 8))
    before = picture(lab.model)
    monkeypatch.setattr(_rotate, "NEAR", {torch.float32: -1.0})
    with pytest.raises(LaminaError, match="its output is off by"):
        REWRITES.make("slicegpt").apply(sliced(), lab)
    expect_same(before, picture(lab.model), "the refused rewrite")
    assert lab.model.get_input_embeddings().weight is lab.model.get_output_embeddings().weight


@pytest.mark.parametrize("tied", [False, True])
def test_the_planner_takes_the_largest_width_that_meets_the_budget(tied: bool) -> None:
    lab = Lab(tiny("llama", tie_word_embeddings=tied), text(2, 8))
    method, whole = REWRITES.make("slicegpt"), lab.anatomy.total().parameters
    for keep in (0.9, 0.7, 0.4):
        (step,) = PLANNERS.make("slicegpt", {"multiple": 4}).plan(None, Budget(keep=keep), lab.anatomy)
        width = step.options["width"]["channel"]
        fits = [
            w for w in range(4, 32, 4) if method.forecast(sliced(w), lab.anatomy).parameters <= keep * whole
        ]  # fmt: skip
        assert width == max(fits)
    with pytest.raises(InputError, match="takes no budget of"):
        PLANNERS.make("slicegpt").plan(None, Budget(metric="blocks", drop=1), lab.anatomy)
    with pytest.raises(InputError, match="can't be cut"):
        PLANNERS.make("slicegpt").plan(None, Budget(keep=0.8, protect=("block.0",)), lab.anatomy)
