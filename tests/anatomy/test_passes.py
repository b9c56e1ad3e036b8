"""A model that runs one module again and again: each pass is a block, and to drop one is to make a pass fewer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_kinds import drop, text
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel

from lamina.anatomy import Anatomy
from lamina.anatomy.trial import ablated, silenced
from lamina.core.documents import Step
from lamina.core.errors import CertificateError, UnsupportedError
from lamina.core.sites import Kind
from lamina.evaluators.reload import contract
from lamina.exporters.hf import save_checkpoint
from lamina.lab import Lab
from lamina.lab.gradients import stream_gradients
from lamina.lab.judge import Judge
from lamina.lab.walk import Walk
from lamina.rewrites.drop import Drop
from lamina.testing._coverage_reference import expect_equal, handed_on, outputs

PASSES = 6


def albert(groups: int = 1) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=99,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=PASSES,
        num_hidden_groups=groups,
        attn_implementation="eager",
    )
    return AlbertModel(config).eval(), {"input_ids": text()}


def literal(model: Any, ids: Tensor, passes: Iterable[int], mute: tuple[int, str] | None = None) -> Tensor:
    """The encoder's output, group by group, without some passes; `mute`: a pass and which of its branches adds zero."""
    transformer = model.encoder
    stream = transformer.embedding_hidden_mapping_in(model.embeddings(ids))
    for number in passes:
        group = transformer.albert_layer_groups[number * len(transformer.albert_layer_groups) // PASSES]
        (layer,) = group.albert_layers
        silent = mute[1] if mute is not None and mute[0] == number else ""
        made = layer.attention(stream, None)[0]
        if silent == "attention":
            made = layer.attention.LayerNorm(stream)
        added = layer.ffn_output(layer.activation(layer.ffn(made)))
        stream = layer.full_layer_layer_norm(made if silent == "mlp" else made + added)
    return stream


def test_each_pass_is_a_block() -> None:
    model, sample = albert()
    anatomy = Anatomy.of(model, sample)
    (stack,) = anatomy.stacks
    assert stack.looped
    assert [(b.path, b.turn, b.turns) for b in stack.blocks] == [
        ("encoder.albert_layer_groups.0", n, PASSES) for n in range(PASSES)
    ]
    assert [x.site.kind for x in stack.blocks[-1].branches] == [Kind.ATTENTION, Kind.MLP]
    assert set(anatomy.certify().errors.values()) == {0.0}


def test_passes_take_time_and_no_space() -> None:
    model, sample = albert()
    anatomy = Anatomy.of(model, sample)
    costs = [anatomy.cost(b.site) for b in anatomy.stacks[0].blocks]
    assert {(c.parameters, c.bytes) for c in costs} == {(0, 0)}
    assert anatomy.total().parameters == sum(p.numel() for p in model.parameters())
    assert sum(c.macs for c in costs) < anatomy.total().macs < sum(c.macs for c in costs) + 16 * 24 + 16 * 16
    assert anatomy.ties(anatomy.site("block.2")) == ()
    inside = {n: site for n, site in anatomy.uncovered().items() if "albert_layer_groups" in n}
    assert set(inside.values()) == {"block.0"}
    assert len(inside) == len(list(model.encoder.albert_layer_groups.parameters()))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("gone", [0, 1, 3, 5])
def test_a_pass_left_out_on_trial(groups: int, gone: int) -> None:
    """Every time that the model runs, and twice in one trial."""
    model, sample = albert(groups)
    anatomy = Anatomy.of(model, sample)
    want = literal(model, sample["input_ids"], [n for n in range(PASSES) if n != gone])
    dense = model(**sample).last_hidden_state
    torch.testing.assert_close(dense, literal(model, sample["input_ids"], range(PASSES)))
    with ablated(model, anatomy, [f"block.{gone}"]):
        for _ in range(2):
            torch.testing.assert_close(model(**sample).last_hidden_state, want)
    assert torch.equal(model(**sample).last_hidden_state, dense)
    assert not torch.allclose(want, dense)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_branch_of_one_pass_on_trial(kind: str) -> None:
    model, sample = albert(2)
    anatomy = Anatomy.of(model, sample)
    with silenced(model, anatomy, f"block.4.{kind}"):
        got = model(**sample).last_hidden_state
        with ablated(model, anatomy, ["block.1"]):
            both = model(**sample).last_hidden_state
    torch.testing.assert_close(got, literal(model, sample["input_ids"], range(PASSES), (4, kind)))
    torch.testing.assert_close(both, literal(model, sample["input_ids"], [0, 2, 3, 4, 5], (4, kind)))


def test_a_forward_that_fails_half_way_leaves_the_count_right() -> None:
    model, sample = albert()
    anatomy = Anatomy.of(model, sample)
    want = literal(model, sample["input_ids"], [0, 1, 2, 4, 5])
    calls = iter(range(PASSES))

    def fails(*_: Any) -> None:
        if next(calls, 0) == 3:
            raise RuntimeError("half-way")

    with ablated(model, anatomy, ["block.3"]):
        handle = model.encoder.albert_layer_groups[0].register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="half-way"):
            model(**sample)
        handle.remove()
        torch.testing.assert_close(model(**sample).last_hidden_state, want)


