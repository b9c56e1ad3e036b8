"""Blocks that are not their input plus branches are refused, by name and with the reason; never guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.core.errors import CertificateError, LaminaError, UnsupportedError
from lamina.testing.models import NanoGPT, _Block, lively, text, tiny


class Odd(_Block):
    """A block with something wrong, picked by name."""

    fault = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.fault == "multiplies":
            return x * self.mixes(self.before(x))
        if self.fault == "gated by itself":
            return x * torch.sigmoid(self.between(x)) + self.mixes(self.before(x))
        if self.fault == "scaled":
            return (x * 0.9 + self.mixes(self.before(x))) * 1.5
        if self.fault == "gated":
            return x * torch.sigmoid(self.between.weight) + self.mixes(self.before(x))
        if self.fault == "in the block":
            return x + torch.tanh(self.mixes(self.before(x)))
        if self.fault == "post-norm":
            x = self.before(x + self.mixes(x))
            return self.between(x + self.feeds(x))
        if self.fault == "added to itself":
            return x + (x + self.mixes(self.before(x)))
        if self.fault == "a number":
            return x + self.mixes(self.before(x)) + 1.0
        if self.fault == "no stream in":
            return self.feeds(self.between(x))
        return super().forward(x)


def odd(fault: str, place: int = 1) -> nn.Module:
    model = NanoGPT()
    model.blocks[place] = Odd(32, 4)
    model.blocks[place].fault = fault  # type: ignore[assignment]
    return lively(model).eval()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("multiplies", "not its input plus branches"),
        ("gated by itself", "not its input plus branches"),
        ("no stream in", "not its input plus branches"),
        ("in the block", "the branch is computed in the block"),
        ("added to itself", "the stream is added to itself"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_wrong_block_is_named_with_the_reason(fault: str, says: str, place: int) -> None:
    with pytest.raises(CertificateError) as caught:
        Anatomy.of(odd(fault, place))
    assert str(caught.value).startswith(f"block.{place}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_block_without_a_fault_is_taken() -> None:
    assert Anatomy.of(odd("")).certify().worst < 1e-6


@pytest.mark.parametrize(
    ("fault", "turns"),
    [
        ("scaled", ["mul", "mul"]),
        ("a number", ["add"]),
        ("gated", ["mul"]),
        ("post-norm", ["before", "between"]),
    ],
)
def test_what_happens_to_the_stream_itself_is_found(fault: str, turns: list[str]) -> None:
    """Norms after the addition, numbers and factors: the certificate holds where they are taken into account."""
    model = odd(fault)
    anatomy = Anatomy.of(model)
    assert anatomy.certify().worst < 1e-6
    assert anatomy.certify({"input_ids": text(3, 5)}).worst < 1e-6
    block = anatomy.block("block.1")
    assert not block.plain
    assert [str(t) for x in block.branches for t in x.before] + [str(t) for t in block.after] == turns
    assert all(b.plain for b in anatomy.stacks[0].blocks if b is not block)


class Gated(_Block):
    """A branch behind a gate that is made from the stream: it can be told on the sample alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.sigmoid(self.between(x)) * self.mixes(self.before(x))
        return x + self.feeds(self.between(x))


def test_a_gate_made_from_the_stream_is_certified_on_the_sample_alone() -> None:
    model = NanoGPT()
    model.blocks[1] = Gated(32, 4)
    anatomy = Anatomy.of(lively(model).eval())
    assert anatomy.certify().worst < 1e-6
    assert anatomy.block("block.1").bound
    with pytest.raises(UnsupportedError, match=r"block\.1: .* known for the sample alone"):
        anatomy.certify({"input_ids": text(2, 5)})


def test_a_refused_model_is_left_as_it_was() -> None:
    from lamina.testing.bench import expect_same, picture

    model = odd("multiplies").train()
    before = picture(model)
    with pytest.raises(CertificateError):
        Anatomy.of(model)
    expect_same(before, picture(model), "a refusal")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_a_branch_that_changes_behind_the_anatomy_fails_the_certificate(name: str) -> None:
    model = tiny(name)
    anatomy = Anatomy.of(model)
    block = model.get_submodule(anatomy.stacks[0].blocks[2].path)
    handle = block.register_forward_hook(lambda _, __, out: _scaled(out, 1.001))
    with pytest.raises(CertificateError) as caught:
        anatomy.certify()
    handle.remove()
    assert str(caught.value).startswith("block.2: input + branches (")
    assert "misses the block's output by 1.0e-03 of its norm (at most 1e-05)" in str(caught.value)
    assert anatomy.certify().holds


def test_one_wrong_scale_fails_the_certificate() -> None:
    from dataclasses import replace

    anatomy = Anatomy.of(tiny("granite"))
    (stack,) = anatomy.stacks
    mixes, feeds = stack.blocks[1].branches
    wrong = replace(stack.blocks[1], branches=(replace(mixes, scale=1.0), feeds))
    blocks = (stack.blocks[0], wrong, *stack.blocks[2:])
    lying = Anatomy(anatomy.model, (replace(stack, blocks=blocks),), anatomy.sample, 0)
    with pytest.raises(CertificateError, match=r"block\.1"):
        lying.certify()


def _scaled(out: Any, by: float) -> Any:
    return (out[0] * by, *out[1:]) if isinstance(out, tuple) else out * by


def test_every_refusal_is_for_the_user() -> None:
    assert issubclass(CertificateError, LaminaError)
    assert CertificateError.exit_code == 2
