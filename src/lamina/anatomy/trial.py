"""Take branches away on trial, and put recorded streams in the place of blocks; both undo themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.anatomy.passes import counted

if TYPE_CHECKING:
    from lamina.anatomy.anatomy import Anatomy
    from lamina.anatomy.parts import Block, Stack


@contextmanager
def forward_of(
    module: nn.Module, function: Callable[..., Any], when: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Inside, calling the module calls `function` (`when` that gives True, if told); hooks stay as they are."""
    before, usual = module.__dict__.get("forward"), module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if when is None or when() else usual(*args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def wrapped(tokens: Tensor, returns: Sequence[Sequence[Any]]) -> Any:
    """`tokens` in the nested tuple that the module returns; other places are None."""
    out: Any = tokens
    for index, arity, *form in reversed(returns):
        made = (out if i == index else None for i in range(arity))
        out = list(made) if form else tuple(made)
    return out


@contextmanager
def silenced(model: nn.Module, anatomy: Anatomy, site: str) -> Iterator[None]:
    """Inside, the branch adds zero: its core and its norms are not computed."""
    branch, block = anatomy.branch(site), model.get_submodule(anatomy.block(site).path)
    widths = dict(branch.widths)

    def core(*args: Any, **kwargs: Any) -> Any:
        tokens = args[branch.stream] if isinstance(branch.stream, int) else kwargs[branch.stream]
        if not branch.joins:
            out = wrapped(_zeros(tokens, widths.get(branch.core)), branch.returns)
        else:
            for path in branch.keeps:
                tokens = block.get_submodule(f"{branch.core}.{path}")(tokens)
            out = wrapped(tokens, branch.returns)
        handed = {i: args[p] if isinstance(p, int) else kwargs[p] for i, p in branch.hands}
        return type(out)(handed.get(i, v) for i, v in enumerate(out)) if handed else out

    def same(*args: Any, **kwargs: Any) -> Tensor:
        return _first(args, kwargs)

    with ExitStack() as stack:
        its_turn = stack.enter_context(counted(model, anatomy.block(site)))
        stack.enter_context(forward_of(block.get_submodule(branch.core), core, its_turn))
        for path in branch.own:
            wide = partial(_wide, widths[path]) if path in widths else same
            stack.enter_context(forward_of(block.get_submodule(path), wide, its_turn))
        yield


def _zeros(tokens: Tensor, width: int | None) -> Tensor:
    """Zeros like the tokens [..., features], or `width` features wide."""
    return torch.zeros_like(tokens) if width is None else tokens.new_zeros((*tokens.shape[:-1], width))


def _wide(width: int, *args: Any, **kwargs: Any) -> Tensor:
    return _zeros(_first(args, kwargs), width)


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def handed_on(
    block: Block, carries: Sequence[tuple[int, int | str]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What a block that does nothing returns of these arguments: its stream, and what it `carries` beside it."""
    out = wrapped(args[block.stream] if isinstance(block.stream, int) else kwargs[block.stream], block.returns)
    given = {**dict(enumerate(args)), **kwargs}
    beside = {i: given[place] for i, place in carries if place in given}
    return type(out)(beside.get(i, v) for i, v in enumerate(out)) if beside else out


@contextmanager
def passed(model: nn.Module, block: Block, carries: Sequence[tuple[int, int | str]] = ()) -> Iterator[None]:
    """Inside, the block hands its stream on as it is, norms of the stream included, and what it `carries` beside it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return handed_on(block, carries, args, kwargs)

    with counted(model, block) as its_turn, forward_of(model.get_submodule(block.path), forward, its_turn):
        yield


@contextmanager
def ablated(model: nn.Module, anatomy: Anatomy, sites: Iterable[str]) -> Iterator[None]:
    """Inside, these blocks and branches are gone; a block whose branches all go goes as a whole."""
    with ExitStack() as stack:
        for site in anatomy.collapse(anatomy.expand(sites)):
            block, carries = anatomy.block(site), anatomy.stack(site).carries
            if block.site.id == site and (carries or not block.plain):
                stack.enter_context(passed(model, block, carries))
                continue
            for part in anatomy.parts(site):
                stack.enter_context(silenced(model, anatomy, part.id))
        yield


@contextmanager
def shorted(model: nn.Module, stack: Stack, states: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, the stack's blocks are not computed: the last hands on `states()`, the others pass the stream."""
    last = stack.blocks[-1]

    def passing(place: int | str, returns: Sequence[Sequence[Any]]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return wrapped(args[place] if isinstance(place, int) else kwargs[place], returns)

        return forward

    with ExitStack() as held:
        for block in stack.blocks:
            function = passing(block.stream, block.returns)
            if block is last:
                function = lambda *_, **__: wrapped(states(), last.returns)  # noqa: E731
            held.enter_context(forward_of(model.get_submodule(block.path), function))
        yield


@contextmanager
def inputs_recorded(model: nn.Module, stack: Stack) -> Iterator[list[tuple[tuple[Any, ...], Mapping[str, Any]]]]:
    """Inside, every block's arguments are noted as (args, kwargs), in call order."""
    seen: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))

    handles = [model.get_submodule(b.path).register_forward_pre_hook(note, with_kwargs=True) for b in stack.blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
