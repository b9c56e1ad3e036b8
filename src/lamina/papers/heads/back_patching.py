"""Hopping Too Late: a late block's state, put back behind an earlier block, may know what the model failed to say."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lamina.core.scores import Array, Grid, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.taps import Taps

PAPER = Paper(
    key="biran2024hopping",
    title="Hopping Too Late: Exploring the Limitations of Large Language Models on Multi-Hop Queries",
    authors=("Eden Biran", "Daniela Gottesman", "Sohee Yang", "Mor Geva", "Amir Globerson"),
    year=2024,
    arxiv="2406.12775",
)

TOKENS = 4096
"""Tokens that are run at once."""


@measure(
    "back-patching",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.ABLATION,
    deviations=(
        "the text's sequences and the token that follows them, at the last position; the paper asks two-hop "
        "questions, and patches the first entity too",
        "success is told by the true token's log-probability, and by whether it comes first; the paper reads ten "
        "decoded tokens",
        "a block's score as a source is lamina's choice: the paper shows the map of sources and targets",
    ),
)
@dataclass(frozen=True, kw_only=True)
class BackPatching:
    """How much surer of the true next token a model is when a block's last state is put back behind earlier blocks.

    gain(s, t) = rise of the log-probability, in nats, with the output of block t at the last position replaced by that
    of block s > t; the score of s is the mean over t < s of max(0, gain), over `sequences` sequences of up to `length`
    tokens. The grid `gain` [sources, targets] has mean gains, `first` the share of sequences whose true token then
    comes first, and `found` how many are right as they are, or after some patch.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_identity_block_is_lowest": "the first block has no earlier target and so no score, and a block that "
        "passes its input on helps as much as the one before it does",
        "check_errors_are_over_sequences": "at most `sequences` of the text are looked at, so that more text than that "
        "does not make the error smaller",
    }

    sequences: int = 4
    length: int = 16

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"sequences must be at least 1, not {self.sequences}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, not {self.length}")

    def measure(self, lab: Lab) -> Scores:
        """A forward over each sequence, and from every target on one for each later source."""
        from lamina.core.scores import Scores
        from lamina.lab.lab import decoder
        from lamina.lab.prompts import prompts
        from lamina.maths.moments import Mean

        decoder(lab.anatomy)  # raises for a model that predicts no tokens
        lab.anatomy.stacks[0].expect_unlooped("no states are put back")
        blocks = [b.site.id for b in lab.anatomy.stacks[0].blocks]
        gains, ranks, before = [], [], []
        chosen = prompts(lab, self.sequences, self.length + 1, shortest=3)
        for done, ids in enumerate(chosen):
            gain, first, clean = back_patched(lab, ids[:-1], int(ids[-1]))
            gains.append(gain)
            ranks.append(first)
            before.append(clean)
            lab.progress("back-patching", done + 1, len(chosen))
        values, errors = {}, {}
        for source in range(1, len(blocks)):
            mean = Mean()
            helped = [[np.maximum(gain[source, :source], 0.0).mean()] for gain in gains]
            mean.add(helped, np.ones(len(helped)))
            values[blocks[source]], errors[blocks[source]] = mean.value, mean.stderr
        grids = _grids(blocks, np.stack(gains), np.stack(ranks), np.array(before))
        missing = {blocks[0]: "no block comes before it"}
        return Scores(measure=self.card.name, values=values, stderr=errors, grids=grids, missing=missing)


def _grids(blocks: list[str], gains: Array, first: Array, before: Array) -> dict[str, Grid]:
    from lamina.core.scores import Grid

    right = np.stack([before, np.nansum(first, (1, 2)) > 0]).astype(bool)
    table = [[np.sum((right[0] == now) & (right[1] == then)) for then in (False, True)] for now in (True, False)]
    names = tuple(blocks)
    return {
        "gain": Grid(values=gains.mean(0), rows=names, columns=names),
        "first": Grid(values=first.mean(0), rows=names, columns=names),
        "found": Grid(
            values=np.array(table, dtype=np.float64),
            rows=("right as it is", "wrong as it is"),
            columns=("right after no patch", "right after some patch"),
        ),
    }


def back_patched(lab: Lab, ids: Tensor, answer: int) -> tuple[Array, Array, bool]:
    """Of one sequence of ids [tokens]: gains in nats [blocks, blocks] of sources (rows) put back behind targets, NaN
    where the source is not later; 1.0 where the answer then comes first; and whether it does as it is.
    """  # fmt: skip
    import torch

    seen = _States()
    bench = lab.on([{"input_ids": ids.unsqueeze(0)}])
    bench.counts = lab.counts
    bench.stream([seen], "states", score=False)
    depth = len(seen.leaving)
    gains, first = np.full((depth, depth), np.nan), np.full((depth, depth), np.nan)
    ends = torch.stack([s[-1] for s in seen.leaving])
    clean, right = _answered(bench, ends[-1:], answer)
    for target in range(depth - 1):
        made = run_from(bench, ids, target, seen.leaving[target], ends[target + 1 :])
        told, says = _answered(bench, made, answer)
        gains[target + 1 :, target], first[target + 1 :, target] = told - clean, says
    return gains, first, bool(right[0])


def _answered(lab: Lab, states: Tensor, answer: int) -> tuple[Array, Array]:
    """Log-probability of the answer in final states [n, width], and whether it comes first, float64 [n]."""
    logits = lab.decode(states).double()
    told = logits.log_softmax(-1)[:, answer]
    return told.cpu().numpy(), (logits.argmax(-1) == answer).double().cpu().numpy()


def run_from(lab: Lab, ids: Tensor, target: int, stream: Tensor, ends: Tensor) -> Tensor:
    """Final states [n, width] at the last token when block `target` hands on `stream` [tokens, width] with each of
    `ends` [n, width] in turn in its last place; blocks up to the target are not run.
    """  # fmt: skip
    import torch

    from lamina.anatomy.trace import first_tensor
    from lamina.anatomy.trial import forward_of, passed, wrapped

    stack, model = lab.anatomy.stacks[0], lab.model
    found: list[Tensor] = []
    for part in ends.split(max(1, TOKENS // len(ids))):
        states = stream.repeat(len(part), 1, 1)
        states[:, -1] = part
        states = states.to(next(model.parameters()).dtype)

        def hands(*_: Any, states: Tensor = states, **__: Any) -> Any:
            return wrapped(states, stack.blocks[target].returns)

        def note(_: Any, __: Any, out: Any) -> None:
            made = first_tensor(out)
            assert made is not None
            found.append(made[:, -1].float())

        with ExitStack() as held, torch.no_grad():
            for block in stack.blocks[:target]:
                held.enter_context(passed(model, block, stack.carries))
            held.enter_context(forward_of(model.get_submodule(stack.blocks[target].path), hands))
            handle = model.get_submodule(stack.blocks[-1].path).register_forward_hook(note)
            held.callback(handle.remove)
            lab.forward({"input_ids": ids.repeat(len(part), 1)}, head=False, skipped=target + 1)
    return torch.cat(found)


@dataclass(eq=False)
class _States:
    """The stream behind every block [tokens, width], in depth order."""

    leaving: list[Tensor] = field(default_factory=list)

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one block."""
        if site.kind is Kind.BLOCK:
            self.leaving.append(taps.leaving)

    def merge(self, other: _States) -> _States:
        """Never asked for: it listens to one pass."""
        raise TypeError("it listens to one pass")

    def scores(self) -> Scores:
        """Never asked for: the measure has them."""
        raise TypeError("ask the measure")
