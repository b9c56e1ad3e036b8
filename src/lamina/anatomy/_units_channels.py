"""The channels of a residual stream: which slices of which parameters read, write and scale each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy._units_cut import TOLERANCE, filled
from lamina.anatomy._units_find import NoUnits
from lamina.anatomy._units_probe import Given, Rig
from lamina.anatomy.joins import light
from lamina.anatomy.parts import Block, Stack
from lamina.anatomy.stacks import call
from lamina.anatomy.trace import first_tensor
from lamina.core.sites import Tie


@dataclass(frozen=True)
class Channels:
    """The ties of one block's or model's parameters to the stream's channels, by what they do."""

    reads: tuple[Tie, ...] = ()
    writes: tuple[Tie, ...] = ()
    scales: tuple[Tie, ...] = ()

    @property
    def ties(self) -> tuple[Tie, ...]:
        """All of them."""
        return (*self.reads, *self.writes, *self.scales)

    def norms(self, stack: Stack) -> tuple[str, ...]:
        """The paths of the modules in blocks whose weights scale the channels, in depth order."""
        blocks = tuple(f"{b.path}." for b in stack.blocks)
        return tuple(dict.fromkeys(t.param.rpartition(".")[0] for t in self.scales if t.param.startswith(blocks)))


def _silent(block: Block, given: Given, channel: int) -> Given:
    """The block's input with zeros in one channel of the stream."""
    args, kwargs = list(given.args), dict(given.kwargs)
    held: Any = args if isinstance(block.stream, int) else kwargs
    stream = held[block.stream].clone()
    stream[..., channel] = 0
    held[block.stream] = stream
    return Given(tuple(args), kwargs)


