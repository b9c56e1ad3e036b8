"""Few sequences, and forwards that go on from a recorded pass, against whole forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.core.errors import UnsupportedError
from lamina.lab import Lab
from lamina.lab.resume import TOGETHER, Resumed, few
from lamina.testing.models import lively, padded, text, tiny


def ids_of(lab: Lab) -> list[list[int]]:
    return [row.tolist() for batch in lab.batches for row in batch["input_ids"]]


def test_few_takes_padding_off_and_sequences_of_one_length_together() -> None:
    rows = [text(1, n, seed=n)[0] for n in (9, 5, 9, 7, 5)]
    for side in ("left", "right"):
        part = few(Lab(tiny("llama"), padded(rows, 3, side=side)), None)
        assert sorted(ids_of(part)) == sorted(r.tolist() for r in rows)
        assert [len(b["input_ids"]) for b in part.batches] == [2, 2, 1]


def test_few_chooses_evenly_and_cuts() -> None:
    ids = text(8, 9)
    lab = Lab(tiny("llama"), ids, batch_size=3)
    part = few(lab, 4, 5)
    assert ids_of(part) == ids[::2, :5].tolist()
    assert part.counts is lab.counts
    assert ids_of(few(lab, 99)) == ids.tolist()


def test_few_bounds_its_batches() -> None:
    part = few(Lab(tiny("llama"), text(TOGETHER + 3, 4)), None)
    assert [len(b["input_ids"]) for b in part.batches] == [TOGETHER, 3]


def test_few_cuts_nothing_but_tokens() -> None:
    batch = {"input_ids": text(2, 9), "decoder_input_ids": text(2, 6)}
    import transformers

    from lamina.anatomy import Anatomy

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    model = lively(transformers.T5Model(transformers.T5Config(**sizes))).eval()
    part = few(Lab(model, [batch], anatomy=Anatomy.of(model, batch)), 1, 3)
    assert {k: tuple(v.shape) for k, v in part.batches[0].items()} == {"input_ids": (1, 9), "decoder_input_ids": (1, 6)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "nanogpt"])
def test_going_on_gives_the_dense_output_whatever_the_start(name: str) -> None:
    lab = Lab(tiny(name), text(3, 9))
    run = Resumed(lab, next(lab.rows()))
    assert run.order == ("block.0", "block.1", "block.2", "block.3")
    with torch.no_grad():
        for block in run.order:
            torch.testing.assert_close(run.forward(block), run.out)


def test_a_changed_weight_shows_from_its_block_on() -> None:
    model = tiny("llama")
    lab = Lab(model, text(3, 9))
    run = Resumed(lab, next(lab.rows()))
    weight: Any = model.get_submodule("model.layers.2.mlp.down_proj").weight
    with torch.no_grad():
        weight.mul_(0.5)
        wanted = lab.forward(lab.batches[0])
        torch.testing.assert_close(run.forward("block.2"), wanted)
        torch.testing.assert_close(run.forward("block.0"), wanted)
        torch.testing.assert_close(run.forward("block.3"), run.out)


def test_a_map_stands_in_for_a_block() -> None:
    model = tiny("gpt2")
    lab = Lab(model, text(3, 9))
    run = Resumed(lab, next(lab.rows()))
    layer: Any = model.get_submodule("transformer.h.1")
    handle = layer.register_forward_hook(lambda _, a, out: (2 * a[0], *out[1:]) if isinstance(out, tuple) else 2 * a[0])
    with torch.no_grad():
        wanted = lab.forward(lab.batches[0])
        handle.remove()
        torch.testing.assert_close(run.forward("block.1", {"block.1": lambda x: 2 * x}), wanted)


def test_gradients_flow_through_what_is_run() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    run = Resumed(lab, next(lab.rows()))
    shift = torch.zeros(32, requires_grad=True)
    loss = run.losses(run.forward("block.2", {"block.2": lambda x: x + shift}))[0].sum()
    (slope,) = torch.autograd.grad(loss, shift)
    with torch.no_grad():
        ways = [
            float(run.losses(run.forward("block.2", {"block.2": lambda x, s=s: x + s * slope}))[0].sum())
            for s in (1e-4, -1e-4)
        ]
    assert (ways[0] - ways[1]) / 2e-4 == pytest.approx(float(slope.square().sum()), rel=2e-2)


def test_what_is_run_is_counted() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    run = Resumed(lab, next(lab.rows()))
    assert lab.counts.blocks == 4 * lab.tokens
    run.forward("block.3")
    assert lab.counts.blocks == 5 * lab.tokens
    run.forward("block.1", {"block.1": lambda x: x})
    assert lab.counts.blocks == 7 * lab.tokens
    assert lab.counts.heads == 3 * lab.tokens


def test_passes_of_one_module_are_told_apart() -> None:
    import transformers

    sizes = {"hidden_size": 32, "embedding_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=3, vocab_size=99, max_position_embeddings=64)
    model = lively(transformers.AlbertForMaskedLM(config)).eval()
    lab = Lab(model, text(2, 8))
    run = Resumed(lab, next(lab.rows()))
    for block in run.order:
        with torch.no_grad(), lab.ablate([block]):
            wanted = lab.forward(lab.batches[0])
        with torch.no_grad():
            torch.testing.assert_close(run.forward(block, {block: lambda x: x}), wanted)
    with pytest.raises(UnsupportedError, match="predicts no next tokens"):
        run.losses(run.out)


def test_encoders_and_decoders_have_places_of_their_own() -> None:
    import transformers

    from lamina.anatomy import Anatomy

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    model = lively(transformers.T5Model(transformers.T5Config(**sizes))).eval()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"input_ids": text(2, 9), "attention_mask": mask, "decoder_input_ids": text(2, 5)}
    lab = Lab(model, [batch], anatomy=Anatomy.of(model, batch))
    run = Resumed(lab, next(lab.rows()))
    assert run.order == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    assert int(run.rows_at("encoder.block.0").mask.sum()) == 15
    assert int(run.rows_at("decoder.block.1").mask.sum()) == 10
    with torch.no_grad():
        torch.testing.assert_close(run.forward("decoder.block.0"), run.out)
        changed: Tensor = run.forward("encoder.block.1", {"encoder.block.1": lambda x: 0 * x})
    assert not torch.allclose(changed, run.out)
    assert run.leaving["decoder.block.1"].shape == (2, 5, 32)


def test_nothing_is_left_behind_after_an_error() -> None:
    model = tiny("llama")
    lab = Lab(model, text(3, 9))
    run = Resumed(lab, next(lab.rows()))

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run.forward("block.1", {"block.1": fail})
    assert all("forward" not in vars(m) for m in model.modules())
