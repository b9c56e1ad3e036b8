"""The lab: one model on one text. Runs passes, hands out taps, takes sites away on trial, and counts what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.anatomy.parts import Block
from lamina.anatomy.trial import ablated
from lamina.anatomy.watch import watch_blocks
from lamina.core.errors import InputError
from lamina.core.sites import Kind, Site
from lamina.lab.taps import SharedTaps, Streams, Taps
from lamina.maths.divergence import nll

if TYPE_CHECKING:
    from lamina.core.scores import Scores
    from lamina.lab.protocols import Tally

Batch = Mapping[str, Tensor]
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

    `model` is put into evaluation mode; else it is left as it was, and only rewrites and healers change it.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Tensor | Sequence[Batch],
        *,
        anatomy: Anatomy | None = None,
        batch_size: int = 4,
        seed: int = 0,
        progress: Progress = quiet,
    ) -> None:
        self.model = model.eval()
        self.anatomy = anatomy or Anatomy.of(model)
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

    def renew(self) -> None:
        """Find the anatomy anew, after the model was changed."""
        self.anatomy = Anatomy.of(self.model)

    def on(self, text: Tensor | Sequence[Batch], **options: Any) -> Lab:
        """The same model on another text."""
        return Lab(self.model, text, anatomy=self.anatomy, seed=self.seed, progress=self.progress, **options)

    def part(self, sequences: int, length: int | None = None) -> Lab:
        """The same model and counters on at most so many sequences of the text, evenly chosen, cut to `length`."""
        singles = [{k: v[i : i + 1, :length] for k, v in b.items()} for b in self.batches for i in range(len(real(b)))]
        count = min(sequences, len(singles))
        chosen = [singles[i * len(singles) // count] for i in range(count)]
        part = self.on(chosen)
        part.counts = self.counts
        return part

    def forward(self, batch: Batch, *, head: bool = True, skipped: int = 0) -> Tensor:
        """Logits [batch, tokens, vocabulary]; without the head, the last hidden states.

        `skipped` blocks are counted as not evaluated.
        """
        inputs = {k: v.to(self.device) for k, v in batch.items()}
        tokens = int(real(batch).sum())
        self.counts.blocks += tokens * (self.depth - skipped)
        body = self.model if head else getattr(self.model, "base_model", self.model)
        self.counts.heads += tokens if head else 0
        extra = {"use_cache": False} if hasattr(getattr(self.model, "config", None), "use_cache") else {}
        out = body(**inputs, **extra)
        found = getattr(out, "logits", None) if head else getattr(out, "last_hidden_state", None)
        return found if found is not None else out[0] if isinstance(out, tuple) else out

    def stream(self, tallies: Iterable[Tally], what: str = "survey") -> list[Scores]:
        """One forward over the text feeds all tallies: each sees every site of every batch, in depth order."""
        tallies = list(tallies)
        done = 0
        for batch in self.batches:
            with torch.no_grad(), watch_blocks(self.model, self.anatomy, _feeder(self.anatomy, batch, tallies)):
                self.forward(batch, head=False)
            done += len(real(batch))
            self.progress(what, done, self.sequences)
        return [tally.scores() for tally in tallies]

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


def real(batch: Batch) -> Tensor:
    """Which positions [batch, tokens] are no padding."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None else torch.ones_like(batch["input_ids"], dtype=torch.bool)


def sequence_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums in nats and counts of next-token losses, float64 [batch]; padding neither predicts nor counts."""
    ids, mask = batch["input_ids"], real(batch).to(logits.device)
    valid = mask[:, 1:] & mask[:, :-1]
    per_token = nll(logits[:, :-1], ids[:, 1:]).double() * valid
    return per_token.sum(1), valid.sum(1).double()


def _feeder(anatomy: Anatomy, batch: Batch, tallies: Sequence[Tally]) -> Callable[..., None]:
    mask = real(batch)
    full = bool(mask.all())
    sequence = torch.arange(len(mask)).unsqueeze(1).expand_as(mask)[mask]

    def strip(states: Tensor) -> Tensor:
        return states.flatten(0, 1) if full else states[mask.to(states.device)]

    def feed(block: Block, entering: Tensor, branches: Mapping[str, Tensor], leaving: Tensor) -> None:
        ids = sequence.to(entering.device)
        if not block.plain:
            for site, taps in _in_course(anatomy, block, entering, branches, leaving, strip, (ids, len(mask))):
                for tally in tallies:
                    tally.add(site, taps)
            return
        added = [strip(branches[x.site.id]) for x in block.branches]
        streams = Streams(strip(entering), added, strip(leaving))
        whole = SharedTaps(streams, [0], range(1, len(added) + 1), ids, len(mask))
        for tally in tallies:
            tally.add(block.site, whole)
        for place, branch in enumerate(block.branches):
            taps = SharedTaps(streams, [0, *(r + 1 for r in branch.reads)], [place + 1], ids, len(mask))
            for tally in tallies:
                tally.add(branch.site, taps)

    return feed


def _in_course(
    anatomy: Anatomy,
    block: Block,
    entering: Tensor,
    branches: Mapping[str, Tensor],
    leaving: Tensor,
    strip: Callable[[Tensor], Tensor],
    sequences: tuple[Tensor, int],
) -> Iterator[tuple[Site, Taps]]:
    """The taps of a block that does more to its stream than add to it: each branch with the stream that it joins."""
    course = block.course(anatomy.model.get_submodule(block.path), entering, branches)
    yield block.site, Taps(strip(entering), strip(leaving - entering), *sequences, out=strip(leaving))
    for stream, branch in zip(course, block.branches, strict=False):
        added = branches.get(branch.site.id)
        yield branch.site, Taps(strip(stream), strip(torch.zeros_like(stream) if added is None else added), *sequences)


def wanted(kinds: Sequence[Kind], kind: Kind) -> bool:
    """Whether a measure on `kinds` (none: all) scores this kind."""
    return not kinds or kind in kinds
