"""Few sequences for measures that run passes of their own, and forwards that go on from a recorded pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lamina.anatomy.trace import first_tensor
from lamina.anatomy.trial import forward_of
from lamina.core.errors import UnsupportedError
from lamina.lab.feed import side_of
from lamina.lab.lab import sequence_losses
from lamina.lab.objective import objective_of, output_of
from lamina.lab.rows import Batch, Rows

if TYPE_CHECKING:
    from lamina.anatomy.parts import Block
    from lamina.lab.lab import Lab

TOGETHER = 16
"""Sequences of one length that are run at once."""
Map = Callable[[Tensor], Tensor]
Call = Callable[..., Any]


def few(lab: Lab, sequences: int | None, length: int | None = None) -> Lab:
    """The same model and counters on at most so many sequences, evenly chosen, the first `length` tokens of each.

    Padding is taken off; sequences of one length come in batches, whatever batches the lab has. Where inputs are no
    tokens, sequences keep their length.
    """
    batches = [(rows, row) for rows in lab.rows() for row in range(rows.sequences)]
    count = len(batches) if sequences is None else min(sequences, len(batches))
    alike: dict[Any, list[Batch]] = {}
    for number in range(count):
        rows, row = batches[number * len(batches) // count]
        one = rows.only(row)
        size = one.mask.shape[1]
        cut = all(t.ndim > 1 and t.shape[1] == size for t in one.batch.values())
        batch = {k: v[:, :length] if cut else v for k, v in one.batch.items()}
        alike.setdefault(tuple((k, tuple(v.shape)) for k, v in batch.items()), []).append(batch)
    together = [
        {k: torch.cat([b[k] for b in group[i : i + TOGETHER]]) for k in group[0]}
        for group in alike.values()
        for i in range(0, len(group), TOGETHER)
    ]
    part = lab.on(together)
    part.counts = lab.counts
    return part


class Resumed:
    """One batch's dense pass, and forwards of the same batch that run the blocks from a certain one on.

    `out` is the dense output; `order` names the blocks in the order in which they ran, `entering` and `leaving` have
    the stream before and behind each, as the model has it. Where blocks' modules are called in other ways than block by
    block, all are run anew each time. Memory: one stream per block.
    """

    def __init__(self, lab: Lab, rows: Rows) -> None:
        self.lab, self.rows = lab, rows
        self.entering: dict[str, Tensor] = {}
        self._results: dict[str, Any] = {}
        self._tokens = int(rows.mask.sum())
        self._paths: dict[str, list[Block]] = {}
        for block in (b for k in lab.anatomy.stacks for b in k.blocks):
            self._paths.setdefault(block.path, []).append(block)
        with torch.no_grad():
            found, calls = self._run(self._noted)
        lab.counts.blocks += self._tokens * lab.depth
        self.out, self.objective = output_of(found), objective_of(lab.model, found)
        self.order = tuple(self._results)
        self._replays = calls == Counter({p: len(b) for p, b in self._paths.items()})

    @property
    def leaving(self) -> dict[str, Tensor]:
        """The stream behind each block."""
        return {b: _stream_of(r, self.entering[b]) for b, r in self._results.items()}

    def rows_at(self, block: str) -> Rows:
        """The positions of the stream of a block."""
        side = side_of(self.lab.anatomy, self.lab.anatomy.block(block))
        return self.rows.of(side).on(self.entering[block])

    def forward(self, start: str, maps: Mapping[str, Map] | None = None) -> Tensor:
        """The output with block `start` and those behind it run anew; `maps` stand in for whole blocks.

        A map takes the stream [batch, tokens, width] before its block and gives the one behind it. Gradients flow
        through what is run, if they are on.
        """
        first = self.order.index(start)
        ran = 0

        def act(block: Block, usual: Call, args: Any, kwargs: Any) -> Any:
            nonlocal ran
            name = block.site.id
            if self._replays and self.order.index(name) < first:
                return self._results[name]
            if maps is not None and name in maps:
                known = self._results[name]
                return _put(known, _stream_of(known, self.entering[name]), maps[name](_given(block, args, kwargs)))
            ran += 1
            return usual(*args, **kwargs)

        found, _ = self._run(act)
        self.lab.counts.blocks += self._tokens * ran
        return output_of(found)

    def losses(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Sums in nats and counts of next-token losses, float64 [sequences].

        Raises UnsupportedError where the model predicts no next tokens.
        """
        self.expect_losses()
        return sequence_losses(out, self.rows.batch)

    def expect_losses(self) -> None:
        """Raise UnsupportedError where the model predicts no next tokens."""
        if self.objective.name != "next-token":
            raise UnsupportedError("the model predicts no next tokens, so there is no loss")

    def later(self, block: str) -> int:
        """How many blocks run behind a block."""
        return len(self.order) - 1 - self.order.index(block)

    def _run(self, act: Call) -> tuple[Any, Counter[str]]:
        calls = Counter[str]()
        with ExitStack() as held:
            for path in self._paths:
                module = self.lab.model.get_submodule(path)
                called = partial(self._called, path, module.forward, act, calls)
                held.enter_context(forward_of(module, called))
            found = self.lab.result(self.rows.batch, count=False)
        self.lab.counts.heads += self._tokens
        return found, calls

    def _called(
        self,
        path: str,
        usual: Call,
        act: Call,
        calls: Counter[str],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        blocks, number = self._paths[path], calls[path]
        calls[path] += 1
        return act(blocks[number], usual, args, kwargs) if number < len(blocks) else usual(*args, **kwargs)

    def _noted(self, block: Block, usual: Call, args: Any, kwargs: Any) -> Any:
        self.entering[block.site.id] = _given(block, args, kwargs)
        self._results[block.site.id] = usual(*args, **kwargs)
        return self._results[block.site.id]


def _given(block: Block, args: Any, kwargs: Any) -> Tensor:
    return args[block.stream] if isinstance(block.stream, int) else kwargs[block.stream]


def _stream_of(result: Any, like: Tensor) -> Tensor:
    found = first_tensor(result, tuple(like.shape))
    found = first_tensor(result) if found is None else found
    assert found is not None
    return found


def _put(structure: Any, old: Tensor, new: Tensor) -> Any:
    """The structure with one tensor in the place of another."""
    return tree_map(lambda v: new if v is old else v, structure)
