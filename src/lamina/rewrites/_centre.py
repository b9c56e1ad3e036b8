"""Who writes to a stream, and who reads it less its mean: found by what changes, on the anatomy's sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamina.anatomy import Anatomy
from lamina.anatomy.parts import Block
from lamina.anatomy.stacks import call, evaluating
from lamina.core.errors import UnsupportedError
from lamina.rewrites._norms import norms_in

NEAR = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Relative errors that are rounding, by type; norms compute in float32. Of other types 5e-2."""


@dataclass(frozen=True)
class Writers:
    """`axes`: name of a parameter → the dimension along which its numbers go to the stream's channels; `shared`: paths
    of embeddings whose weights are another module's too; `norms`: paths of the norms that read the stream.
    """

    axes: Mapping[str, int]
    shared: tuple[str, ...]
    norms: tuple[str, ...]


def writers(anatomy: Anatomy) -> Writers:
    """All of one stack. Raises UnsupportedError where a reader keeps the mean, or a writer is no linear one."""
    with torch.no_grad(), evaluating(anatomy.model):
        norms = _readers(anatomy)
        axes, shared = _before_the_blocks(anatomy)
        for block in anatomy.stacks[0].blocks:
            for branch in block.branches:
                path = f"{block.path}.{branch.tail}"
                module: Any = anatomy.model.get_submodule(path)
                axes[f"{path}.weight"] = 0 if isinstance(module, nn.Linear) else 1
                if getattr(module, "bias", None) is not None:
                    axes[f"{path}.bias"] = 0
    return Writers(axes, shared, norms)


def centre(model: nn.Module, found: Writers) -> None:
    """Take the mean over the stream's channels out of all that writes; computed in float64."""
    with torch.no_grad():
        for name, dim in found.axes.items():
            held = model.get_parameter(name)
            held.copy_(_centred(held, dim))


def answers(anatomy: Anatomy) -> list[Tensor]:
    """All numbers that the model returns for the anatomy's sample."""
    with evaluating(anatomy.model):
        return [t for t in _tensors(call(anatomy.model, anatomy.sample)) if t.is_floating_point()]


def expect_close(anatomy: Anatomy, before: list[Tensor]) -> None:
    """Raise UnsupportedError where the model no longer answers as it did, but for rounding."""
    for one, other in zip(before, answers(anatomy), strict=True):
        apart = _apart(other, one)
        if not apart <= _near(one):
            raise UnsupportedError(f"without the mean it answers otherwise, by {apart:.0e} of the largest number")


def _readers(anatomy: Anatomy) -> tuple[str, ...]:
    """The norms that take the stream, where the model answers alike if the stream is moved by the same in all channels.

    A norm takes the stream if its input then moves by that.
    """
    model, first = anatomy.model, anatomy.stacks[0].blocks[0]
    known = [path for path, norm in norms_in(model).items() if norm.centred]
    taken: list[dict[str, Tensor]] = []
    outs = []
    for far in (0.0, 1.0):
        notes: dict[str, Tensor] = {}

        def shifted(stream: Tensor, far: float = far) -> Tensor:
            steps = torch.arange(1, stream.shape[-2] + 1, device=stream.device).to(stream).unsqueeze(-1)
            return stream + far * stream.float().std().to(stream) * (1 + steps / len(steps))

        with _stream_as(model, first, shifted), _inputs(model, known, notes):
            outs.append(_tensors(call(model, anatomy.sample)))
        taken.append(notes)
    apart = max((_apart(b, a) for a, b in zip(*outs, strict=True) if a.is_floating_point()), default=0.0)
    if not apart <= _near(outs[0][0]):
        hint = "its norms have to be LayerNorms before the sublayers"
        raise UnsupportedError(f"something reads the stream's mean: the output moves by {apart:.0e}", hint=hint)
    return tuple(p for p in known if p in taken[0] and _moved(taken[0][p], taken[1][p]))


def _moved(one: Tensor, other: Tensor) -> bool:
    """Whether all channels of a token moved by the same, and by more than nothing."""
    step = (other - one).double()
    mean = step.mean(-1, keepdim=True)
    return bool(mean.abs().min() > 0) and float((step - mean).abs().max()) <= 10 * _near(one) * float(mean.abs().max())


