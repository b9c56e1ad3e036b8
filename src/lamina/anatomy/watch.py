"""Watch a forward pass: the stream into and out of each block, and what each branch adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamina.anatomy.parts import Block, Branch
from lamina.anatomy.passes import counted
from lamina.anatomy.trace import first_tensor
from lamina.core.errors import UnsupportedError

if TYPE_CHECKING:
    from lamina.anatomy.anatomy import Anatomy

Watcher = Callable[[Block, Tensor, Mapping[str, Tensor], Tensor], None]
"""(block, stream in, what each branch adds by site id, stream out), all [batch, tokens, width]."""


def added(branch: Branch, output: Any, stream: Tensor, block: nn.Module) -> Tensor:
    """What the branch adds, shaped like the stream, from what its outlet returned."""
    found = tree_leaves(output)[branch.outlet_index]
    for turn in branch.way:
        found = turn(block, found)
    if found.shape != stream.shape and found.numel() == stream.numel():
        found = found.reshape(stream.shape)
    if branch.scale != 1.0:
        return found * branch.scale
    return found.clone() if branch.mutated else found


@contextmanager
def watch_blocks(
    model: nn.Module, anatomy: Anatomy, watcher: Watcher, only: Block | None = None, *, sampled: bool = False
) -> Iterator[None]:
    """Call `watcher` after each block of a forward (or after `only` one); holds one block's tensors at a time.

    `sampled`: the forward is on the anatomy's own sample. Raises UnsupportedError where a branch can be told on that
    alone.
    """
    handles = []
    exits = ExitStack()

    def attach(block: Block) -> None:
        module = model.get_submodule(block.path)
        held: dict[str, Tensor] = {}
        met: Counter[str] = Counter()
        its_turn = exits.enter_context(counted(model, block))

        def opens(_: nn.Module, args: Any, kwargs: Any) -> None:
            held.clear()
            met.clear()
            if not its_turn():
                return
            held[""] = args[block.stream] if isinstance(block.stream, int) else kwargs[block.stream]

        def closes(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not its_turn():
                return
            entering = held.pop("")
            leaving = first_tensor(output, tuple(entering.shape))
            assert leaving is not None
            watcher(block, entering, held, leaving)
            held.clear()

        handles.append(module.register_forward_pre_hook(opens, with_kwargs=True))
        for branch in block.branches:

            def joins(_: nn.Module, args: Any, output: Any, branch: Branch = branch) -> None:
                met[branch.site.id] += 1
                if its_turn() and branch.outlet_call in (None, met[branch.site.id] - 1):
                    held[branch.site.id] = added(branch, output, held[""], module)

            handles.append(module.get_submodule(branch.outlet).register_forward_hook(joins))
        handles.append(module.register_forward_hook(closes, with_kwargs=True))

    with exits:
        try:
            for block in (b for k in anatomy.stacks for b in k.blocks if only is None or b is only):
                _check(block, sampled)
                attach(block)
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check(block: Block, sampled: bool) -> None:
    if block.bound and not sampled:
        raise UnsupportedError("what joins the stream here is known for the sample alone", where=block.site.id)