def test_the_certificate_names_the_pass_that_is_off() -> None:
    model, sample = albert()
    anatomy = Anatomy.of(model, sample)
    calls = iter(range(PASSES))
    model.encoder.albert_layer_groups[0].register_forward_hook(lambda _, __, out: out * (2 if next(calls) == 4 else 1))
    with pytest.raises(CertificateError, match=r"^block\.4: "):
        anatomy.certify()


@pytest.mark.parametrize("site", ["block.0", "block.2", "block.5"])
def test_a_dropped_pass_is_a_pass_fewer(site: str) -> None:
    model, sample = albert()
    thin = copy.deepcopy(model)
    receipt = drop(thin, sample, site)
    assert thin.config.num_hidden_layers == PASSES - 1
    anatomy = Anatomy.of(model, sample)
    blocks = anatomy.stacks[0].blocks
    dense = outputs(model, sample)
    with handed_on(model, sample, [b.path for b in blocks], int(site[-1])):
        expect_equal(outputs(thin, sample), outputs(model, sample), dense)
    assert len(Anatomy.of(thin, sample).stacks[0].blocks) == PASSES - 1
    assert (receipt.after.parameters, receipt.after.bytes) == (receipt.before.parameters, receipt.before.bytes)
    assert receipt.before.macs - receipt.after.macs == anatomy.cost(site).macs > 0


def test_the_checkpoint_is_a_stock_one_that_makes_fewer_passes(tmp_path: Path) -> None:
    thin, sample = albert()
    receipt = drop(thin, sample, "block.2")
    save_checkpoint(thin, [receipt], None, tmp_path)
    assert contract(tmp_path, thin, sample)
    assert type(AlbertModel.from_pretrained(tmp_path)) is AlbertModel


def test_only_passes_that_the_config_can_say_may_go() -> None:
    """Of 5 passes over two groups, the first makes 3: a pass of the second can go, one of the first can't."""
    model, sample = albert(2)
    anatomy = Anatomy.of(model, sample)
    before = copy.deepcopy(model.config.to_dict())
    refused = Drop().check(Step(rewrite="drop", sites=("block.1",)), anatomy)
    assert [(p.where, p.what) for p in refused] == [
        ("encoder.albert_layer_groups", "no config can say that these passes remain")
    ]
    assert Drop().check(Step(rewrite="drop", sites=("block.4",)), anatomy) == []
    assert model.config.to_dict() == before
    drop(model, sample, "block.4")
    torch.testing.assert_close(model(**sample).last_hidden_state, literal(model, sample["input_ids"], range(5)))


def test_what_would_change_all_passes_is_refused() -> None:
    model, sample = albert()
    anatomy = Anatomy.of(model, sample)
    (problem,) = Drop().check(Step(rewrite="drop", sites=("block.1.mlp",)), anatomy)
    assert str(problem.error()) == "block.1.mlp: its weights serve 6 passes (drop the whole pass, block.1)"
    everything = tuple(f"block.{n}" for n in range(PASSES))
    assert "nothing would be left" in Drop().check(Step(rewrite="drop", sites=everything), anatomy)[0].what
    assert anatomy.units("block.1") == ()
    assert set(anatomy.refused_units("block.1").values()) == {"its weights serve 6 passes"}
    assert "passes of one module" in anatomy.refused_channels(anatomy.stacks[0])


class _Looped(nn.Module):
    """A user's own language model: one block three times, no config."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(31, 8)
        self.blocks = nn.ModuleList([_Residual()])
        self.head = nn.Linear(8, 31)

    def forward(self, input_ids: Tensor) -> Tensor:
        stream = self.embed(input_ids)
        for _ in range(3):
            stream = self.blocks[0](stream)
        return self.head(stream)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.down(self.up(self.norm(stream)).relu())


def test_a_loop_without_a_config_is_surveyed_and_not_dropped() -> None:
    model = _Looped()
    anatomy = Anatomy.of(model)
    assert [b.turn for b in anatomy.stacks[0].blocks] == [0, 1, 2]
    assert anatomy.certify().holds
    refused = Drop().check(Step(rewrite="drop", sites=("block.1",)), anatomy)
    assert [p.what for p in refused] == ["no config says how many passes its modules make"]


@pytest.mark.parametrize(
    "use", [Judge, Walk, lambda lab: stream_gradients(lab, [])], ids=["judge", "walk", "gradients"]
)
def test_what_takes_blocks_apart_refuses_passes(use: Any) -> None:
    lab = Lab(_Looped(), torch.arange(24).reshape(2, 12))
    with pytest.raises(UnsupportedError, match=r"^blocks: .* passes of one module \(whole passes can be dropped\)$"):
        use(lab)
