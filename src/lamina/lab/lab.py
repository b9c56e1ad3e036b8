"""The lab: one model on one text. Runs passes, hands out taps, takes sites away on trial, and counts what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.anatomy.trial import ablated, shorted
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.sites import Kind
from lamina.lab.feed import feeding
from lamina.lab.objective import output_of, token_losses
from lamina.lab.rows import Batch, Rows, real, sequence_keys

if TYPE_CHECKING:
    from lamina.core.scores import Scores
    from lamina.lab.protocols import Tally

ASIDE = frozenset({"concept"})
"""Entries of a batch that tell measures of its sequences and are no inputs of the model."""
Progress = Callable[[str, int, int], None]
"""(what, done, total): called as work goes on."""


def quiet(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass
class Counts:
    """What a lab has run: all in tokens, so that batching does not matter.

    `blocks` counts tokens × blocks evaluated, `heads` tokens whose logits were computed, `backwards` tokens × blocks
    differentiated.
    """

    blocks: int = 0
    heads: int = 0
    backwards: int = 0

    def passes(self, tokens: int, depth: int) -> float:
        """Forward-equivalents over `tokens` tokens of a model `depth` blocks deep; a backward counts as one."""
        return (self.blocks + self.backwards) / (tokens * depth)


class Lab:
    """A model, its anatomy and a text of token ids [sequences, tokens] (or batches of model inputs).

    `model` is put into evaluation mode; else it is left as it was, and only rewrites and healers change it. `offset` is
    the number of the text's first sequence, where it is a part of a longer one.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Tensor | Sequence[Batch],
        *,
        anatomy: Anatomy | None = None,
        batch_size: int = 4,
        seed: int = 0,
        offset: int = 0,
        progress: Progress = quiet,
    ) -> None:
        self.model = model.eval()
        self.anatomy = anatomy or Anatomy.of(model, sample_of(text))
        self.offset = offset
        self.device = next(model.parameters()).device
        self.seed = seed
        self.progress = progress
        self.counts = Counts()
        if isinstance(text, Tensor):
            if text.ndim != 2 or not len(text) or text.shape[1] < 2:
                raise InputError(f"a text is token ids [sequences, tokens], not {list(text.shape)}")
            self.batches: tuple[Batch, ...] = tuple({"input_ids": b} for b in text.split(batch_size))
        else:
            self.batches = tuple(text)
        if not self.batches:
            raise InputError("the lab has no text")
        for number, batch in enumerate(self.batches):
            empty = (~real(batch).any(1)).nonzero()
            if len(empty):
                where = f"row {int(empty[0])} of batch {number}"
                raise InputError("a sequence holds nothing but padding", where=where, hint="take it out")

    @property
    def depth(self) -> int:
        """Blocks in all stacks."""
        return sum(len(k.blocks) for k in self.anatomy.stacks)

    @property
    def tokens(self) -> int:
        """Tokens of the text, padding not counted."""
        return sum(int(real(b).sum()) for b in self.batches)

    @property
    def sequences(self) -> int:
        """Sequences of the text."""
        return sum(len(real(b)) for b in self.batches)

    @property
    def passes(self) -> float:
        """Forward-equivalents that were run so far."""
        return self.counts.passes(self.tokens, self.depth)

    @property
    def predicts(self) -> bool:
        """Whether the model's output is a distribution of the next token at each position."""
        return predicts(self.model)

    def renew(self) -> None:
        """Find the anatomy anew, after the model was changed."""
        self.anatomy = Anatomy.of(self.model)

    def on(self, text: Tensor | Sequence[Batch], **options: Any) -> Lab:
        """The same model on another text."""
        return Lab(self.model, text, anatomy=self.anatomy, seed=self.seed, progress=self.progress, **options)

    def part(self, sequences: int, length: int | None = None) -> Lab:
        """The same model and counters on at most so many sequences of the text, evenly chosen, cut to `length`."""
        pairs = [(b, i) for b in self.batches for i in range(len(real(b)))]
        singles = [{k: _cut(v[i : i + 1], real(b), length) for k, v in b.items()} for b, i in pairs]
        count = min(sequences, len(singles))
        chosen = [singles[i * len(singles) // count] for i in range(count)]
        part = self.on(chosen)
        part.counts = self.counts
        return part

    def forward(self, batch: Batch, *, head: bool = True, skipped: int = 0) -> Tensor:
        """Logits [batch, tokens, vocabulary]; without the head, or where there is none, the last hidden states.

        `skipped` blocks are counted as not evaluated.
        """
        return output_of(self.result(batch, head=head, skipped=skipped), head=head)

    def result(self, batch: Batch, *, head: bool = True, skipped: int = 0, count: bool = True) -> Any:
        """All that a forward of the model returns, without the head that of its body."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        inputs = {
            k: v.to(self.device, dtype) if v.is_floating_point() else v.to(self.device)
            for k, v in batch.items()
            if k not in ASIDE
        }
        if count:
            tokens = int(real(batch).sum())
            self.counts.blocks += tokens * (self.depth - skipped)
            self.counts.heads += tokens if head else 0
        body = self.model if head else getattr(self.model, "base_model", self.model)
        extra = {"use_cache": False} if hasattr(getattr(self.model, "config", None), "use_cache") else {}
        return body(**inputs, **extra)

    def decode(self, states: Tensor) -> Tensor:
        """Logits [n, vocabulary] of states behind the last block; see `decoder`."""
        self.counts.heads += len(states)
        return decoder(self.anatomy)(states)

    def stream(self, tallies: Iterable[Tally], what: str = "survey", *, score: bool = True) -> list[Scores]:
        """One forward over the text feeds all tallies: each sees every site of every batch, in depth order.

        Their scores, or nothing where no `score` is asked for.
        """
        tallies = list(tallies)
        for rows in self.rows():
            with torch.no_grad(), feeding(self.anatomy, rows, tallies):
                self.forward(rows.batch, head=False)
            self.progress(what, rows.offset - self.offset + rows.sequences, self.sequences)
        return [tally.scores() for tally in tallies if score]

    def sweep(self, tallies: Iterable[Any], *, score: bool = True, **options: Any) -> list[Scores]:
        """Every site that a tally takes is taken away once, and what the network then does is fed to the tallies.

        See `lamina.lab.trials`.
        """
        from lamina.lab.trials import Trials

        tallies = list(tallies)
        Trials(self, **options).run(tallies)
        return [tally.scores() for tally in tallies if score]

    def rows(self) -> Iterator[Rows]:
        """The batches in turn, as measures see them."""
        offset = self.offset
        for number, batch in enumerate(self.batches):
            rows = Rows(batch, number, offset, self._limits)
            offset += rows.sequences
            yield rows

    @cached_property
    def _limits(self) -> Any:
        """The keys of all sequences, in order: by them a sample is chosen."""
        return np.sort(np.concatenate([sequence_keys(b) for b in self.batches]))

    @contextmanager
    def ablate(self, sites: Iterable[str]) -> Iterator[None]:
        """Inside, the sites add nothing and are not computed; afterwards all is as before."""
        with ablated(self.model, self.anatomy, sites):
            yield

    @torch.no_grad()
    def losses(self, gone: Iterable[str] = ()) -> tuple[Tensor, Tensor]:
        """Next-token loss: sums in nats and counts of predicted tokens, both float64 [sequences], `gone` ablated."""
        sums, counts = [], []
        with self.ablate(gone):
            for batch in self.batches:
                s, n = sequence_losses(self.forward(batch), batch)
                sums.append(s)
                counts.append(n)
        return torch.cat(sums), torch.cat(counts)

    def loss(self, gone: Iterable[str] = ()) -> float:
        """Mean next-token loss in nats, the sites in `gone` ablated."""
        sums, counts = self.losses(gone)
        return float(sums.sum() / counts.sum())


def _cut(row: Tensor, mask: Tensor, length: int | None) -> Tensor:
    """The first `length` positions of an input that has a number for each token; any other input as it is."""
    return row[:, :length] if row.ndim > 1 and row.shape[1] == mask.shape[1] and not row.is_floating_point() else row


def sample_of(text: Tensor | Sequence[Batch]) -> dict[str, Tensor] | None:
    """What an anatomy is found by: one sequence of a text of other inputs than ids; None for ids."""
    if isinstance(text, Tensor) or not text or "input_ids" in text[0]:
        return None
    return {k: v[:1] for k, v in text[0].items() if k not in ASIDE}


def predicts(model: nn.Module) -> bool:
    """Whether a model's output is a distribution of the next token at each position."""
    can = getattr(model, "can_generate", None)
    return bool(can()) if callable(can) else True


def decoder(anatomy: Anatomy) -> Callable[[Tensor], Tensor]:
    """A function from states [n, width] behind the last block to logits [n, vocabulary], float32: last norm and head.

    It raises UnsupportedError for models of several stacks, and for those that predict no tokens.
    """
    if len(anatomy.stacks) != 1:
        raise UnsupportedError(f"states can be decoded of one stack, not of {len(anatomy.stacks)}", where="decode")
    if not predicts(anatomy.model):
        raise UnsupportedError("the model has no head that predicts tokens", where="decode")

    @torch.no_grad()
    def decode(states: Tensor) -> Tensor:
        parameter = next(anatomy.model.parameters())
        given = states.to(parameter.device, parameter.dtype)
        given = torch.cat([given, given[-1:]]) if len(given) < 2 else given
        ids = torch.zeros(1, len(given), dtype=torch.long, device=parameter.device)
        with shorted(anatomy.model, anatomy.stacks[0], lambda: given.unsqueeze(0)):
            out = anatomy.model(input_ids=ids)
        return getattr(out, "logits", out)[0, : len(states)].float()

    return decode


def sequence_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums in nats and counts of next-token losses, float64 [batch]; padding neither predicts nor counts."""
    per_token, valid = token_losses(logits, batch)
    return per_token.sum(1), valid.sum(1).double()


def wanted(kinds: Sequence[Kind], kind: Kind) -> bool:
    """Whether a measure on `kinds` (none: all) scores this kind."""
    return not kinds or kind in kinds