def _before_the_blocks(anatomy: Anatomy) -> tuple[dict[str, int], tuple[str, ...]]:
    """The parameters outside of the blocks that make the stream, with their dimensions; and shared embeddings."""
    model, stack = anatomy.model, anatomy.stacks[0]
    inside = tuple(f"{b.path}." for b in stack.blocks)
    names: dict[int, list[str]] = {}
    for name, held in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(held), []).append(name)
    start = _entering(anatomy)
    axes: dict[str, int] = {}
    shared: list[str] = []
    rest = start.double().clone()
    for name, held in model.named_parameters():
        if name.startswith(inside) or stack.width not in held.shape:
            continue
        found = _axis(anatomy, held, stack.width, start, name)
        if found is None:
            continue
        dim, mean = found
        rest -= mean
        if len(names[id(held)]) == 1:
            axes[name] = dim
        else:
            shared += [_embedding(model, names[id(held)])]
    if float(rest.mean(-1).abs().max()) > 10 * _near(start) * float(rest.abs().max()):
        raise UnsupportedError("what enters the first block keeps a mean that no weights make", where=stack.path)
    return axes, tuple(shared)


def _axis(anatomy: Anatomy, held: nn.Parameter, width: int, start: Tensor, name: str) -> tuple[int, Tensor] | None:
    """The dimension along which a parameter goes to the stream's channels, and the means that it makes there.

    None where it does not go there. Raises UnsupportedError where it goes there in no linear way.
    """
    moved = False
    for dim in (d for d, n in enumerate(held.shape) if n == width):
        before = held.data
        held.data = _centred(before, dim).to(before)
        try:
            step = (start - _entering(anatomy)).double()
        finally:
            held.data = before
        mean = step.mean(-1, keepdim=True)
        noise = _near(start) * float(start.abs().max())
        moved = moved or float(step.abs().max()) > noise
        if float(mean.abs().max()) > noise and float((step - mean).abs().max()) <= 2 * noise:
            return dim, mean
    if moved:
        raise UnsupportedError("it writes to the stream, and is no linear map and no embedding", where=name)
    return None


def _embedding(model: nn.Module, names: list[str]) -> str:
    """The path of the embedding among the modules that hold one parameter. Raises UnsupportedError for several."""
    found = [n.rpartition(".")[0] for n in names]
    found = [p for p in found if isinstance(model.get_submodule(p), nn.Embedding)]
    if len(found) != 1:
        raise UnsupportedError("its weights write to the stream and serve elsewhere too", where=names[0])
    return found[0]


class _Met(Exception):
    """Ends a forward before the first block."""


def _entering(anatomy: Anatomy) -> Tensor:
    """The stream that enters the first block [batch, tokens, width]."""
    met: list[Tensor] = []

    def note(stream: Tensor) -> Tensor:
        met.append(stream.detach().clone())
        raise _Met

    with _stream_as(anatomy.model, anatomy.stacks[0].blocks[0], note), suppress(_Met):
        call(anatomy.model, anatomy.sample)
    return met[0]


@contextmanager
def _stream_as(model: nn.Module, block: Block, made: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the block gets another stream."""

    def hand(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if isinstance(block.stream, int):
            return (*args[: block.stream], made(args[block.stream]), *args[block.stream + 1 :]), kwargs
        return args, {**kwargs, block.stream: made(kwargs[block.stream])}

    handle = model.get_submodule(block.path).register_forward_pre_hook(hand, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _inputs(model: nn.Module, paths: list[str], notes: dict[str, Tensor]) -> Iterator[None]:
    """Inside, what enters these modules the first time is noted."""

    def note(_: nn.Module, args: Any, path: str) -> None:
        notes.setdefault(path, args[0].detach())

    with ExitStack() as held:
        for path in paths:
            handle = model.get_submodule(path).register_forward_pre_hook(partial(note, path=path))
            held.callback(handle.remove)
        yield


def _centred(tensor: Tensor, dim: int) -> Tensor:
    wide = tensor.detach().double()
    return wide - wide.mean(dim, keepdim=True)


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(t, Tensor)]


def _near(tensor: Tensor) -> float:
    return NEAR.get(tensor.dtype, 5e-2)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30))