def _away(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def block_channels(rig: Rig, block: Block, width: int) -> Channels:
    """The ties of one block, certified on two channels. Raises NoUnits where a channel can't be silenced."""
    axes = [(n, d) for n, v in rig.values.items() for d in range(v.ndim) if v.shape[d] == width]
    norms = [Tie(n, d) for n, d in axes if rig.values[n].ndim == 1 and light(_holder(rig.module, n))]
    rest = [Tie(n, d) for n, d in axes if Tie(n, d) not in norms]
    given, channel = rig.given, width // 3
    made = _cores(rig, block, {})
    writes = [t for t in rest if _writes(made, _cores(rig, block, filled(rig, [t], [channel], 1.0)), channel)]
    rig.given = _silent(block, given, channel)
    still = filled(rig, [*norms, *writes], [channel])
    clean = rig.run(still)

    def unread(tie: Tie) -> bool:
        return _away(rig.run({**still, **filled(rig, [tie], [channel], 1.0)}), clean) <= 1e-7

    reads = [t for t in rest if t not in writes and rig.values[t.param].ndim > 1 and unread(t)]
    quiet = filled(rig, [*reads, *writes], [channel])
    clean = rig.run(quiet)
    scales = [t for t in norms if _away(rig.run({**quiet, **filled(rig, [t], [channel], 1.0)}), clean) <= 1e-7]
    found = Channels(tuple(reads), tuple(writes), tuple(scales))
    for one in (0, width - 1):
        rig.given = _silent(block, given, one)
        _certify(rig, found, one)
    rig.given = given
    return found


def _certify(rig: Rig, found: Channels, channel: int) -> None:
    """A silent channel stays silent when nothing writes it, and then what reads or scales it does not matter."""
    clean = rig.run(filled(rig, found.ties, [channel]))
    if float(clean[..., channel].norm()) > TOLERANCE[rig.dtype] * float(clean.norm()):
        raise NoUnits(f"channel {channel} is not silent though nothing that was found writes it")
    for some in (found.reads, found.scales):
        rest = [t for t in found.ties if t not in some]
        out = rig.run({**filled(rig, rest, [channel]), **filled(rig, some, [channel], 1.0)})
        if _away(out, clean) > TOLERANCE[rig.dtype]:
            raise NoUnits(f"channel {channel} still matters when it is silent")


def _holder(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _cores(rig: Rig, block: Block, changed: Mapping[str, Tensor]) -> list[Tensor]:
    """What the cores of the branches make of inputs that do not depend on each other's changes."""
    met: list[Tensor] = []

    def note(*given: Any) -> None:
        out = first_tensor(given[-1])
        met.append(torch.empty(0) if out is None else out)

    paths = [b.core for b in block.branches] + [b.tail for b in block.branches if b.tail and b.tail != b.core]
    handles = [rig.module.get_submodule(p).register_forward_hook(note) for p in paths]
    try:
        rig.run(changed)
    finally:
        for handle in handles:
            handle.remove()
    return met


def _writes(before: list[Tensor], after: list[Tensor], channel: int) -> bool:
    """Whether the first core that changes at all does so in this channel alone."""
    for one, other in zip(before, after, strict=True):
        if one.shape == other.shape and not torch.equal(one, other):
            moved = (one - other).abs().flatten(0, -2).amax(0) > 1e-9 * one.abs().max()
            return moved.nonzero().flatten().tolist() == [channel]
    return False


def outer_channels(model: nn.Module, stack: Stack, sample: Mapping[str, Any], width: int) -> Channels:
    """The ties of what lies outside of the blocks: embeddings write, the last norm scales, the head reads.

    Certified in the model's own type. Raises NoUnits where they do not.
    """
    inside = tuple(f"{b.path}." for b in stack.blocks)
    values = {n: p.detach() for n, p in model.named_parameters() if not n.startswith(inside)}
    axes = [Tie(n, d) for n, v in values.items() for d in range(v.ndim) if v.shape[d] == width]
    channel = width // 3
    entering, clean = _model(model, stack, sample, {})
    if entering.shape[-1] != width:
        raise NoUnits("the stream's last dimension is not its channels")
    ties: dict[str, list[Tie]] = {"writes": [], "scales": [], "reads": []}
    whole = _zero(values, axes, channel)
    start, _ = _model(model, stack, sample, whole)
    if float(start[..., channel].norm()) > 0:
        raise NoUnits("the stream does not begin silent when the embeddings are zero in a channel")
    for tie in axes:
        changed = _zero(values, [tie], channel)
        first, out = _model(model, stack, sample, changed)
        moved = (first - entering).abs().flatten(0, -2).amax(0).nonzero().flatten().tolist()
        if moved == [channel]:
            ties["writes"].append(tie)
        elif not moved and not torch.equal(out, clean):
            ties["scales" if values[tie.param].ndim == 1 else "reads"].append(tie)
    if len(ties["writes"]) + len(ties["scales"]) + len(ties["reads"]) < len({t.param for t in axes}):
        raise NoUnits("outside of the blocks, a parameter as wide as the stream has no part in it")
    return Channels(**{k: tuple(v) for k, v in ties.items()})


def _zero(values: Mapping[str, Tensor], ties: Iterable[Tie], channel: int) -> dict[str, Tensor]:
    changed: dict[str, Tensor] = {}
    for tie in ties:
        changed.setdefault(tie.param, values[tie.param].clone()).select(tie.dim, channel).zero_()
    return changed


def _model(
    model: nn.Module, stack: Stack, sample: Mapping[str, Any], changed: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The stream that enters the first block, and what the model returns, with some parameters changed."""
    met: list[Tensor] = []
    first = stack.blocks[0]

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        met.append((args[first.stream] if isinstance(first.stream, int) else kwargs[first.stream]).clone())

    handle = model.get_submodule(first.path).register_forward_pre_hook(note, with_kwargs=True)
    held = dict(model.named_parameters())
    before = {n: held[n].data for n in changed}
    try:
        for name, value in changed.items():
            held[name].data = value
        out = first_tensor(list(_leaves(call(model, sample))))
    finally:
        for name, value in before.items():
            held[name].data = value
        handle.remove()
    if out is None or not met:
        raise NoUnits("the model returns no tensor")
    return met[0], out


def _leaves(made: Any) -> Iterable[Any]:
    return made.values() if isinstance(made, Mapping) else [made]


def kept_channels(block: Block, given: Given, width: int, gone: Sequence[int]) -> Given:
    """The block's input on a stream without these channels."""
    args, kwargs = list(given.args), dict(given.kwargs)
    held: Any = args if isinstance(block.stream, int) else kwargs
    stream = held[block.stream]
    keep = torch.tensor([c for c in range(width) if c not in set(gone)], device=stream.device)
    held[block.stream] = stream.index_select(-1, keep)
    return Given(tuple(args), kwargs)


def relative(found: Channels, block: Block) -> tuple[Tie, ...]:
    """The ties of one block's own parameters, with names relative to it."""
    start = f"{block.path}."
    return tuple(replace(t, param=t.param.removeprefix(start)) for t in found.ties if t.param.startswith(start))


def placed(found: Channels, block: Block) -> Channels:
    """With absolute names."""

    def there(ties: tuple[Tie, ...]) -> tuple[Tie, ...]:
        return tuple(replace(t, param=f"{block.path}.{t.param}") for t in ties)

    return Channels(there(found.reads), there(found.writes), there(found.scales))
