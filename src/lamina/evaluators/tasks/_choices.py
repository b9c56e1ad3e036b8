"""Log-likelihoods of continuations by a causal language model: what is shared is run once, in the cache.

What all items begin with is run once for all; an item's context once for all its choices; then the choices, as rows of
one batch. Contexts of one length go together, so that no row is padded before what is scored, and choices are padded
behind it: causal attention makes the numbers those of a full forward of each choice alone. Single choices, and all of
models whose cache can't be shared that way (states that mix over time, no cache at all), are run with their context.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lamina.core.errors import InputError, UnsupportedError
from lamina.evaluators.tasks._item import Progress, quiet

Array = NDArray[np.float64]
ROWS = 2048
"""Tokens of a forward of contexts."""
SCORED = 1024
"""Tokens of a forward of choices: each has logits over the whole vocabulary."""
LOOSE = 8
"""Tokens by which the choices of one forward may differ in length."""
HELD = 8192
"""Tokens of the caches of one forward: each row has its own copy of what is shared."""
SLICE = 128
"""Positions whose log-probabilities are taken at once."""


@dataclass(frozen=True)
class Item:
    """A context and its possible continuations, as text; those begin with the space that parts them from it."""

    context: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Read:
    """What one item's choices were worth: log-likelihoods in nats, float64 [choices], and their tokens [choices]."""

    logs: Array
    tokens: NDArray[np.int64]


@dataclass
class Effort:
    """What was run: forwards, tokens with padding, tokens that were scored."""

    forwards: int = 0
    tokens: int = 0
    scored: int = 0


@dataclass
class _Coded:
    """An item as token ids; the last `lead` ids of the context are what all choices begin with, and are scored."""

    number: int
    context: list[int]
    choices: list[list[int]]
    lead: int = 0
    logs: Array = field(init=False)

    def __post_init__(self) -> None:
        self.logs = np.zeros(len(self.choices))

    @property
    def longest(self) -> int:
        return len(self.context) + max(len(c) for c in self.choices)


