"""Trials: take every site away once, and hand what the network then does to all tallies that ask.

A site of block l changes nothing before it: blocks 0 … l-1 hand on what they gave in the dense pass. Where a branch's
output is known and no other branch of its block reads it, its own block is not run either. Several sites are tried in
one forward, as rows of a larger batch, where the blocks allow it. Over all sublayers of L blocks that costs about
L · L block evaluations, half of what 2 · L plain forwards would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lamina.anatomy.trace import first_tensor
from lamina.anatomy.trial import ablated, forward_of, handed_on, silenced, wrapped
from lamina.anatomy.watch import watch_blocks
from lamina.core.sites import Kind, Site
from lamina.lab.feed import side_of
from lamina.lab.objective import Objective, objective_of, output_of
from lamina.lab.rows import Rows

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block
    from lamina.lab.lab import Lab

VARIANTS = 4096
"""Tokens of all sites that are tried in one forward; a batch of more is tried site by site."""


@dataclass(eq=False)
class Pass:
    """What the network did on one batch: `out` [batch, …, features], and what each block handed on, by site id."""

    out: Tensor
    leaving: dict[str, Tensor]


@dataclass(eq=False)
class Trial:
    """One site gone on one batch: the dense pass and the thinned one. Blocks before the site's hand on the same."""

    site: Site
    rows: Rows
    objective: Objective
    dense: Pass
    thinned: Pass
    blocks: tuple[str, ...]
    """The ids of the site's stack, in order."""
    side: str = "encoder"

    @cached_property
    def rise(self) -> tuple[Tensor, Tensor]:
        """Damage per position, float64, and which positions count, [batch, positions]."""
        return self.objective.rise(self.dense.out, self.thinned.out, self.rows.batch)

    def states(self, block: str) -> tuple[Tensor, Tensor]:
        """The streams behind a block, dense and thinned, float32 [tokens, width], padding gone."""
        dense = self.dense.leaving[block]
        rows = self.rows.of(self.side).on(dense)
        return rows.strip(dense).float(), rows.strip(self.thinned.leaving[block]).float()


@dataclass(eq=False)
class _Record:
    """The dense pass of one batch: what each call of a block's module returned, and what its branches added."""

    out: Tensor
    objective: Objective
    results: dict[str, Any] = field(default_factory=dict[str, Any])
    entering: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    added: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def leaving(self) -> dict[str, Tensor]:
        return {b: _tensor(r, self.entering[b]) for b, r in self.results.items()}


def _tensor(result: Any, like: Tensor) -> Tensor:
    found = first_tensor(result, tuple(like.shape))
    found = first_tensor(result) if found is None else found
    assert found is not None
    return found


