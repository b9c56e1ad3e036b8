"""Feed tallies: what a forward shows of each block, handed on site by site with padding gone.

A tally may ask for more than the stream by its attribute `wants`:

- "inner": `taps.inner`, the input of a sublayer's last linear map, whose columns are its heads or neurons;
- "attention": `taps.attention`, weights of attentions, computed when asked for;
- "linears": linear maps as sites of their own, with `taps.x` their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.anatomy.watch import watch_blocks
from lamina.core.errors import LaminaError
from lamina.core.sites import Kind, Site
from lamina.lab.attention import ATTENTIONS, Attention, attention_recorded
from lamina.lab.rows import Rows
from lamina.lab.taps import SharedTaps, Streams, Taps

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block
    from lamina.lab.protocols import Tally

WANTS = frozenset({"inner", "attention", "linears", "weights"})
UNITS = (Kind.HEAD, Kind.KV_GROUP, Kind.NEURON)


def wants_of(tallies: Iterable[Any]) -> frozenset[str]:
    """What these tallies ask for beside the stream."""
    asked = frozenset(w for t in tallies for w in getattr(t, "wants", ()))
    if asked - WANTS:
        raise LaminaError(
            f"no tap is named {', '.join(sorted(asked - WANTS))}", hint=f"known: {', '.join(sorted(WANTS))}"
        )
    return asked


@dataclass(eq=False)
class Extras:
    """What was seen inside the block that runs: by path, the inputs of its linear maps; attention by site.

    `keep`: all blocks have run already, and what was seen is kept.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    attention: Callable[[str], Attention | None] = field(default=lambda site: None)
    keep: bool = False


class Feeder:
    """A watcher of blocks that hands one batch's taps to tallies, each site in depth order: block, sublayers, maps."""

    def __init__(self, anatomy: Anatomy, rows: Rows, tallies: Sequence[Tally], extras: Extras | None = None) -> None:
        self.anatomy, self.rows, self.tallies = anatomy, rows, tallies
        self.extras = extras or Extras()
        self.wants = wants_of(tallies)

    def __call__(self, block: Block, entering: Tensor, branches: Mapping[str, Tensor], leaving: Tensor) -> None:
        """One block on the batch."""
        rows = self.rows.of(side_of(self.anatomy, block)).on(entering)
        _expect_finite(block, leaving, rows)
        for site, taps in self._taps(block, rows, entering, branches, leaving):
            taps.rows = rows
            self._hand(site, taps)
            if site.kind is not Kind.BLOCK and "linears" in self.wants:
                self._maps(site, rows)
        if not self.extras.keep:
            self.extras.inputs.clear()

    def _hand(self, site: Site, taps: Taps) -> None:
        if site.kind is not Kind.BLOCK and "inner" in self.wants:
            found = self.extras.inputs.get(inner_path(self.anatomy, site))
            if found is not None and found.shape[:-1].numel() == taps.rows.mask.numel():
                taps.inner = taps.rows.strip(found.reshape(*taps.rows.mask.shape, -1))
        if site.kind in ATTENTIONS and "attention" in self.wants:
            taps.attention = self.extras.attention(site.id)
            if taps.attention is not None:
                taps.attention.rows = taps.rows
                taps.attention.crossed = site.kind is Kind.CROSS_ATTENTION
        for tally in self.tallies:
            tally.add(site, taps)

    def _maps(self, site: Site, rows: Rows) -> None:
        for linear in self.anatomy.linears(site):
            given = self.extras.inputs.get(linear.path)
            if given is None or given.shape[:-1].numel() != rows.mask.numel():
                continue
            inputs = rows.strip(given)
            taps = Taps(inputs, inputs[:, :0], rows.sequence.to(inputs.device), rows.sequences, rows=rows)
            for tally in self.tallies:
                if "linears" in getattr(tally, "wants", ()):
                    tally.add(linear, taps)

    def _taps(
        self, block: Block, rows: Rows, entering: Tensor, branches: Mapping[str, Tensor], leaving: Tensor
    ) -> Iterator[tuple[Site, Taps]]:
        ids, count, strip = rows.sequence.to(entering.device), rows.sequences, rows.strip
        if not block.plain:
            yield from self._in_course(block, rows, entering, branches, leaving)
            return
        added = [strip(branches[x.site.id]) for x in block.branches]
        streams = Streams(strip(entering), added, strip(leaving))
        yield block.site, SharedTaps(streams, [0], range(1, len(added) + 1), ids, count)
        for place, branch in enumerate(block.branches):
            yield branch.site, SharedTaps(streams, [0, *(r + 1 for r in branch.reads)], [place + 1], ids, count)

    def _in_course(
        self, block: Block, rows: Rows, entering: Tensor, branches: Mapping[str, Tensor], leaving: Tensor
    ) -> Iterator[tuple[Site, Taps]]:
        """The taps of a block that does more to its stream than add to it: each branch with the stream it joins."""
        strip, ids = rows.strip, rows.sequence.to(entering.device)
        course = block.course(self.anatomy.model.get_submodule(block.path), entering, branches)
        yield block.site, Taps(strip(entering), strip(leaving - entering), ids, rows.sequences, out=strip(leaving))
        for stream, branch in zip(course, block.branches, strict=False):
            added = branches.get(branch.site.id)
            added = torch.zeros_like(stream) if added is None else added
            yield branch.site, Taps(strip(stream), strip(added), ids, rows.sequences)


