"""Gradients along the stream: one forward, then one backward per probe (see `lamina.lab.probes`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lamina.anatomy.trace import first_tensor
from lamina.core.errors import InputError, UnsupportedError, did_you_mean
from lamina.core.sites import Kind
from lamina.lab.attention import Attention, attention_recorded
from lamina.lab.feed import Extras, Feeder, inner_path, inputs_noted, wants_of
from lamina.lab.lab import Lab
from lamina.lab.objective import objective_of, output_of
from lamina.lab.probes import PROBES, cotangents, refusal
from lamina.lab.rows import Rows, real

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block, Branch
    from lamina.core.scores import Scores
    from lamina.core.sites import Site
    from lamina.lab.protocols import Tally
    from lamina.lab.taps import Taps


@dataclass(eq=False)
class _Passed:
    """One block's tensors in the graph: the stream in and out, and what each branch's outlet returned."""

    block: Block
    entering: Tensor
    leaving: Tensor | None = None
    outlets: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class _Graded:
    """Hands taps on to the tallies with the gradients of their site; frees them as it goes."""

    def __init__(self, tallies: Sequence[Tally], found: _Found) -> None:
        self.tallies, self.found = tallies, found
        self.wants = wants_of(tallies)

    def add(self, site: Site, taps: Taps) -> None:
        """One site on one batch: each tally sees the probes that it names, in its order."""
        gradients, inner = self.found.sites.pop(site.id, {}), self.found.inner.pop(site.id, {})
        taps.weights = self.found.weights.pop(site.id, {})
        for tally in self.tallies:
            names = list(getattr(tally, "probes", self.found.probes))
            if why := next((self.found.refused[n] for n in names if n in self.found.refused), ""):
                _refuse(tally, why)
                continue
            taps.gradient = torch.stack([gradients[p] for p in names]) if gradients else None
            taps.inner_gradient = torch.stack([inner[p] for p in names]) if inner else None
            if site.kind is not Kind.LINEAR or "linears" in getattr(tally, "wants", ()):
                tally.add(site, taps)

    def merge(self, other: Self) -> Self:
        """Holds nothing of its own."""
        return self

    def scores(self) -> Scores:
        """Never asked for: the tallies have them."""
        raise TypeError("ask the tallies")


def _refuse(tally: Any, why: str) -> None:
    """Tell a tally that its probe can't be taken; raises UnsupportedError where it stands for itself."""
    if not hasattr(tally, "refuse"):
        raise UnsupportedError(why, where="gradients")
    tally.refuse(why)


@dataclass(eq=False)
class _Found:
    """The gradients of one batch, by site and probe: along the stream, and with respect to the inner inputs.

    `weights`: by sublayer and parameter, the parameter and the gradient of the summed loss. `refused`: probes that this
    model's outputs don't allow, and why.
    """

    probes: Sequence[str]
    refused: dict[str, str] = field(default_factory=dict[str, str])
    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    inner: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    weights: dict[str, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)


@contextmanager
def frozen(model: nn.Module, but: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Inside, no parameter `but` these takes part in the graph; afterwards each is as it was."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    taken = {id(p) for p in but}
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in taken)
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

    expect_differentiable(anatomy)
    try:
        for block in (b for k in anatomy.stacks for b in k.blocks):
            attach(block, model.get_submodule(block.path))
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def expect_differentiable(anatomy: Anatomy) -> None:
    """Raise UnsupportedError where gradients along the stream can't be told apart by site."""
    for stack in anatomy.stacks:
        stack.expect_unlooped("no gradients of its sublayers")
        for block in stack.blocks:
            _expect_once(block)


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
    lab: Lab,
    tallies: Iterable[Tally],
    *,
    probes: Sequence[str] | None = None,
    seed: int | None = None,
    what: str = "gradients",
    score: bool = True,
) -> list[Scores]:
    """One forward and a backward per probe over the text feed all tallies, every site of every batch in depth order.

    `probes`: those that the tallies name (`tally.probes`), or "loss" and "fisher" where none does. `taps.gradient`
    [probes, tokens, width] is the gradient with respect to the stream after the site, which is that with respect to
    what the site adds. Where a tally wants "weights", sequences are run one by one, so that what it sees is of one
    sequence each. Memory: the graph and the gradients of one batch. Raises InputError for an unknown probe.
    """
    tallies = list(tallies)
    named = dict.fromkeys(p for t in tallies for p in getattr(t, "probes", ()))
    chosen = tuple(probes if probes is not None else named or ("loss", "fisher"))
    for probe in chosen:
        if probe not in PROBES:
            raise InputError(f"no probe named {probe!r}", hint=did_you_mean(probe, PROBES))
    weights = _weights(lab.anatomy) if "weights" in wants_of(tallies) else {}
    done = 0
    with frozen(lab.model, weights.values()), torch.enable_grad():
        for rows in _singly(lab) if weights else lab.rows():
            _one_batch(lab, rows, tallies, chosen, lab.seed if seed is None else seed, weights)
            done += rows.sequences
            lab.progress(what, done, lab.sequences)
    return [tally.scores() for tally in tallies if score]


def _singly(lab: Lab) -> Iterator[Rows]:
    for rows in lab.rows():
        for row in range(rows.sequences):
            yield rows.only(row)


def _weights(anatomy: Anatomy) -> dict[str, nn.Parameter]:
    """The parameters that serve one sublayer alone, by name; Raises UnsupportedError where passes share them."""
    for stack in anatomy.stacks:
        stack.expect_unlooped("no gradients of its weights")
    wanted = {t.param for s in anatomy.sublayers for t in anatomy.ties(s)}
    return {n: p for n, p in anatomy.model.named_parameters() if n in wanted}