class Trials:
    """The sweep of a lab: see the module. `variants` limits the tokens of one forward."""

    def __init__(self, lab: Lab, variants: int = VARIANTS) -> None:
        self.lab, self.variants = lab, variants
        self.order = [b for k in lab.anatomy.stacks for b in k.blocks]
        self.number = {b.site.id: n for n, b in enumerate(self.order)}

    @torch.no_grad()
    def run(self, tallies: Sequence[Any], sites: Sequence[Site] | None = None) -> None:
        """Try all sites that a tally takes (`tally.kinds`; those of `sites` alone, if given) on every batch."""
        anatomy = self.lab.anatomy
        kinds = {k for t in tallies for k in t.kinds}
        chosen = [s for s in (anatomy.sites if sites is None else sites) if s.kind in kinds]
        done, total = 0, self.lab.sequences * len(chosen)
        for rows in self.lab.rows():
            record = self._dense(rows)
            for group in self._groups(chosen, rows, record):
                for site, thinned in zip(group, self._thinned(rows, record, group), strict=True):
                    blocks = tuple(b.site.id for b in anatomy.stack(site).blocks)
                    dense, side = Pass(record.out, record.leaving), side_of(anatomy, anatomy.block(site))
                    trial = Trial(site, rows, record.objective, dense, thinned, blocks, side)
                    for tally in tallies:
                        if site.kind in tally.kinds:
                            tally.add(site, trial)
                    done += rows.sequences
                self.lab.progress("trials", done, total)

    def _dense(self, rows: Rows) -> _Record:
        record = _Record(torch.empty(0), Objective("output"))
        turns: Counter[str] = Counter()

        def note(block: Block, entering: Tensor, added: Mapping[str, Tensor], leaving: Tensor) -> None:
            record.entering[block.site.id] = entering
            if block.plain:
                record.added.update(added)

        handles = []
        for path in {b.path for b in self.order}:
            mine = [b.site.id for b in self.order if b.path == path]

            def closes(_: Any, __: Any, result: Any, path: str = path, mine: list[str] = mine) -> None:
                if turns[path] < len(mine):
                    record.results[mine[turns[path]]] = result
                turns[path] += 1

            handles.append(self.lab.model.get_submodule(path).register_forward_hook(closes))
        try:
            with watch_blocks(self.lab.model, self.lab.anatomy, note):
                found = self.lab.result(rows.batch)
        finally:
            for handle in handles:
                handle.remove()
        record.out, record.objective = output_of(found), objective_of(self.lab.model, found)
        record.calls = turns
        return record

    def _groups(self, sites: Sequence[Site], rows: Rows, record: _Record) -> Iterable[list[Site]]:
        """Sites that are tried together: neighbours in depth, so that they share a prefix."""
        most = max(1, self.variants // max(rows.mask.numel(), 1)) if self._batches(rows, record) else 1
        for start in range(0, len(sites), most):
            yield list(sites[start : start + most])

    def _replays(self, record: _Record) -> bool:
        """Whether each block's module ran as often as there are blocks of it."""
        return record.calls == Counter(b.path for b in self.order)

    def _batches(self, rows: Rows, record: _Record) -> bool:
        """Whether rows of several trials can go through the blocks at once: they return one tensor of as many."""
        if not self._replays(record) or any(b.turns > 1 for b in self.order):
            return False
        size = len(rows.mask)
        for block in self.order:
            stack = self.lab.anatomy.stack(block.site)
            tensors = [t for t in tree_leaves(record.results[block.site.id]) if isinstance(t, Tensor)]
            entering = record.entering[block.site.id]
            if len(tensors) != 1 or stack.carries or entering.ndim != 3 or len(entering) != size or not block.plain:
                return False
        return True

    def _thinned(self, rows: Rows, record: _Record, sites: Sequence[Site]) -> list[Pass]:
        looped = any(self.lab.anatomy.block(s).turns > 1 and s.kind is not Kind.BLOCK for s in sites)
        if looped or not self._replays(record):
            return [self._plainly(rows, site) for site in sites]
        runs = _Replay(self, rows, record, sites)
        with ExitStack() as held:
            for path in dict.fromkeys(b.path for b in self.order):
                module = self.lab.model.get_submodule(path)
                held.enter_context(forward_of(module, runs.forward(path, module.forward)))
            batch = rows.batch
            if len(sites) > 1:
                size = len(rows.mask)
                batch = {
                    k: v.repeat(len(sites), *([1] * (v.ndim - 1))) if len(v) == size else v for k, v in batch.items()
                }
            out = output_of(self.lab.result(batch, count=False))
        size = len(out) // len(sites)
        outs = out.split(size) if len(sites) > 1 else [out]
        self.lab.counts.heads += int(rows.mask.sum()) * len(sites)
        self.lab.counts.blocks += int(rows.mask.sum()) * runs.evaluated
        return [Pass(o, leaving) for o, leaving in zip(outs, runs.leaving, strict=True)]

    def _plainly(self, rows: Rows, site: Site) -> Pass:
        """A whole forward with the site gone: where blocks can't be replayed."""
        leaving: dict[str, Tensor] = {}

        def note(block: Block, _: Tensor, __: Mapping[str, Tensor], out: Tensor) -> None:
            leaving[block.site.id] = out

        with ablated(self.lab.model, self.lab.anatomy, [site.id]), watch_blocks(self.lab.model, self.lab.anatomy, note):
            return Pass(output_of(self.lab.result(rows.batch)), leaving)


class _Replay:
    """The forwards that stand in for the blocks while `sites` are tried together, one share of the rows each."""

    def __init__(self, trials: Trials, rows: Rows, record: _Record, sites: Sequence[Site]) -> None:
        self.trials, self.record, self.sites = trials, record, sites
        self.anatomy: Anatomy = trials.lab.anatomy
        self.starts = [trials.number[self.anatomy.block(s).site.id] for s in sites]
        self.size = len(rows.mask)
        self.evaluated = 0
        self.leaving: list[dict[str, Tensor]] = [{} for _ in sites]
        self._calls: Counter[str] = Counter()

    def forward(self, path: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        """What the module at `path` does instead."""
        mine = [b for b in self.trials.order if b.path == path]

        def replaced(*args: Any, **kwargs: Any) -> Any:
            block = mine[self._calls[path]]
            self._calls[path] += 1
            number = self.trials.number[block.site.id]
            known = self.record.results[block.site.id]
            if all(number < start for start in self.starts):
                self._note(range(len(self.sites)), block, _tensor(known, self.record.entering[block.site.id]))
                return known if len(self.sites) == 1 else self._joined(block, [self._known(block)] * len(self.sites))
            if len(self.sites) == 1:
                return self._alone(block, number, usual, args, kwargs)
            return self._joined(block, self._parts(block, number, usual, args, kwargs))

        return replaced

    def _alone(self, block: Block, number: int, usual: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        site = self.sites[0]
        if number == self.starts[0]:
            if (cheap := self._recombined(block, site)) is not None:
                result: Any = _put(self.record.results[block.site.id], self._known(block), cheap)
            else:
                result = self._without(block, site, usual, args, kwargs)
        else:
            self.evaluated += 1
            result = usual(*args, **kwargs)
        self._note([0], block, _tensor(result, self.record.entering[block.site.id]))
        return result

    def _parts(self, block: Block, number: int, usual: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor]:
        """Each trial's rows of the block's output, in order."""
        running = [v for v, start in enumerate(self.starts) if number > start]
        found: dict[int, Tensor] = {}
        if running:
            pieces = torch.cat([torch.arange(v * self.size, (v + 1) * self.size) for v in running])
            out = usual(*_rows(args, pieces, self._total), **_rows(kwargs, pieces, self._total))
            self.evaluated += len(running)
            found |= dict(zip(running, _tensor(out, self._known(block)).split(self.size), strict=True))
        for v, (site, start) in enumerate(zip(self.sites, self.starts, strict=True)):
            if number < start:
                found[v] = self._known(block)
            elif number == start:
                cheap = self._recombined(block, site)
                if cheap is None:
                    pieces = torch.arange(v * self.size, (v + 1) * self.size)
                    given = _rows(args, pieces, self._total), _rows(kwargs, pieces, self._total)
                    cheap = _tensor(self._without(block, site, usual, *given), self._known(block))
                found[v] = cheap
        for v, out in found.items():
            self._note([v], block, out)
        return [found[v] for v in range(len(self.sites))]

    @property
    def _total(self) -> int:
        return self.size * len(self.sites)

    def _known(self, block: Block) -> Tensor:
        return _tensor(self.record.results[block.site.id], self.record.entering[block.site.id])

    def _joined(self, block: Block, parts: Sequence[Tensor]) -> Any:
        whole = torch.cat(list(parts))
        return whole if isinstance(self.record.results[block.site.id], Tensor) else wrapped(whole, block.returns)

    def _note(self, variants: Iterable[int], block: Block, out: Tensor) -> None:
        for v in variants:
            self.leaving[v][block.site.id] = out

    def _recombined(self, block: Block, site: Site) -> Tensor | None:
        """The block's output from what its branches added, where no branch that stays reads one that goes."""
        gone = {p.id for p in self.anatomy.parts(site)}
        entering = self.record.entering[block.site.id]
        if not block.plain or (site.kind is Kind.BLOCK and self.anatomy.stack(site).carries):
            return None
        total = entering
        for branch in block.branches:
            if branch.site.id in gone:
                continue
            if branch.site.id not in self.record.added or any(block.branches[i].site.id in gone for i in branch.reads):
                return None
            total = total + self.record.added[branch.site.id]
        return total

    def _without(self, block: Block, site: Site, usual: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The block run without the site; a whole block that does more than add hands its stream on."""
        if site.kind is Kind.BLOCK:
            return handed_on(block, self.anatomy.stack(site).carries, args, kwargs)
        self.evaluated += 1
        with silenced(self.trials.lab.model, self.anatomy, site.id):
            return usual(*args, **kwargs)


def _rows(given: Any, index: Tensor, total: int) -> Any:
    """The rows of all tensors that have as many rows as the batch."""

    def pick(value: Any) -> Any:
        rows = isinstance(value, Tensor) and value.ndim > 1 and len(value) == total
        return value[index.to(value.device)] if rows else value

    return tree_map(pick, given)


def _put(structure: Any, old: Tensor, new: Tensor) -> Any:
    """The structure with one tensor in the place of another."""
    return tree_map(lambda v: new if v is old else v, structure)
