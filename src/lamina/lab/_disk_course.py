"""Take a text through a stack block by block, all batches at each block: every block is needed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.anatomy.stacks import call, evaluating
from lamina.anatomy.trial import inputs_recorded, shorted
from lamina.core.errors import UnsupportedError
from lamina.lab._disk_files import States

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block, Stack
    from lamina.lab._disk_weights import Weights

NEAR = 1e-5
"""Relative difference that the sample's stream may show behind a stack, block by block against in one go."""


def expect_walkable(anatomy: Anatomy) -> None:
    """Raise UnsupportedError where blocks can't be run one after the other on all batches."""
    hint = "without --stream it can be surveyed as a whole"
    for stack in anatomy.stacks:
        if not stack.linked:
            what = "no streaming from disk: between this stack's blocks something else happens to the stream"
            raise UnsupportedError(what, where=stack.path, hint=hint)
        if stack.looped:
            what = "no streaming from disk: its blocks are passes of one module"
            raise UnsupportedError(what, where=stack.path, hint=hint)


class Course:
    """The streams [batch, tokens, width] of batches in one stack, and how its blocks are called.

    `before` are the streams behind the last blocks of the stacks before it.
    """

    def __init__(self, anatomy: Anatomy, at: int, before: Sequence[States], states: States) -> None:
        self.anatomy, self.at, self.before, self.states = anatomy, at, before, states
        self.stack: Stack = anatomy.stacks[at]
        self._calls: dict[int, list[tuple[list[Any], dict[str, Any]] | None]] = {}
        self._beside: dict[int, dict[int | str, Tensor]] = {}

    def record(self, number: int, run: Callable[[], Any]) -> None:
        """The stream that enters, and how the blocks are called: from a `run` of the model in which none is computed.

        The blocks of the stacks before hand on what they gave, those behind what they get.
        """
        model, mine = self.anatomy.model, list[tuple[tuple[Any, ...], Mapping[str, Any]]]()
        with ExitStack() as held:
            for place, stack in enumerate(self.anatomy.stacks):
                calls = held.enter_context(inputs_recorded(model, stack))
                give = partial(self.before[place].get, number) if place < self.at else partial(_entering, calls, stack)
                held.enter_context(shorted(model, stack, give))
                mine = calls if place == self.at else mine
            with torch.no_grad():
                run()
        if len(mine) != len(self.stack.blocks):
            what = f"{len(mine)} calls of {len(self.stack.blocks)} blocks where none is computed"
            raise UnsupportedError(f"no streaming from disk: {what}", where=self.stack.path)
        self.states.put(number, _entering(mine, self.stack))
        self._calls[number] = [_without(b, *c) for b, c in zip(self.stack.blocks, mine, strict=True)]
        self._beside[number] = {}

    @torch.no_grad()
    def step(self, number: int, depth: int) -> None:
        """Run block `depth` of the stack on one batch; how it was called is forgotten."""
        block, calls = self.stack.blocks[depth], self._calls[number]
        given = calls[depth]
        assert given is not None
        args, kwargs = given
        calls[depth] = None
        for place, value in {**self._beside[number], block.stream: self.states.get(number)}.items():
            if isinstance(place, int):
                args[place] = value
            else:
                kwargs[place] = value
        out: Any = self.anatomy.model.get_submodule(block.path)(*args, **kwargs)
        whole = out if isinstance(out, tuple | list) else ()
        for index, place in self.stack.carries:
            if index < len(whole) and isinstance(whole[index], Tensor):
                self._beside[number][place] = whole[index]
        self.states.put(number, _leaving(block, out))


def _entering(calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]], stack: Stack) -> Tensor:
    """The stream that the first block was called with."""
    args, kwargs = calls[0]
    place = stack.blocks[0].stream
    return args[place] if isinstance(place, int) else kwargs[place]


def _without(block: Block, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """A call without its stream, which is kept elsewhere."""
    keep, named = list(args), dict(kwargs)
    if isinstance(block.stream, int):
        keep[block.stream] = None
    else:
        named[block.stream] = None
    return keep, named


def _leaving(block: Block, out: Any) -> Tensor:
    for index, *_ in block.returns:
        out = out[index]
    return out


FAULTS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What a model may raise whose blocks are not computed, or are called one by one."""


@torch.no_grad()
def prove(anatomy: Anatomy, weights: Weights | None) -> None:
    """That the sample's streams are the same block by block as in one forward, else UnsupportedError.

    What a block is called with may depend on what others gave, unseen by the anatomy. This is about how the model is
    written: blocks of one build may run with each other's weights.
    """
    whole = _in_one_go(anatomy)
    done: list[States] = []
    for at, stack in enumerate(anatomy.stacks):
        try:
            here = _block_by_block(anatomy, at, done, weights).double()
        except FAULTS as error:
            first = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise UnsupportedError(f"no streaming from disk: block by block, {first}", where=stack.path) from error
        there = whole[stack.path].double()
        error = float((here - there).norm() / there.norm().clamp_min(1e-30)) if here.shape == there.shape else math.inf
        if not error <= NEAR:
            what = f"block by block its stream is off by {error:.1e}: what a block is given depends on those before"
            raise UnsupportedError(f"no streaming from disk: {what}", where=stack.path)


def _in_one_go(anatomy: Anatomy) -> dict[str, Tensor]:
    """Path of each stack → the stream that leaves it when the model runs on the sample."""
    whole: dict[str, Tensor] = {}
    handles = []
    for stack in anatomy.stacks:

        def note(_: nn.Module, __: Any, out: Any, stack: Stack = stack) -> None:
            whole[stack.path] = _leaving(stack.blocks[-1], out).clone()

        handles.append(anatomy.model.get_submodule(stack.blocks[-1].path).register_forward_hook(note))
    try:
        with evaluating(anatomy.model):
            call(anatomy.model, anatomy.sample)
    finally:
        for handle in handles:
            handle.remove()
    return whole


def _block_by_block(anatomy: Anatomy, at: int, done: list[States], weights: Weights | None) -> Tensor:
    """The same of one stack; its states go to those that are `done`."""
    course = Course(anatomy, at, done, States([1]))
    with evaluating(anatomy.model):
        course.record(0, partial(call, anatomy.model, anatomy.sample))
        for depth, block in enumerate(anatomy.stacks[at].blocks):
            with weights.held(block.path) if weights is not None else nullcontext():
                course.step(0, depth)
    done.append(course.states)
    return course.states.get(0)