def _expect_finite(block: Block, leaving: Tensor, rows: Rows) -> None:
    """Raise LaminaError, naming site and batch, where the stream is not a number; one reduction of the stream."""
    if torch.isfinite(leaving.sum()) or bool(torch.isfinite(rows.strip(leaving)).all()):
        return
    bad = ~torch.isfinite(rows.strip(leaving)).all(-1)
    place = rows.offset + int(rows.sequence[bad.cpu()][0])
    raise LaminaError(
        f"the stream holds NaN or Inf behind this block, in batch {rows.number} (sequence {place} of the text)",
        where=block.site.id,
        hint="try --dtype float32, or take that sequence out",
    )


def side_of(anatomy: Anatomy, block: Block) -> str:
    """Whether a block belongs to an encoder-decoder's decoder, which looks at the encoder's stream, or not."""
    crossed = any(x.site.kind is Kind.CROSS_ATTENTION for b in anatomy.stack(block.site).blocks for x in b.branches)
    return "decoder" if crossed else "encoder"


def inner_path(anatomy: Anatomy, site: Site) -> str:
    """The path of the linear map whose input columns are a sublayer's heads or neurons, else of its last map; or ''."""
    held = anatomy.__dict__.setdefault("_inner_paths", {})
    if site.id not in held:
        tails = [t for kind in UNITS for u in anatomy.units(site, kind) if (t := anatomy.tail(u))]
        branch = anatomy.branch(site)
        last = f"{anatomy.block(site).path}.{branch.tail}" if branch.tail else ""
        held[site.id] = next(iter(tails), last)
    return held[site.id]


@contextmanager
def inputs_noted(model: nn.Module, paths: Iterable[str], extras: Extras) -> Iterator[None]:
    """Inside, what enters the modules of these paths is noted in `extras.inputs`."""
    handles = []
    for path in dict.fromkeys(p for p in paths if p):

        def note(_: nn.Module, args: Any, path: str = path) -> None:
            if args and isinstance(args[0], Tensor):
                extras.inputs[path] = args[0]

        handles.append(model.get_submodule(path).register_forward_pre_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def feeding(anatomy: Anatomy, rows: Rows, tallies: Sequence[Tally], only: Block | None = None) -> Iterator[None]:
    """Inside, a forward over one batch (or `only` one block's run) feeds the tallies; afterwards no hook is left."""
    wants = wants_of(tallies)
    extras = Extras()
    blocks = [b for k in anatomy.stacks for b in k.blocks if only is None or b is only]
    paths: list[str] = []
    for branch in (x for b in blocks for x in b.branches):
        paths += [inner_path(anatomy, branch.site)] if "inner" in wants else []
        paths += [s.path for s in anatomy.linears(branch.site)] if "linears" in wants else []
    with ExitStack() as held:
        if paths:
            held.enter_context(inputs_noted(anatomy.model, paths, extras))
        if "attention" in wants:
            extras.attention = held.enter_context(attention_recorded(anatomy.model, anatomy))
        feeder = Feeder(anatomy, rows, tallies, extras)
        held.enter_context(watch_blocks(anatomy.model, anatomy, feeder, only))
        yield
