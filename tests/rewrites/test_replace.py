"""Maps in the place of sublayers: weighted least squares by hand, planted maps, and what the cache then holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.core.documents import Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import REWRITES
from lamina.exporters.hf import save_checkpoint
from lamina.lab import Lab
from lamina.testing.models import padded, text, tiny


def run(lab: Lab, *sites: str, **options: Any) -> Any:
    return REWRITES.make("replace", options).apply(Step(rewrite="replace", sites=sites), lab)


@torch.no_grad()
def met(model: Any, path: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a module reads and gives [tokens, width], float64."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        read = args[0] if args else kwargs["hidden_states"]
        seen.append((read.flatten(0, -2).double(), (out[0] if isinstance(out, tuple) else out).flatten(0, -2).double()))

    handle = model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]


def test_the_map_is_weighted_ridge_regression() -> None:
    model, ids = tiny("llama"), text(6, 20)
    z, added = met(model, "model.layers.2.mlp", ids)
    norm_in, _ = met(model, "model.layers.2.post_attention_layernorm", ids)
    behind = norm_in + added
    lab = Lab(model, ids, batch_size=4)
    run(lab, "block.2.mlp", ridge=0.01)
    weight = 1 / behind.square().sum(1).sqrt()
    level = 0.01 * (z * weight[:, None]).square().sum(0).mean()
    rows = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1) * weight[:, None]
    rows = torch.cat([rows, torch.diag(torch.cat([level.sqrt().expand(32), torch.zeros(1, dtype=z.dtype)]))])
    right = torch.cat([added * weight[:, None], torch.zeros(33, 32, dtype=z.dtype)])
    want = torch.linalg.lstsq(rows, right).solution
    made: Any = lab.model.model.layers[2].mlp.map
    torch.testing.assert_close(
        made.weight.detach().double(), want[:-1].T, rtol=1e-2, atol=1e-3 * float(want.abs().max())
    )
    torch.testing.assert_close(made.bias.detach().double(), want[-1], rtol=1e-2, atol=1e-3 * float(want.abs().max()))


def test_a_linear_sublayer_is_replaced_without_loss_and_its_twin_by_a_constant() -> None:
    class Linear(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.big = nn.Linear(32, 200)
            self.out = nn.Linear(200, 32)
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.big(self.factor * x))

    ids = text(8, 20)
    for factor, by in ((1.0, "linear"), (0.0, "constant")):
        model = tiny("llama")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.model.layers[1].mlp = Linear(factor).eval()
        with torch.no_grad():
            want = model(ids).logits
            lab = Lab(model, ids)
            run(lab, "block.1.mlp", by=by, ridge=1e-9)
            torch.testing.assert_close(lab.model(ids).logits, want, rtol=1e-3, atol=1e-3)


def test_fits_in_depth_order_see_what_the_others_leave() -> None:
    ids = text(8, 24)
    sites = ("block.1.mlp", "block.2.mlp", "block.3.mlp")
    dense = tiny("llama")
    with torch.no_grad():
        want = dense(ids).logits
        together = Lab(tiny("llama"), ids)
        run(together, *sites)
        alone = Lab(tiny("llama"), ids)
        maps = {}
        for number, site in enumerate(sites, 1):
            lab = Lab(tiny("llama"), ids)
            run(lab, site)
            maps[number] = lab.model.model.layers[number].mlp.map.state_dict()
        run(alone, *sites)
        for number, state in maps.items():
            alone.model.model.layers[number].mlp.map.load_state_dict(state)
        off = [float((lab.model(ids).logits - want).square().mean()) for lab in (together, alone)]
    assert off[0] < off[1]
    first, second = (lab.model.model.layers[1].mlp.map.weight.detach() for lab in (together, alone))
    assert float((first - second).abs().max()) < 1e-5, "before the first map both networks are the dense one"


@pytest.mark.parametrize("by", ["linear", "low-rank", "constant"])
def test_attentions_and_padding(by: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (9, 5, 12)]
    lab = Lab(model, padded(rows, 3, side="left"))
    alone = Lab(tiny("llama"), [{"input_ids": r[None]} for r in rows])
    receipt = run(lab, "block.0.attention", "block.2.attention", "block.2.mlp", by=by, rank=5)
    run(alone, "block.0.attention", "block.2.attention", "block.2.mlp", by=by, rank=5)
    ids = text(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(lab.model(ids).logits, alone.model(ids).logits, rtol=2e-2, atol=2e-2)
    save_checkpoint(lab.model, [receipt], None, tmp_path / "m", name="tiny")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, lab.model(ids).logits)
        cache = again(ids, use_cache=True).past_key_values
    assert len(cache.layers) == 2, "an attention that is a map holds no cache entry"


def test_a_span_is_fitted_to_what_stands_behind_it() -> None:
    ids = text(8, 24)
    gap = ("block.2.attention", "block.2.mlp", "block.3")
    errors = []
    for around in ((), gap):
        lab = Lab(tiny("llama"), ids)
        with torch.no_grad():
            want = lab.model(ids).logits
            step = Step(rewrite="replace", sites=("block.1.mlp",), options={"around": around} if around else {})
            REWRITES.make("replace").apply(step, lab)
            REWRITES.make("drop").apply(Step(rewrite="drop", sites=("block.2", "block.3")), lab)
            errors.append(float((lab.model(ids).logits - want).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("sites", "options", "said"),
    [
        ((), {}, "names no site"),
        (("block.1",), {}, "no such sublayer"),
        (("block.1.mlp",), {"by": "low-rank", "rank": 16}, "saves nothing"),
        (tuple(f"block.{n}.attention" for n in range(4)), {}, "no attention would be left"),
    ],
)
def test_what_cannot_be_done_is_told(sites: tuple[str, ...], options: dict[str, Any], said: str) -> None:
    with pytest.raises(LaminaError, match=said):
        run(Lab(tiny("llama"), text(2, 8)), *sites, **options)


@pytest.mark.parametrize("options", [{"by": "x"}, {"rank": 0}, {"ridge": 0.0}], ids=["by", "rank", "ridge"])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        REWRITES.make("replace", options)
