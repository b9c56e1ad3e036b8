"""Gradients along the stream against plain autograd, and the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lamina.anatomy.trial import forward_of
from lamina.core.errors import InputError
from lamina.core.sites import Kind, Site
from lamina.lab import Lab, Taps
from lamina.lab.gradients import PROBES, stream_gradients
from lamina.testing.bench import expect_same, picture
from lamina.testing.models import NAMES, padded, text, tiny


class Keep:
    """Keeps what it is handed, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def add(self, site: Site, taps: Taps) -> None:
        assert taps.gradient is not None
        self.seen.append((site.id, taps.entering, taps.added, taps.gradient))

    def merge(self, other: Keep) -> Keep:
        return self

    def scores(self) -> list[str]:
        return [s for s, *_ in self.seen]

    def of(self, site: str) -> tuple[Tensor, Tensor, Tensor]:
        return next((x, f, g) for s, x, f, g in self.seen if s == site)


def kept(model: nn.Module, batches: object, **options: object) -> Keep:
    keep = Keep()
    stream_gradients(Lab(model, batches), [keep], **options)  # type: ignore[arg-type,list-item]
    return keep


@contextmanager
def pushed(module: nn.Module, place: int, push: Tensor) -> Iterator[None]:
    """Inside, the module's output at `place` has `push` added."""
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten(plain(*args, **kwargs))
        leaves[place] = leaves[place] + push.view(leaves[place].shape)
        return tree_unflatten(leaves, form)

    with forward_of(module, forward):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_loss_by_what_is_added(name: str) -> None:
    """A variable added to what a branch adds, through the whole model and the library's own cross-entropy."""
    model, ids = tiny(name), text(2, 7)
    lab, keep = Lab(model, ids), kept(tiny(name), ids, probes=["loss"])
    assert keep.scores() == [s.id for s in lab.anatomy.sites]
    for block in lab.anatomy.stacks[0].blocks[1:3]:
        for branch in block.branches:
            _, added, gradient = keep.of(branch.site.id)
            push = torch.zeros_like(added, requires_grad=True)
            outlet = model.get_submodule(block.path).get_submodule(branch.outlet)
            with pushed(outlet, branch.outlet_index, push / branch.scale):
                logits = lab.forward(lab.batches[0])
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            (want,) = torch.autograd.grad(loss, push)
            assert torch.allclose(gradient[0], want, atol=1e-5 * float(want.abs().max())), branch.site.id


@pytest.mark.parametrize("name", NAMES)
def test_taps_are_those_of_a_plain_pass(name: str) -> None:
    model, ids = tiny(name), text(3, 7)
    plain: dict[str, tuple[Tensor, Tensor]] = {}

    class Note(Keep):
        def add(self, site: Site, taps: Taps) -> None:
            plain[site.id] = taps.entering, taps.added

    Lab(model, ids).stream([Note()])  # type: ignore[list-item]
    for site, x, f, _ in kept(model, ids).seen:
        assert torch.allclose(x, plain[site][0], atol=1e-5), site
        assert torch.allclose(f, plain[site][1], atol=1e-5), site


def test_a_blocks_gradient_is_that_of_its_last_branch() -> None:
    keep = kept(tiny("llama"), text(2, 9))
    assert torch.equal(keep.of("block.2")[2], keep.of("block.2.mlp")[2])
    assert not torch.equal(keep.of("block.2")[2], keep.of("block.2.attention")[2])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "granite", "falcon", "mixtral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_gone_and_changes_nothing(name: str, side: str) -> None:
    model = tiny(name)
    rows = [text(1, n, seed=n)[0] for n in (9, 5, 7)]
    alone = [kept(model, [{"input_ids": r.unsqueeze(0)}]) for r in rows]
    together = kept(model, padded(rows, 3, side=side))
    for site, x, f, gradient in together.seen:
        assert gradient.shape == (2, 21, x.shape[1])
        assert x.shape == f.shape == (21, x.shape[1])
        want = torch.cat([k.of(site)[2] for k in alone], 1)
        assert torch.allclose(gradient, want, atol=2e-4 * float(want.abs().max())), site


@pytest.mark.parametrize("name", ["llama", "falcon", "nanogpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_was(name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    next(model.parameters()).requires_grad_(False)
    Lab(model, text())  # the anatomy's own first look
    before = picture(model)
    keep = kept(model, text())
    expect_same(before, picture(model), "the gradients")
    assert all(g.dtype == dtype and not g.requires_grad and not x.requires_grad for _, x, _, g in keep.seen)


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = tiny("llama")
    lab = Lab(model, text())
    before = picture(model)

    class Fails(Keep):
        def add(self, site: Site, taps: Taps) -> None:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stream_gradients(lab, [Fails()])  # type: ignore[list-item]
    expect_same(before, picture(model), "the failed gradients")


def test_noise_follows_the_tokens_and_the_seed_alone() -> None:
    model, ids = tiny("llama"), text(4, 8)
    one = kept(model, ids).of("block.1.mlp")[2]
    two = kept(model, ids.flip(0), probes=["fisher", "loss"]).of("block.1.mlp")[2]
    other = kept(model, ids, seed=5).of("block.1.mlp")[2]
    turned = two.view(2, 4, 8, -1).flip(1).flatten(1, 2)
    assert torch.allclose(one, turned.flip(0), atol=1e-5)
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1], atol=1e-2)


def test_probes_have_the_hessian_of_the_loss_as_covariance() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).expand(40000, 4)
    drawn = PROBES["fisher"](p, torch.zeros(40000, dtype=torch.long), torch.Generator().manual_seed(0))
    want = torch.diag(p[0]) - torch.outer(p[0], p[0])
    assert torch.allclose(drawn.T @ drawn / 40000, want, atol=5e-3)
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 0, 5])
    (want,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), logits)
    assert torch.allclose(PROBES["loss"](logits.detach().softmax(-1), labels, torch.Generator()), want)


def test_passes_are_counted() -> None:
    lab = Lab(tiny("llama"), text(4, 12))
    stream_gradients(lab, [Keep()], probes=["loss", "fisher"])  # type: ignore[list-item]
    assert lab.counts.blocks == lab.tokens * lab.depth
    assert lab.counts.backwards == 2 * lab.tokens * lab.depth
    assert lab.counts.heads == lab.tokens
    assert lab.passes == 3


def test_silenced_branches_have_taps_too() -> None:
    lab, keep = Lab(tiny("llama"), text(2, 8)), Keep()
    with lab.ablate(["block.1.attention", "block.2"]):
        stream_gradients(lab, [keep])  # type: ignore[list-item]
    assert keep.scores() == [s.id for s in lab.anatomy.sites]
    for site in ("block.1.attention", "block.2.mlp", "block.2"):
        assert not keep.of(site)[1].any()
    assert keep.of("block.1.mlp")[2].any()


def test_an_unknown_probe_is_refused() -> None:
    with pytest.raises(InputError, match=r"no probe named 'fischer'.*did you mean fisher"):
        stream_gradients(Lab(tiny("llama"), text()), [], probes=["fischer"])


def test_every_kind_of_site_is_seen() -> None:
    lab = Lab(tiny("mixtral"), text())
    kinds = {lab.anatomy.site(s).kind for s in kept(lab.model, text()).scores()}
    assert kinds == {Kind.BLOCK, Kind.ATTENTION, Kind.MOE}
