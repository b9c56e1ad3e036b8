"""The judge: what a set of dropped sites really costs, with prefix reuse and exact early stopping.

Changing block l never re-runs blocks 0 … l-1: the streams of the accepted set (the base) are kept. A candidate whose
divergence from the dense model already exceeds the best one's, summed over the first sequences, can't win, since
every term is at least zero: it is given up, and the choice stays that of the full comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lamina.anatomy.parts import Block
from lamina.anatomy.trial import inputs_recorded, shorted, silenced
from lamina.anatomy.watch import watch_blocks
from lamina.core.errors import InputError, LaminaError, UnsupportedError, did_you_mean
from lamina.lab.lab import Batch, Lab, real
from lamina.maths import divergence
from lamina.maths.moments import Mean

METRICS: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "kl": divergence.KLFrom,
    "js": lambda reference: partial(divergence.js, reference),
    "js-reversed": lambda reference: partial(divergence.js_reversed, reference),
}
"""Name → function of the dense logits that gives a function of the thinned ones, per position."""
Candidate = frozenset[str]


@dataclass(eq=False)
class _Case:
    """One batch: how its blocks are called, what the dense model says, and the base's streams and branches."""

    batch: Batch
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]]
    compare: Callable[[Tensor], Tensor]
    valid: Tensor
    states: list[Tensor] = field(default_factory=list[Tensor])
    added: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class Judge:
    """Divergence from the dense model, or rise of the loss, with sites gone: mean per token, in nats.

    `metric`: "kl" (dense to thinned), "js", "js-reversed" (as FinerCut's code) or "loss" (next-token loss minus the
    dense model's). `batch_size` sequences are run at once. Models of one stack only.
    """

    def __init__(self, lab: Lab, metric: str = "kl", *, batch_size: int = 1) -> None:
        if metric != "loss" and metric not in METRICS:
            raise InputError(f"no metric named {metric!r}", hint=did_you_mean(metric, [*METRICS, "loss"]))
        if len(lab.anatomy.stacks) != 1:
            raise UnsupportedError(f"the judge takes models of one stack, not {len(lab.anatomy.stacks)}")
        if not lab.anatomy.stacks[0].linked:
            raise UnsupportedError("between this stack's blocks something else happens to the stream", where="judge")
        self.lab, self.metric = lab, metric
        self.stack = lab.anatomy.stacks[0]
        self.stack.expect_unlooped("no judge of its sublayers")
        self.base: Candidate = frozenset()
        self._heard: dict[Candidate, list[float]] = {}
        self.estimates: dict[Candidate, float] = {}
        """What is known of every candidate tried: its value, or the mean over the sequences that were heard."""
        self._cases = [self._case(b) for batch in lab.batches for b in _split(batch, batch_size)]
        self._positions = sum(int(c.valid.sum()) for c in self._cases)

    @property
    def known(self) -> dict[Candidate, float]:
        """Every value that was computed in full."""
        return {gone: sum(heard) / self._positions for gone, heard in self._heard.items()}

    @property
    def heard(self) -> dict[Candidate, list[float]]:
        """What was computed in full, as sums over the tokens of each batch."""
        return dict(self._heard)

    def remember(self, heard: Mapping[Candidate, Sequence[float]]) -> None:
        """Take over what an earlier run over the same model and text `heard`."""
        self._heard.update({gone: list(sums) for gone, sums in heard.items() if len(sums) == len(self._cases)})

    def forget(self) -> None:
        """Compute everything anew when it is asked for."""
        self._heard.clear()

    @torch.no_grad()
    def _case(self, batch: Batch) -> _Case:
        with inputs_recorded(self.lab.model, self.stack) as calls:
            logits = self.lab.forward(batch)
        mask = real(batch).to(logits.device)
        valid = mask[:, 1:] & mask[:, :-1] if self.metric == "loss" else mask
        made = [_without_stream(c, b) for c, b in zip(calls, self.stack.blocks, strict=True)]
        case = _Case(batch, made, self._comparison(logits, batch), valid)
        case.states = [_stream(c, b) for c, b in zip(calls, self.stack.blocks, strict=True)]
        return case

    def _comparison(self, logits: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
        if self.metric != "loss":
            return METRICS[self.metric](logits)
        dense = divergence.nll(logits[:, :-1], batch["input_ids"][:, 1:]).double()
        return lambda new: divergence.nll(new[:, :-1], batch["input_ids"][:, 1:]).double() - dense

    def value(self, gone: Iterable[str]) -> float:
        """The metric with exactly these sublayers gone (blocks may be named too)."""
        found = self._sums(self.lab.anatomy.expand(gone))
        assert found is not None
        return sum(found) / self._positions

    def rises(self, gone: Iterable[str]) -> Mean:
        """The metric with these gone as a mean over tokens, with its error over sequences."""
        sublayers = self.lab.anatomy.expand(gone)
        mean = Mean()
        heard: list[float] = []
        for case in self._cases:
            per_row = self._divergence(case, sublayers).sum(1).cpu().numpy()
            mean.add(per_row, case.valid.sum(1).cpu().numpy())
            heard.append(float(per_row.sum()))
        self._heard[sublayers] = heard
        return mean

    def _sums(self, gone: Candidate, hopeless: Callable[[list[float]], bool] | None = None) -> list[float] | None:
        """The metric's sum over each case, or None as soon as those heard so far are `hopeless`."""
        if not gone:
            return [0.0] * len(self._cases)
        heard = self._heard.get(gone, [])
        if not heard:
            count = 0
            for case in self._cases:
                heard.append(float(self._divergence(case, gone).sum()))
                count += int(case.valid.sum())
                self.estimates[gone] = sum(heard) / count
                if hopeless is not None and hopeless(heard):
                    return None
            self._heard[gone] = heard
        self.estimates[gone] = sum(heard) / self._positions
        return heard

    @torch.no_grad()
    def _divergence(self, case: _Case, gone: Candidate) -> Tensor:
        """The metric per position [batch, positions], float64, zero where nothing is predicted."""
        first, final = self._run(case, gone)
        with shorted(self.lab.model, self.stack, lambda: final):
            logits = self.lab.forward(case.batch, skipped=first)
        return case.compare(logits).double() * case.valid

    def _run(self, case: _Case, gone: Candidate, keep: list[Tensor] | None = None) -> tuple[int, Tensor]:
        """Blocks that were not evaluated, and the final stream, with `gone` gone; starts where the base differs."""
        blocks = self.stack.blocks
        changed = [
            n for n, b in enumerate(blocks) for x in b.branches if (x.site.id in gone) != (x.site.id in self.base)
        ]
        start = min(changed, default=len(blocks))
        if start == len(blocks):
            return len(blocks), self._leaving(case)
        skipped, state = start, case.states[start]
        for number in range(start, len(blocks)):
            block = blocks[number]
            out = [x.site.id for x in block.branches if x.site.id in gone]
            if number == start and (cheap := self._recombined(case, block, state, gone)) is not None:
                state, skipped = cheap, skipped + 1
            elif len(out) == len(block.branches):
                skipped += 1
            else:
                state = self._evaluate(case, number, state, out)
            if keep is not None:
                keep.append(state)
        return skipped, state

    def _leaving(self, case: _Case) -> Tensor:
        return case.states[len(self.stack.blocks)]

    def _recombined(self, case: _Case, block: Block, state: Tensor, gone: Candidate) -> Tensor | None:
        """The block's output from the base's branches, where no branch that stays reads one that changes."""
        if not block.plain:
            return None
        total = state
        for branch in block.branches:
            if branch.site.id in gone:
                continue
            reads = [block.branches[i].site.id for i in branch.reads]
            if branch.site.id not in case.added or any((r in gone) != (r in self.base) for r in reads):
                return None
            total = total + case.added[branch.site.id]
        return total

    def _evaluate(self, case: _Case, number: int, state: Tensor, out: Sequence[str]) -> Tensor:
        block = self.stack.blocks[number]
        args, kwargs = case.calls[number]
        if isinstance(block.stream, int):
            args = (*args[: block.stream], state, *args[block.stream + 1 :])
        else:
            kwargs = {**kwargs, block.stream: state}
        with ExitStack() as held:
            for site in out:
                held.enter_context(silenced(self.lab.model, self.lab.anatomy, site))
            found: Any = self.lab.model.get_submodule(block.path)(*args, **kwargs)
        while isinstance(found, tuple | list):
            found = found[next(i for i, x in enumerate(found) if x is not None)]
        return found

    @torch.no_grad()
    def rebase(self, gone: Iterable[str]) -> None:
        """Accept a set: from now on candidates start from its streams."""
        base = self.lab.anatomy.expand(gone)
        blocks = self.stack.blocks
        for case in self._cases:
            changed = [
                n for n, b in enumerate(blocks) for x in b.branches if (x.site.id in base) != (x.site.id in self.base)
            ]
            whole = len(case.states) > len(blocks)
            start = min(changed, default=len(blocks)) if whole else 0
            state = case.states[start] if start < len(case.states) else self._leaving(case)
            del case.states[start + 1 :]
            for number in range(start, len(blocks)):
                state = self._advance(case, number, state, base)
                case.states.append(state)
        self.base = base

    def _advance(self, case: _Case, number: int, state: Tensor, base: Candidate) -> Tensor:
        """One block of the new base; what its branches add is noted."""
        block = self.stack.blocks[number]
        out = [x.site.id for x in block.branches if x.site.id in base]
        for branch in block.branches:
            case.added.pop(branch.site.id, None)
        if len(out) == len(block.branches):
            return state

        def note(_: Block, __: Tensor, branches: Mapping[str, Tensor], ___: Tensor) -> None:
            case.added.update({k: v for k, v in branches.items() if k not in base})

        self.lab.counts.blocks += int(real(case.batch).sum())
        with watch_blocks(self.lab.model, self.lab.anatomy, note, only=block):
            return self._evaluate(case, number, state, out)

    def least(
        self,
        options: Sequence[str | Iterable[str]],
        *,
        weights: Sequence[float] | None = None,
        hint: Sequence[float] | None = None,
        margin: float | None = None,
    ) -> tuple[int, float]:
        """(place, value) of the option, on top of the base, with the least rise of the metric per weight.

        An option is a site or several. Ties go to the earlier option. `hint` (small = likely to win) orders the work,
        not the result: with a divergence, an option is given up as soon as it is certain to lose. With a `margin` it
        is also given up once its price, on the batches heard so far, exceeds the best one's on the same batches by
        this share.
        """
        known = [self.base | self.lab.anatomy.expand([o] if isinstance(o, str) else o) for o in options]
        levels = self._sums(self.base) if weights is not None else None
        levels = levels or [0.0] * len(self._cases)
        scale = list(weights) if weights is not None else [1.0] * len(known)
        order = sorted(range(len(known)), key=lambda i: hint[i]) if hint is not None else range(len(known))
        winner, best, least = -1, list[float](), math.inf

        def hopeless(heard: list[float], weight: float) -> bool:
            """Whether what was heard of an option rules it out."""
            total, count = sum(heard), len(heard)
            limit = (sum(levels) + least * weight) * (1 + 1e-12)
            if winner < 0 or (self.metric != "loss" and total > limit):
                return winner >= 0
            rival = sum(best[:count])
            return margin is not None and (total - sum(levels[:count])) / weight > rival + margin * abs(rival)

        for place in order:
            heard = self._sums(known[place], partial(hopeless, weight=scale[place]))
            if heard is None:
                continue
            price = (sum(heard) - sum(levels)) / scale[place]
            if price < least or (price == least and place < winner):
                winner, least = place, price
                best = [(h - b) / scale[place] for h, b in zip(heard, levels, strict=True)]
        if winner < 0:
            raise LaminaError(f"the {self.metric} is not a number for any candidate", hint="try --dtype float32")
        return winner, self.value(known[winner])


def _split(batch: Batch, size: int) -> list[Batch]:
    count = len(batch["input_ids"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, count, size)]


def _stream(call: tuple[tuple[Any, ...], Mapping[str, Any]], block: Block) -> Tensor:
    return call[0][block.stream] if isinstance(block.stream, int) else call[1][block.stream]


def _without_stream(
    call: tuple[tuple[Any, ...], Mapping[str, Any]], block: Block
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    args, kwargs = call
    if isinstance(block.stream, int):
        return (*args[: block.stream], None, *args[block.stream + 1 :]), kwargs
    return args, {**kwargs, block.stream: None}
