"""Gradients along the stream: one forward, then one backward per probe, with all parameters frozen.

A probe is a cotangent on the logits, summed over the predicted tokens:

- "loss": p - onehot(label), so that the gradient is that of the summed next-token loss (Σ over positions, in nats);
- "fisher": √p·e - p·(√p·e summed) with e ~ N(0, 1), fresh at every position. Its covariance is diag(p) - ppᵀ, so that
  squares of such gradients are unbiased for the Gauss-Newton matrix of the loss, which is the Fisher matrix of the
  model's own distribution (Martens, New Insights and Perspectives on the Natural Gradient Method, 2020, section 8).

The noise of a sequence follows from the seed and its tokens, whatever batch it comes in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lamina.anatomy.trace import first_tensor
from lamina.core.errors import InputError, UnsupportedError, did_you_mean
from lamina.lab.lab import Batch, Lab, _feeder, real

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block, Branch
    from lamina.core.scores import Scores
    from lamina.core.sites import Site
    from lamina.lab.protocols import Tally
    from lamina.lab.taps import Taps

Probe = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(probabilities [positions, vocabulary] float32, labels [positions], noise) → cotangent, as the probabilities."""


def _loss(p: Tensor, labels: Tensor, _: torch.Generator) -> Tensor:
    """Gradient of the summed cross-entropy with respect to the logits."""
    out = p.clone()
    out[torch.arange(len(labels), device=p.device), labels] -= 1
    return out


def _fisher(p: Tensor, _: Tensor, noise: torch.Generator) -> Tensor:
    """A draw whose covariance is the loss's Hessian with respect to the logits, diag(p) - ppᵀ."""
    drawn = torch.randn(p.shape, generator=noise).to(p.device).mul_(p.sqrt())
    return drawn.sub_(p * drawn.sum(-1, keepdim=True))


PROBES: dict[str, Probe] = {"loss": _loss, "fisher": _fisher}


@dataclass(eq=False)
class _Passed:
    """One block's tensors in the graph: the stream in and out, and what each branch's outlet returned."""

    block: Block
    entering: Tensor
    leaving: Tensor | None = None
    outlets: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class _Graded:
    """Hands taps on to the tallies with the gradients of their site; frees them as it goes."""

    def __init__(self, tallies: Sequence[Tally], gradients: dict[str, Tensor]) -> None:
        self.tallies, self.gradients = tallies, gradients

    def add(self, site: Site, taps: Taps) -> None:
        """One site on one batch."""
        taps.gradient = self.gradients.pop(site.id)
        for tally in self.tallies:
            tally.add(site, taps)

    def merge(self, other: Self) -> Self:
        """Holds nothing of its own."""
        return self

    def scores(self) -> Scores:
        """Never asked for: the tallies have them."""
        raise TypeError("ask the tallies")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter takes part in the graph; afterwards each is as it was."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)


@contextmanager
def graph_recorded(model: nn.Module, anatomy: Anatomy) -> Iterator[list[_Passed]]:
    """Inside, a forward notes every block's tensors as they stand in the graph, which begins at the first block."""
    passed: list[_Passed] = []
    handles = []

    def attach(block: Block, module: nn.Module) -> None:
        def opens(_: nn.Module, args: Any, kwargs: Any) -> Any:
            place = block.stream
            stream = args[place] if isinstance(place, int) else kwargs[place]
            if not stream.requires_grad:
                stream = stream.detach().requires_grad_().clone()
            passed.append(_Passed(block, stream))
            if isinstance(place, int):
                return (*args[:place], stream, *args[place + 1 :]), kwargs
            return args, {**kwargs, place: stream}

        def closes(_: nn.Module, args: Any, output: Any) -> None:
            passed[-1].leaving = first_tensor(output)

        handles.append(module.register_forward_pre_hook(opens, with_kwargs=True))
        outlets = [(module.get_submodule(x.outlet), _joins(x, passed)) for x in block.branches]
        handles.extend(outlet.register_forward_hook(hook) for outlet, hook in outlets)
        handles.append(module.register_forward_hook(closes))

    try:
        for stack in anatomy.stacks:
            stack.expect_unlooped("no gradients of its sublayers")
            for block in stack.blocks:
                _expect_once(block)
                attach(block, model.get_submodule(block.path))
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _expect_once(block: Block) -> None:
    for branch in block.branches:
        if branch.outlet_call is not None:
            raise UnsupportedError("no gradients: its module is called several times in a block", where=branch.site.id)


def _joins(branch: Branch, passed: list[_Passed]) -> Callable[..., Any]:
    """A hook that notes what the outlet returned; where the block adds into it in place, the block gets a copy."""

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        leaves, form = tree_flatten(output)
        passed[-1].outlets[branch.site.id] = leaves[branch.outlet_index]
        if not branch.mutated:
            return None
        leaves[branch.outlet_index] = leaves[branch.outlet_index].clone()
        return tree_unflatten(leaves, form)

    return hook