def _one_batch(
    lab: Lab,
    rows: Rows,
    tallies: Sequence[Tally],
    probes: Sequence[str],
    seed: int,
    weights: Mapping[str, nn.Parameter],
) -> None:
    extras = Extras(keep=True)
    with ExitStack() as held:
        _listen(lab.anatomy, tallies, extras, held)
        passed = held.enter_context(graph_recorded(lab.model, lab.anatomy))
        result = lab.result(rows.batch)
    out, objective = output_of(result), objective_of(lab.model, result)
    del result
    refused = {p: why for p in probes if (why := refusal(p, objective))}
    probes = [p for p in probes if p not in refused]
    found = _Found(probes, refused)
    if out.requires_grad and probes:
        _differentiate(
            lab, rows, out, cotangents(out.detach(), objective, rows, probes, seed), passed, extras, found, weights
        )
    del out
    _zeros_for(passed, found, rows)
    extras.inputs = {k: v.detach() for k, v in extras.inputs.items()}
    _feed(lab.anatomy, rows, passed, extras, _Graded(tallies, found))


def _listen(anatomy: Anatomy, tallies: Sequence[Tally], extras: Extras, held: ExitStack) -> None:
    """Note what tallies want beside the stream, of all blocks, since the graph holds it anyway."""
    wants = wants_of(tallies)
    paths = [inner_path(anatomy, s) for s in anatomy.sublayers] if "inner" in wants else []
    paths += [s.path for s in anatomy.linears()] if "linears" in wants else []
    if paths:
        held.enter_context(inputs_noted(anatomy.model, paths, extras))
    if "attention" in wants:
        take = held.enter_context(attention_recorded(anatomy.model, anatomy))
        extras.attention = lambda site: _cut_loose(take(site))


def _cut_loose(attention: Attention | None) -> Attention | None:
    if attention is not None:
        for name in ("query", "key", "value", "mask", "softmaxed"):
            tensor = getattr(attention, name)
            setattr(attention, name, tensor.detach() if isinstance(tensor, Tensor) else tensor)
    return attention


def _differentiate(
    lab: Lab,
    rows: Rows,
    out: Tensor,
    cotangent: list[Tensor],
    passed: Sequence[_Passed],
    extras: Extras,
    found: _Found,
    weights: Mapping[str, nn.Parameter],
) -> None:
    """Fill `found`, one backward after the other; the loss's alone goes down to the weights."""
    targets = {site: tensor for p in passed for site, tensor in _targets(p)}
    inner = (
        {s.id: extras.inputs.get(inner_path(lab.anatomy, s)) for s in lab.anatomy.sublayers} if extras.inputs else {}
    )
    inner = {k: v for k, v in inner.items() if v is not None and v.requires_grad}
    reached = {
        id(t): t for t in (*targets.values(), *inner.values()) if t.requires_grad
    }  # silenced ones hang on nothing
    scales = {x.site.id: x.scale for p in passed for x in p.block.branches}
    for probe in found.probes:
        given, last = cotangent.pop(0), not cotangent
        leaves = list(weights.values()) if probe == "loss" else []
        made = torch.autograd.grad(out, [*reached.values(), *leaves], given, retain_graph=not last, allow_unused=True)
        gradients = dict(zip(reached, made, strict=False))
        for site, tensor in targets.items():
            found.sites.setdefault(site, {})[probe] = _stripped(
                gradients.get(id(tensor)), tensor, scales.get(site, 1.0), rows
            )
        for site, tensor in inner.items():
            found.inner.setdefault(site, {})[probe] = _stripped(gradients.get(id(tensor)), tensor, 1.0, rows)
        if leaves:
            _share_out(lab.anatomy, dict(zip(weights, made[len(reached) :], strict=True)), weights, found)
        lab.counts.backwards += int(real(rows.batch).sum()) * lab.depth


def _share_out(
    anatomy: Anatomy, gradients: Mapping[str, Tensor | None], weights: Mapping[str, nn.Parameter], found: _Found
) -> None:
    for site in anatomy.sublayers:
        mine = dict.fromkeys(t.param for t in anatomy.ties(site))
        parts = {n: (weights[n].detach(), gradients[n]) for n in mine}
        found.weights[site.id] = {n: (p, torch.zeros_like(p) if g is None else g) for n, (p, g) in parts.items()}


def _zeros_for(passed: Sequence[_Passed], found: _Found, rows: Rows) -> None:
    """Gradients of zero for what the output does not hang on at all."""
    for site, tensor in (t for p in passed for t in _targets(p)):
        for probe in found.probes:
            found.sites.setdefault(site, {}).setdefault(probe, _stripped(None, tensor, 1.0, rows))


@torch.no_grad()
def _feed(anatomy: Anatomy, rows: Rows, passed: list[_Passed], extras: Extras, graded: _Graded) -> None:
    feed = Feeder(anatomy, rows, [graded], extras)
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


def _stripped(gradient: Tensor | None, like: Tensor, scale: float, rows: Rows) -> Tensor:
    """The gradient with respect to what is added, `scale` times the outlet's output; no padding: [tokens, width]."""
    gradient = torch.zeros_like(like) if gradient is None else gradient
    gradient = rows.on(gradient).strip(gradient)
    return gradient if scale == 1.0 else gradient / scale