class Reader:
    """Reads items by one model; `effort` counts what that took.

    The model is run as it is, in its own dtype, without gradients.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, progress: Progress = quiet, shared: bool = True) -> None:
        if tokenizer is None:
            raise UnsupportedError("the model brings no tokenizer, and tasks are text", hint="give a tokenizer")
        self.model: Any = model.eval()
        self.tokenizer, self.progress, self.effort = tokenizer, progress, Effort()
        self.device = next(model.parameters()).device
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._cached = hasattr(getattr(model, "config", None), "use_cache")
        self._shared: bool | None = None if shared and self._cached else False
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self.limit = limit if isinstance(limit, int) and limit > 0 else None

    def read(self, items: Sequence[Item], what: str = "") -> list[Read]:
        """The log-likelihood of every choice of every item, in the items' order.

        Raises UnsupportedError where an item is longer than the model's context, InputError for an empty choice.
        """
        begins = self._begins()
        coded = [self._coded(n, item, begins) for n, item in enumerate(items)]
        with torch.no_grad():
            if self._shared is None and coded:
                self._shared = self._can_share(coded[0].context[0])
            branches = any(len(c.choices) > 1 for c in coded)
            for done in self._shared_reads(coded) if self._shared and branches else self._whole_reads(coded):
                self.progress(what or "reading", done, len(items))
        return [Read(c.logs, np.array([c.lead + len(x) for x in c.choices])) for c in coded]

    # Text to token ids.

    def _coded(self, number: int, item: Item, begins: list[int]) -> _Coded:
        """Context and choices, cut where the tokens of context and whole text part ways."""
        context = self._ids(item.context)
        wholes = [self._ids(item.context + choice) for choice in item.choices]
        shared = min((_common(context, whole) for whole in wholes), default=0)
        start = begins or ([] if shared else self._first_token())
        found = _Coded(number, [*start, *context[:shared]], [whole[shared:] for whole in wholes])
        if not found.choices or not all(found.choices):
            raise InputError("an item needs choices that hold something", where=f"item {number}")
        if self.limit is not None and found.longest > self.limit:
            what = f"an item has {found.longest:,} tokens, and the model reads {self.limit:,}"
            raise UnsupportedError(what, where=f"item {number}")
        alike = _stem(found.choices) if len(found.choices) > 1 else 0
        rest = [choice[alike:] for choice in found.choices]
        return _Coded(number, found.context + found.choices[0][:alike], rest, alike)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

    def _begins(self) -> list[int]:
        """What the tokenizer itself puts before a text."""
        plain, full = self._ids("a"), list(self.tokenizer("a", verbose=False)["input_ids"])
        at = next((n for n in range(len(full)) if full[n : n + len(plain)] == plain), 0)
        return full[:at]

    def _first_token(self) -> list[int]:
        """A token to begin with where there is no context: the first token of a choice is scored behind it."""
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = getattr(self.tokenizer, name, None)
            if found is not None:
                return [int(found)]
        raise UnsupportedError("the tokenizer has no token that begins a text, and an item has no context")

    # Shared reading.

    def _can_share(self, token: int) -> bool:
        """Whether the model's cache holds keys and values alone, whose rows may be chosen and repeated."""
        self.effort.forwards += 1
        out = self.model(torch.tensor([[token]], device=self.device), use_cache=True)
        layers = getattr(getattr(out, "past_key_values", None), "layers", None)
        plain = ("DynamicLayer", "DynamicSlidingWindowLayer")
        return bool(layers) and all(type(layer).__name__ in plain for layer in layers)

    def _shared_reads(self, coded: list[_Coded]) -> Iterator[int]:
        """Yields how many items are done, group by group."""
        stem = _stem([c.context[: len(c.context) - c.lead] for c in coded])
        trunk = self._run([coded[0].context[:stem]], None, keep=1)[1] if stem and len(coded) > 1 else None
        stem = stem if trunk is not None else 0
        done = 0
        order = sorted(coded, key=lambda c: (-len(c.context), -max(len(x) for x in c.choices), c.number))
        for length, same in itertools.groupby(order, key=lambda c: len(c.context) - stem):
            for group in _parts(list(same), max(1, min(ROWS // length, HELD // (stem + length)))):
                rows = [c.context[stem:] for c in group]
                keep = 1 + max(c.lead for c in group)
                logits, cache = self._run(rows, _rows(trunk, [0] * len(group)), keep=keep)
                self._first(group, logits)
                self._rest(group, cache)
                done += len(group)
                yield done

    def _first(self, group: list[_Coded], logits: Tensor) -> None:
        """What all choices of an item begin with, and the token behind that, from the context's last positions."""
        for row, one in enumerate(group):
            if one.lead:
                lead = self._sums(logits[row : row + 1, -one.lead - 1 : -1], [one.context[-one.lead :]])[0]
                one.logs += lead
            logs = torch.log_softmax(logits[row, -1].float(), -1)
            firsts = torch.tensor([c[0] for c in one.choices], device=logs.device)
            one.logs += logs[firsts].double().cpu().numpy()
            self.effort.scored += len(one.choices)

    def _rest(self, group: list[_Coded], cache: Any) -> None:
        """The other tokens of every choice, each a row behind its context's keys and values."""
        rows = [(row, n) for row, one in enumerate(group) for n, c in enumerate(one.choices) if len(c) > 1]
        most = HELD // len(group[0].context)
        for part in _alike(rows, lambda r: len(group[r[0]].choices[r[1]]) - 1, most):
            texts = [group[row].choices[n] for row, n in part]
            logits, _ = self._run([t[:-1] for t in texts], _rows(cache, [row for row, _ in part]))
            sums = self._sums(logits, [t[1:] for t in texts])
            for (row, n), value in zip(part, sums, strict=True):
                group[row].logs[n] += value

    # Whole reading: of single choices, and by models whose cache can't be shared.

    def _whole_reads(self, coded: list[_Coded]) -> Iterator[int]:
        rows = [(c.number, n) for c in coded for n in range(len(c.choices))]
        done = 0
        for part in _alike(rows, lambda r: len(coded[r[0]].context) + len(coded[r[0]].choices[r[1]]) - 1):
            texts = [coded[i].context + coded[i].choices[n] for i, n in part]
            starts = [len(coded[i].context) - coded[i].lead - 1 for i, _ in part]
            first = min(starts)  # logits before it are of no use
            logits, _ = self._run([t[:-1] for t in texts], None, keep=max(len(t) for t in texts) - 1 - first)
            for row, ((i, n), text, start) in enumerate(zip(part, texts, starts, strict=True)):
                own = logits[row : row + 1, start - first : len(text) - 1 - first]
                coded[i].logs[n] = self._sums(own, [text[start + 1 :]])[0]
            done += len(part)
            yield len(coded) * done // len(rows)

    def _run(self, rows: Sequence[Sequence[int]], past: Any, keep: int = 0) -> tuple[Tensor, Any]:
        """Logits [rows, tokens or `keep`, vocabulary] of rows padded on the right, behind `past`; and the cache."""
        longest = max(len(r) for r in rows)
        ids = torch.tensor([[*r, *[r[-1]] * (longest - len(r))] for r in rows], device=self.device)
        extra: dict[str, Any] = {"use_cache": bool(self._shared)} if self._cached else {}
        if past is not None:
            extra["past_key_values"] = past
        if keep and self._keeps:
            extra["logits_to_keep"] = keep
        self.effort.forwards += 1
        self.effort.tokens += ids.numel()
        out = self.model(ids, **extra)
        logits = out if isinstance(out, Tensor) else out.logits
        return (logits[:, -keep:] if keep else logits), getattr(out, "past_key_values", None)

    def _sums(self, logits: Tensor, targets: Sequence[Sequence[int]]) -> list[float]:
        """Summed log-probabilities of each row's targets; what is padded behind them is left out."""
        flat = torch.cat([logits[row, : len(t)] for row, t in enumerate(targets)])
        wanted = torch.tensor([i for t in targets for i in t], device=flat.device)
        logs = torch.cat([_logs(f, w) for f, w in zip(flat.split(SLICE), wanted.split(SLICE), strict=True)])
        self.effort.scored += len(wanted)
        return [float(part.sum()) for part in logs.double().cpu().split([len(t) for t in targets])]


def _logs(logits: Tensor, wanted: Tensor) -> Tensor:
    """Log-probabilities [positions] of the wanted ids, in float32."""
    real = logits.float()
    return real.gather(1, wanted[:, None])[:, 0] - real.logsumexp(-1)


def _rows(cache: Any, rows: list[int]) -> Any:
    """A cache of its own that holds these rows of another, which stays as it is."""
    if cache is None:
        return None
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in branch.layers:  # what a layer holds is bound anew when it grows, never written into
        if getattr(layer, "keys", None) is not None:
            layer.batch_select_indices(torch.tensor(rows, device=layer.keys.device))
    return branch


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two rows begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _stem(contexts: Sequence[list[int]]) -> int:
    """How many ids all contexts begin with alike; at least one of each is left."""
    if not contexts:
        return 0
    low, high = min(contexts), max(contexts)
    return min(_common(low, high), min(len(c) for c in contexts) - 1)


def _parts(rows: list[Any], size: int) -> Iterator[list[Any]]:
    return (rows[n : n + size] for n in range(0, len(rows), size))


def _alike(rows: Iterable[Any], length: Any, most: int = SCORED) -> Iterator[list[Any]]:
    """The rows in groups of like length, longest first, each of at most `SCORED` tokens and `most` rows."""
    group: list[Any] = []
    for row in sorted(rows, key=lambda r: -length(r)):
        longest = length(group[0]) if group else 0
        full = len(group) >= most or (len(group) + 1) * longest > SCORED
        if group and (full or longest - length(row) > LOOSE):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