def stream_gradients(
    lab: Lab, tallies: Iterable[Tally], *, probes: Sequence[str] = ("loss", "fisher"), seed: int | None = None
) -> list[Scores]:
    """One forward and `len(probes)` backwards over the text feed all tallies, every site of every batch in depth order.

    `taps.gradient` [probes, tokens, width] is the gradient with respect to the stream after the site, which is
    that with respect to what the site adds. Memory: the graph and the gradients of one batch.
    Raises InputError for an unknown probe.
    """
    for probe in probes:
        if probe not in PROBES:
            raise InputError(f"no probe named {probe!r}", hint=did_you_mean(probe, PROBES))
    tallies, done = list(tallies), 0
    with frozen(lab.model), torch.enable_grad():
        for batch in lab.batches:
            _one_batch(lab, batch, tallies, probes, lab.seed if seed is None else seed)
            done += len(real(batch))
            lab.progress("gradients", done, lab.sequences)
    return [tally.scores() for tally in tallies]


def _one_batch(lab: Lab, batch: Batch, tallies: Sequence[Tally], probes: Sequence[str], seed: int) -> None:
    with graph_recorded(lab.model, lab.anatomy) as passed:
        logits = lab.forward(batch)
    targets = {site: tensor for p in passed for site, tensor in _targets(p)}
    reached = [t for t in targets.values() if t.requires_grad]  # a silenced branch hangs on nothing
    cotangents = _cotangents(logits.detach(), batch, probes, seed)
    found: list[dict[int, Tensor | None]] = []
    while cotangents:
        last = len(cotangents) == 1
        gradients = torch.autograd.grad(logits, reached, cotangents.pop(0), retain_graph=not last, allow_unused=True)
        found.append({id(t): g for t, g in zip(reached, gradients, strict=True)})
        del gradients
        lab.counts.backwards += int(real(batch).sum()) * lab.depth
    del logits
    scales = {x.site.id: x.scale for p in passed for x in p.block.branches}
    mask = real(batch)
    by_site = {
        site: torch.stack([_stripped(g.get(id(t)), t, scales.get(site, 1.0), mask) for g in found])
        for site, t in targets.items()
    }
    del found, targets, reached
    _feed(lab.anatomy, batch, passed, _Graded(tallies, by_site))


@torch.no_grad()
def _feed(anatomy: Anatomy, batch: Batch, passed: list[_Passed], graded: _Graded) -> None:
    feed = _feeder(anatomy, batch, [graded])
    passed.reverse()
    while passed:
        here = passed.pop()
        assert here.leaving is not None
        added = {x.site.id: here.outlets[x.site.id].detach() for x in here.block.branches}
        added |= {x.site.id: added[x.site.id] * x.scale for x in here.block.branches if x.scale != 1.0}
        feed(here.block, here.entering.detach(), added, here.leaving.detach())


def _targets(passed: _Passed) -> Iterator[tuple[str, Tensor]]:
    """The tensors to differentiate by: the block's output, and what each outlet returned."""
    assert passed.leaving is not None
    yield passed.block.site.id, passed.leaving
    yield from passed.outlets.items()


def _stripped(gradient: Tensor | None, like: Tensor, scale: float, mask: Tensor) -> Tensor:
    """The gradient with respect to what is added, `scale` times the outlet's output; no padding: [tokens, width]."""
    if gradient is None:
        gradient = torch.zeros_like(like)
    gradient = gradient.flatten(0, 1) if bool(mask.all()) else gradient[mask.to(gradient.device)]
    return gradient if scale == 1.0 else gradient / scale


@torch.no_grad()
def _cotangents(logits: Tensor, batch: Mapping[str, Tensor], probes: Sequence[str], seed: int) -> list[Tensor]:
    """One cotangent [batch, tokens, vocabulary] per probe; one softmax, sequence by sequence, serves all."""
    out = [torch.zeros_like(logits) for _ in probes]
    mask, ids = real(batch), batch["input_ids"]
    for row in range(len(ids)):
        places = mask[row].nonzero().squeeze(1)
        if len(places) < 2:
            continue
        own = ids[row, places.to(ids.device)]
        where = places[:-1].to(logits.device)
        p = torch.softmax(logits[row, where].float(), -1)
        for probe, cotangent in zip(probes, out, strict=True):
            made = PROBES[probe](p, own[1:].to(p.device), _noise(own, probe, seed))
            cotangent[row, where] = made.to(logits.dtype)
    return out


def _noise(ids: Tensor, probe: str, seed: int) -> torch.Generator:
    """A generator that depends on the seed, the probe and the sequence's tokens alone."""
    text = f"{seed} {probe} {ids.tolist()}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
