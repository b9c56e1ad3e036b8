"""Walk a text through a stack block by block, all batches at each block, with some branches gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.anatomy.trial import inputs_recorded, silenced
from lamina.anatomy.watch import watch_blocks
from lamina.core.errors import UnsupportedError
from lamina.lab.lab import real

if TYPE_CHECKING:
    from lamina.anatomy.parts import Block, Branch
    from lamina.lab.lab import Batch, Lab


class Walk:
    """The streams [batch, tokens, width] of a text before block `at` of a stack, with the sublayers `gone`.

    Every block is run once per `step`, on the weights that it has at that moment.
    """

    def __init__(self, lab: Lab, gone: Iterable[str] = (), stack: int = 0) -> None:
        self.lab, self.stack = lab, lab.anatomy.stacks[stack]
        if not self.stack.linked:
            raise UnsupportedError("between this stack's blocks something else happens to the stream", where="walk")
        self.stack.expect_unlooped("no walk from block to block")
        self.gone = lab.anatomy.expand(gone)
        self.at = 0
        self._calls: list[list[tuple[tuple[Any, ...], Mapping[str, Any]]]] = []
        self.streams: list[Tensor] = []
        for batch in lab.batches:
            self._record(batch)

    @torch.no_grad()
    def _record(self, batch: Batch) -> None:
        """How the blocks are called; the blocks themselves hand their input on."""
        from lamina.anatomy.trial import shorted

        first = self.stack.blocks[0]
        with inputs_recorded(self.lab.model, self.stack) as calls:
            held: list[Tensor] = []

            def opening() -> Tensor:
                args, kwargs = calls[0]
                held.append(args[first.stream] if isinstance(first.stream, int) else kwargs[first.stream])
                return held[0]

            with shorted(self.lab.model, self.stack, opening):
                self.lab.forward(batch, head=False, skipped=self.lab.depth)
        self._calls.append(list(calls))
        self.streams.append(held[0])

    @property
    def block(self) -> Block:
        """The block that the next step runs."""
        return self.stack.blocks[self.at]

    @torch.no_grad()
    def step(self) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Run one block on all batches and go on behind it: what each branch adds, and the streams that leave."""
        added, streams = self.run()
        self.go(streams)
        return added, streams

    @torch.no_grad()
    def run(self) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Run the block and stay: per batch, what each of its branches adds, and the streams that leave."""
        added, streams, _ = self._run(self.gone)
        return added, streams

    def go(self, streams: list[Tensor]) -> None:
        """Go on behind the block with these streams."""
        self.streams = streams
        self.at += 1

    @torch.no_grad()
    def tried(self, branch: Branch, added: list[dict[str, Tensor]]) -> list[Tensor]:
        """What one branch adds with the weights of this moment, per batch; the walk stays.

        `added` is what the branches of the block add (see `run`): where the block is nothing but a sum, the others are
        not run again.
        """
        alone = self.block.plain and not branch.joins and len(self.block.branches) > 1
        if not alone:
            return [notes[branch.site.id] for notes in self._run(self.gone)[0]]
        reads = [self.block.branches[n].site.id for n in branch.reads]
        others = {x.site.id for x in self.block.branches if x is not branch}
        share = branch.macs / max(self.block.macs, branch.macs, 1)
        kept = self.streams
        self.streams = [
            sum((notes[r] for r in reads if r in notes), stream) for stream, notes in zip(kept, added, strict=True)
        ]
        try:
            return [notes[branch.site.id] for notes in self._run(self.gone | others, share=share)[0]]
        finally:
            self.streams = kept

    def skip(self) -> None:
        """Go on behind a block without running it: the streams are what they are."""
        self.at += 1

    @torch.no_grad()
    def look(self, branch: Branch, without: Iterable[str] = ()) -> tuple[list[Tensor], list[Tensor]]:
        """Run the block without some more of its branches and stay: the streams, and the inputs of the last map of
        `branch` [batch, tokens, features].
        """
        _, streams, inputs = self._run(self.gone | set(without), branch)
        return streams, inputs

    def _run(
        self, gone: Iterable[str], tail: Branch | None = None, share: float = 1.0
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], list[Tensor]]:
        block, gone = self.block, frozenset(gone)
        module = self.lab.model.get_submodule(block.path)
        out = [x.site.id for x in block.branches if x.site.id in gone]
        added, streams, inputs = list[dict[str, Tensor]](), list[Tensor](), list[Tensor]()
        with ExitStack() as held:
            for site in out:
                held.enter_context(silenced(self.lab.model, self.lab.anatomy, site))
            if tail is not None and tail.tail:
                handle = module.get_submodule(tail.tail).register_forward_pre_hook(lambda _, a: inputs.append(a[0]))
                held.callback(handle.remove)
            for place, batch in enumerate(self.lab.batches):
                notes: dict[str, Tensor] = {}
                if len(out) == len(block.branches):
                    streams.append(self.streams[place])
                else:
                    note = _noting(notes, gone)
                    with watch_blocks(self.lab.model, self.lab.anatomy, note, only=block):
                        streams.append(self._call(module, block, place))
                    self.lab.counts.blocks += int(int(real(batch).sum()) * share)
                added.append(notes)
        return added, streams, inputs

    def _call(self, module: nn.Module, block: Block, place: int) -> Tensor:
        args, kwargs = self._calls[place][self.at]
        state = self.streams[place]
        if isinstance(block.stream, int):
            args = (*args[: block.stream], state, *args[block.stream + 1 :])
        else:
            kwargs = {**kwargs, block.stream: state}
        out: Any = module(*args, **kwargs)
        while isinstance(out, tuple | list):
            out = next(x for x in out if x is not None)
        return out


def _noting(notes: dict[str, Tensor], gone: frozenset[str]) -> Any:
    def note(_: Block, __: Tensor, added: Mapping[str, Tensor], ___: Tensor) -> None:
        notes.update({k: v for k, v in added.items() if k not in gone})

    return note
