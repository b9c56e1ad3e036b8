"""LoRA healing: it heals, leaves the structure alone, and goes on after a kill to the same weights."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lamina.anatomy import Anatomy
from lamina.core.documents import Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import HEALERS, cite
from lamina.evaluators.quality import tally
from lamina.healers import _lora_train as training
from lamina.healers._lora_adapters import adapted, adapter_of, targets
from lamina.healers.lora import Lora
from lamina.lab import Lab
from lamina.rewrites.drop import Drop
from lamina.testing.models import tiny

SITES = ("block.0.attention", "block.2")
SMALL = Lora(rank=4, lr=5e-3, batch=4)


class Killed(Exception):
    """Stands for a kill between two steps."""


def text() -> torch.Tensor:
    return torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(2))


def thinned(name: str = "llama", dtype: torch.dtype = torch.float32) -> Lab:
    model = tiny(name).to(dtype)
    lab = Lab(model, text())
    Drop().apply(Step(rewrite="drop", sites=SITES), lab)
    return lab


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def shape_of(model: nn.Module) -> Any:
    parameters = [(k, tuple(p.shape), p.dtype, p.requires_grad) for k, p in model.named_parameters()]
    return parameters, [(k, type(m)) for k, m in model.named_modules()], sorted(vars(model))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "falcon", "mixtral", "nanogpt"])
def test_it_heals_and_changes_nothing_but_what_it_says(name: str) -> None:
    dense = tiny(name)
    lab = thinned(name) if name != "nanogpt" else Lab(tiny(name), text())
    if name == "nanogpt":
        Drop().apply(Step(rewrite="drop", sites=("block.0.attention", "block.2.mlp")), lab)
    before, shape, teacher = copies(lab.model), shape_of(lab.model), copies(dense)
    hurt = tally(lab, dense).kl
    history = SMALL.heal(lab, teacher=dense, steps=25)
    healed = tally(lab, dense).kl
    assert hurt is not None
    assert healed is not None
    assert healed.sum() < 0.7 * hurt.sum()
    assert shape_of(lab.model) == shape
    assert changed(lab.model, before) == SMALL.touches(lab.anatomy)
    assert not changed(dense, teacher)
    assert not any(p.grad is not None for p in lab.model.parameters())
    assert history.steps == 25
    assert history.losses[-1] < history.losses[0]
    assert history.tokens == 25 * 4 * 16
    assert history.changed == len(SMALL.touches(lab.anatomy))
    Anatomy.of(lab.model).certify()


def test_the_output_head_is_no_target() -> None:
    lab = thinned()
    assert not any("head" in path or "embed" in path for path in targets(lab.anatomy))
    linears = [m for m in lab.model.modules() if isinstance(m, nn.Linear)]
    assert len(targets(lab.anatomy)) == len(linears) - 1


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone() -> None:
    found = []
    for seed in (0, 0, 1):
        lab = thinned()
        state = torch.random.get_rng_state()
        Lora(rank=4, batch=4, seed=seed).heal(lab, teacher=tiny("llama"), steps=3)
        assert torch.equal(state, torch.random.get_rng_state())
        found.append(copies(lab.model))
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
    assert any(not torch.equal(v, found[2][k]) for k, v in found[0].items())


@pytest.mark.parametrize("at", [1, 5, 7])
def test_a_killed_run_goes_on_to_the_same_weights(at: int, tmp_path: Path) -> None:
    whole = thinned()
    full = SMALL.heal(whole, teacher=tiny("llama"), steps=9)

    def kill(step: int, *_: Any) -> None:
        if step == at:
            raise Killed

    lab = thinned()
    before, shape = copies(lab.model), shape_of(lab.model)
    with pytest.raises(Killed):
        SMALL.heal(lab, teacher=tiny("llama"), steps=9, state_dir=tmp_path, every=2, watch=kill)
    assert not changed(lab.model, before)
    assert shape_of(lab.model) == shape
    again = thinned()
    history = SMALL.heal(again, teacher=tiny("llama"), steps=9, state_dir=tmp_path, every=2)
    assert history.resumed == at - at % 2
    assert history.losses == full.losses
    assert not changed(again.model, copies(whole.model))
    assert history.facts() == full.facts()
    assert [p.name for p in tmp_path.iterdir()] == [training.STATE]


def test_a_finished_run_is_only_merged(tmp_path: Path) -> None:
    whole, again = thinned(), thinned()
    SMALL.heal(whole, teacher=tiny("llama"), steps=4, state_dir=tmp_path)
    history = SMALL.heal(again, teacher=tiny("llama"), steps=4, state_dir=tmp_path)
    assert history.resumed == history.steps == 4
    assert not changed(again.model, copies(whole.model))


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    SMALL.heal(thinned(), teacher=tiny("llama"), steps=2, state_dir=tmp_path)
    for healer, steps in ((SMALL, 3), (Lora(rank=4, lr=1e-3, batch=4), 2)):
        with pytest.raises(InputError, match="belongs to another"):
            healer.heal(thinned(), teacher=tiny("llama"), steps=steps, state_dir=tmp_path)
    file = tmp_path / training.STATE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged state"):
        SMALL.heal(thinned(), teacher=tiny("llama"), steps=2, state_dir=tmp_path)


def test_sixteen_bits_are_trained_in_float32_and_rounded_once() -> None:
    lab = thinned(dtype=torch.bfloat16)
    before = copies(lab.model)
    kept: dict[str, torch.Tensor] = {}
    with adapted(lab.anatomy, rank=4, alpha=8.0, seed=0) as layers:
        for path, layer in layers.items():
            a, b = adapter_of(layer)
            assert a.dtype == b.dtype == torch.float32
            assert a.requires_grad
            torch.nn.init.normal_(b, std=0.1)
            kept[f"{path}.weight"] = 2.0 * (b @ a).detach()
        trainable = {id(p) for p in lab.model.parameters() if p.requires_grad}
        assert trainable == {id(p) for m in layers.values() for p in adapter_of(m)}
        training.merge(layers)
    for name, delta in kept.items():
        want = (before[name].float() + delta).to(torch.bfloat16)
        assert torch.equal(lab.model.state_dict()[name], want)


def test_the_loss_is_the_literal_one() -> None:
    lab, dense = thinned(), tiny("llama")
    ids = text()[:2]
    with torch.no_grad():
        p, q = dense(ids).logits.double(), lab.model(ids).logits.double()
    total = 0.0
    for row in range(2):
        for place in range(16):
            a, b = torch.log_softmax(p[row, place] / 2, -1), torch.log_softmax(q[row, place] / 2, -1)
            total += 4 * float((a.exp() * (a - b)).sum())
    nll = [-float(torch.log_softmax(q[r, t], -1)[ids[r, t + 1]]) for r in range(2) for t in range(15)]
    want = total / 32 + 0.5 * sum(nll) / 30
    got = training.objective(Lora(temperature=2.0, cross_entropy=0.5), lab, dense, {"input_ids": ids})
    assert float(got.detach()) == pytest.approx(want, rel=1e-5)
    alone = training.objective(Lora(), lab, None, {"input_ids": ids})
    assert float(alone.detach()) == pytest.approx(sum(nll) / 30, rel=1e-5)


def test_padding_does_not_count() -> None:
    lab, dense = thinned(), tiny("llama")
    rows = [{"input_ids": text()[:1]}, {"input_ids": text()[1:2, :5]}]
    batch = training.collate(rows)
    assert batch["attention_mask"].sum() == 21
    both = float(training.objective(Lora(), lab, dense, batch).detach())
    parts = [float(training.objective(Lora(), lab, dense, r).detach()) for r in rows]
    assert both == pytest.approx((16 * parts[0] + 5 * parts[1]) / 21, rel=1e-5)
    assert [r["input_ids"].shape[1] for r in training.split(Lab(lab.model, [batch]))] == [16, 5]


def test_every_epoch_shows_every_sequence_once() -> None:
    seen = [i for step in range(10) for i in training.picks(5, 3, step, seed=1)]
    assert all(sorted(seen[k : k + 5]) == list(range(5)) for k in range(0, 30, 5))
    assert seen != [i for step in range(10) for i in training.picks(5, 3, step, seed=2)]


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [training.schedule((k + 0.5) / 100, 0.1) for k in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert training.schedule(0.0, 0.0) == 1.0


def test_by_minutes_it_stops_in_time_and_shows_the_loss() -> None:
    lab, shown, bars = thinned(), [], []
    lab.progress = lambda *row: bars.append(row)
    history = SMALL.heal(lab, teacher=tiny("llama"), minutes=0.005, watch=lambda *row: shown.append(row))
    assert 0.3 <= history.seconds < 5
    assert [s[0] for s in shown] == list(range(1, history.steps + 1))
    assert [s[2] for s in shown] == list(history.losses)
    assert bars[-1] == ("heal", history.steps, history.steps)


def test_a_loss_that_is_no_number_leaves_the_model_as_it_was() -> None:
    lab, broken = thinned(), tiny("llama")
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)  # type: ignore[union-attr]
    before = copies(lab.model)
    with pytest.raises(InputError, match=r"no number at step 1.*lower lr"):
        SMALL.heal(lab, teacher=broken, steps=3)
    assert not changed(lab.model, before)


def test_layers_that_blocks_share_are_refused() -> None:
    model = tiny("llama")
    model.model.layers[2].mlp.up_proj = model.model.layers[1].mlp.up_proj  # type: ignore[union-attr,index]
    anatomy = Anatomy.of(tiny("llama"))
    shared = SimpleNamespace(model=model, stacks=anatomy.stacks)
    with pytest.raises(UnsupportedError, match="share"):
        targets(shared)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be positive"),
        ({"warmup": 1.0}, "share of the budget"),
        ({"ranks": 3}, "did you mean rank"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HEALERS.make("lora", options)


@pytest.mark.parametrize("budget", [{}, {"steps": 2, "minutes": 1.0}, {"steps": 0}])
def test_wrong_budgets_are_named(budget: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="healing takes"):
        SMALL.heal(thinned(), teacher=None, **budget)


def test_it_is_cited() -> None:
    assert cite("lora").arxiv == "2106.09685"
