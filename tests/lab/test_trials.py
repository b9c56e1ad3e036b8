"""The sweep of trials against a plain loop of ablations: every architecture, every layout, half the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny_kinds
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

from lamina.anatomy import Anatomy
from lamina.core.sites import SUBLAYERS, Kind
from lamina.lab import Lab
from lamina.lab.objective import objective_of, output_of
from lamina.lab.trials import Trial
from lamina.testing.bench import expect_same, picture
from lamina.testing.models import padded, text, tiny

ALL = (Kind.BLOCK, *SUBLAYERS)


class Notes:
    def __init__(self, kinds: Sequence[Kind] = ALL) -> None:
        self.kinds = tuple(kinds)
        self.rises: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.last: dict[str, list[torch.Tensor]] = {}
        self.dense: dict[str, list[torch.Tensor]] = {}

    def add(self, site: Any, trial: Trial) -> None:
        rise, valid = trial.rise
        self.rises[site.id] = self.rises.get(site.id, 0) + rise.sum()
        self.counts[site.id] = self.counts.get(site.id, 0) + int(valid.sum())
        dense, thinned = trial.states(trial.blocks[-1])
        self.dense.setdefault(site.id, []).append(dense)
        self.last.setdefault(site.id, []).append(thinned)

    def scores(self) -> Any:
        return {s: float(r) / self.counts[s] for s, r in self.rises.items()}


@torch.no_grad()
def literal(lab: Lab) -> dict[str, float]:
    """Damage of each site by itself: a whole forward with it ablated, compared position by position."""
    dense = [lab.result(b) for b in lab.batches]
    objective = objective_of(lab.model, dense[0])
    found = {}
    for site in lab.anatomy.sites:
        total, count = 0.0, 0
        with lab.ablate([site.id]):
            for batch, before in zip(lab.batches, dense, strict=True):
                rise, valid = objective.rise(output_of(before), output_of(lab.result(batch)), batch)
                total, count = total + float(rise.sum()), count + int(valid.sum())
        found[site.id] = total / count
    return found


@pytest.mark.parametrize("variants", [1, 4096])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "phi", "falcon", "nanogpt"])
def test_a_trial_is_an_ablation(name: str, variants: int) -> None:
    lab = Lab(tiny(name), text(4, 10), batch_size=2)
    before = picture(lab.model)
    (found,) = lab.sweep([Notes()], variants=variants)
    expect_same(before, picture(lab.model), "the sweep")
    want = literal(lab)
    assert set(found) == set(want)
    for site, value in want.items():
        assert found[site] == pytest.approx(value, abs=1e-6), site


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
def test_padding_does_not_count(name: str, side: str) -> None:
    rows = [text(1, n, seed=n)[0] for n in (10, 4, 7, 9)]
    lab = Lab(tiny(name), padded(rows, 2, side=side))
    (found,) = lab.sweep([Notes()])
    alone = Lab(tiny(name), [{"input_ids": r[None]} for r in rows]).sweep([Notes()])[0]
    for site, value in literal(lab).items():
        assert found[site] == pytest.approx(value, abs=1e-6)
        assert found[site] == pytest.approx(alone[site], abs=1e-4)


def others(kind: str) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    if kind == "albert":
        config = AlbertConfig(
            vocab_size=99, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
        model, sample = AlbertForMaskedLM(config), {"input_ids": text(2, 9)}
    else:
        model, sample = getattr(tiny_kinds, kind)()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval(), [sample]


@pytest.mark.parametrize("kind", ["bert", "vit", "t5", "bart", "swin", "albert"])
def test_other_kinds_of_model(kind: str) -> None:
    """Encoders, vision towers, two stacks, stages, passes of one module: measured by what they give out."""
    model, batches = others(kind)
    lab = Lab(model, batches, anatomy=Anatomy.of(model, {k: v[:1] for k, v in batches[0].items()}))
    (found,) = lab.sweep([Notes()])
    want = literal(lab)
    assert set(found) == set(want)
    for site, value in want.items():
        assert found[site] == pytest.approx(value, abs=1e-6, rel=1e-5), site
    assert max(found.values()) > 1e-4


def test_the_objective_follows_the_model() -> None:
    def name(kind: str) -> str:
        model, (sample,) = others(kind)
        with torch.no_grad():
            return objective_of(model, model(**sample)).name

    assert [name(k) for k in ("bert", "vit", "t5")] == ["agreement", "output", "next-token"]
    with torch.no_grad():
        assert objective_of(tiny("llama"), tiny("llama")(text())).name == "next-token"


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_all_sublayers_of_thirty_blocks_cost_at_most_0_55_of_the_loop(name: str) -> None:
    """Also batched: rows of several trials count as often as they are run."""
    model = tiny(name, num_hidden_layers=30)
    for variants in (1, 4096):
        lab = Lab(model, text(2, 6))
        lab.sweep([Notes(tuple(SUBLAYERS))], variants=variants)
        naive = len(lab.anatomy.sublayers) * lab.depth * lab.tokens
        assert lab.counts.blocks <= 0.55 * naive
        assert lab.counts.heads <= (len(lab.anatomy.sublayers) + 1) * lab.tokens


def test_states_are_those_of_the_ablated_network() -> None:
    lab = Lab(tiny("llama"), text(3, 8))
    tally = Notes()
    lab.sweep([tally])
    held: list[torch.Tensor] = []
    last = lab.model.model.layers[3]
    handle = last.register_forward_hook(lambda *a: held.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
    for site in ("block.1.attention", "block.2.mlp", "block.0"):
        held.clear()
        with torch.no_grad():
            lab.model(text(3, 8))
            with lab.ablate([site]):
                lab.model(text(3, 8))
        dense, thinned = (h.reshape(-1, 32) for h in held)
        torch.testing.assert_close(tally.dense[site][0], dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tally.last[site][0], thinned, rtol=1e-5, atol=1e-5)
    handle.remove()


def test_a_tally_gets_its_kinds_alone_and_no_other_site_is_tried() -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    blocks, attentions = Notes([Kind.BLOCK]), Notes([Kind.ATTENTION])
    lab.sweep([blocks, attentions])
    assert set(blocks.rises) == {f"block.{n}" for n in range(4)}
    assert set(attentions.rises) == {f"block.{n}.attention" for n in range(4)}
    other = Lab(tiny("llama"), text(2, 6))
    other.sweep([Notes([Kind.BLOCK])])
    assert other.counts.blocks == other.tokens * (4 + 3 + 2 + 1)


def test_a_failing_tally_leaves_the_model_as_it_was() -> None:
    class Fails(Notes):
        def add(self, site: Any, trial: Trial) -> None:
            raise RuntimeError("no")

    lab = Lab(tiny("llama"), text(2, 6))
    before = picture(lab.model)
    with pytest.raises(RuntimeError, match="no"):
        lab.sweep([Fails()])
    expect_same(before, picture(lab.model), "a sweep that failed")
