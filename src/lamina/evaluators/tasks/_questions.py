"""Questions with choices and texts with losses: from items to one model's marks."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from lamina.core.errors import InputError
from lamina.evaluators.tasks._item import Marks, Subject

T = TypeVar("T")
By = Literal["bytes", "sum"]
"""What choices are held against each other by: log-likelihood per byte, or as it is."""
WORDS = {"bytes": "log-likelihood per byte", "sum": "log-likelihood"}


@dataclass(frozen=True)
class Question:
    """A context, its choices as they follow it, and which of them are right."""

    context: str
    choices: tuple[str, ...]
    right: frozenset[int]

    @classmethod
    def of(cls, context: str, right: str, wrong: Sequence[str]) -> Question:
        """One right choice, told apart from the context by a space, and some wrong ones."""
        return cls(context, tuple(f" {c}" for c in (right, *wrong)), frozenset({0}))

    @property
    def key(self) -> str:
        """What tells this question from others."""
        text = "\0".join((self.context, *self.choices))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def drawn(population: Sequence[T], subject: Subject) -> list[T]:
    """At most `subject.items` of a population, by the subject's seed: the same for both models of a pair."""
    count = min(subject.items, len(population))
    return random.Random(subject.seed).sample(list(population), count)


def answered(subject: Subject, questions: Sequence[Question], what: str, *, by: By = "bytes") -> Marks:
    """1 for each question whose best right choice is likelier than every wrong one; a tie is no answer."""
    from lamina.evaluators.tasks._choices import Item, Reader

    if not questions:
        raise InputError("the task has no items", where=what)
    reader = Reader(subject.model, subject.tokenizer, progress=subject.progress)
    reads = reader.read([Item(q.context, q.choices) for q in questions], what)
    values = [float(hit(q, r.logs, by=by)) for q, r in zip(questions, reads, strict=True)]
    return Marks.of(values, [q.key for q in questions], chance=chance(questions), how=told(questions, by))


def hit(question: Question, logs: np.ndarray, *, by: By = "bytes") -> bool:
    """Whether a right choice is likelier than every wrong one, by log-likelihoods [choices]."""
    sizes = [len(c.encode()) if by == "bytes" else 1 for c in question.choices]
    scores = [log / size for log, size in zip(logs, sizes, strict=True)]
    best = max(score for n, score in enumerate(scores) if n in question.right)
    return all(best > score for n, score in enumerate(scores) if n not in question.right)


def chance(questions: Sequence[Question]) -> float:
    """What guessing gives."""
    return float(np.mean([len(q.right) / len(q.choices) for q in questions]))


def told(questions: Sequence[Question], by: By) -> str:
    """In a few words how the questions are marked."""
    counts = sorted({len(q.choices) for q in questions})
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{WORDS[by]} of {span} choices, zero-shot"


def losses(subject: Subject, texts: Sequence[tuple[str, str]], what: str) -> Marks:
    """The mean loss of each text's second part behind its first, nats per token."""
    from lamina.evaluators.tasks._choices import Item, Reader

    if not texts:
        raise InputError("the task has no items", where=what)
    reader = Reader(subject.model, subject.tokenizer, progress=subject.progress)
    reads = reader.read([Item(before, (after,)) for before, after in texts], what)
    values = [-r.logs[0] / r.tokens[0] for r in reads]
    keys = [hashlib.sha256(f"{a}\0{b}".encode()).hexdigest()[:16] for a, b in texts]
    return Marks.of(values, keys, how=f"loss of {sum(int(r.tokens[0]) for r in reads)} tokens")
