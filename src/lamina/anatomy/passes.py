"""Tell the passes apart where a model runs one module again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lamina.anatomy.parts import Block


@contextmanager
def counted(model: nn.Module, block: Block) -> Iterator[Callable[[], bool]]:
    """Inside, gives a function that says whether the latest call of the block's module is this pass of it.

    Counts from where the model, or else the module, is called first.
    """
    if block.turns == 1:
        yield lambda: True
        return
    calls = 0

    def starts(*_: Any) -> None:
        nonlocal calls
        calls = 0

    def opens(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handles = [
        model.register_forward_pre_hook(starts),
        model.get_submodule(block.path).register_forward_pre_hook(opens),
    ]
    try:
        yield lambda: (calls - 1) % block.turns == block.turn
    finally:
        for handle in handles:
            handle.remove()


def order(model: nn.Module, path: str, run: Callable[[], Any]) -> list[str]:
    """The names of a container's elements in the order in which `run` has the model call them."""
    met: list[str] = []
    handles = []
    for name, element in model.get_submodule(path).named_children():
        handles.append(element.register_forward_pre_hook(lambda *_, name=name: met.append(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return met
