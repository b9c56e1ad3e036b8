"""Planted needles: numbers in prose that must be found again, over several lengths and depths."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from lamina.core.errors import UnsupportedError
from lamina.evaluators.tasks._item import Marks, Subject, task
from lamina.evaluators.tasks._questions import Question, chance, hit

LENGTHS = (256, 512, 1024)
"""Tokens of a document; those that the model's context does not hold are left out."""
NEEDLES = 16
"""In each document, a digit each, evenly spread and each asked for once: an item. Every digit but 0 is there."""
ROOM = 128
"""Tokens that needles and question take beside the prose."""
CHOICES = 4
NAMES = (
    "Anna", "Brian", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "James", "Karen", "Lewis", "Maria",
    "Nora", "Oscar", "Paula",
)  # fmt: skip


@task("needles", capability="long context", of="decoder", package="lamina", licence="MIT, BSD, PSF")
def needles(subject: Subject) -> Marks:
    """Whose number was which, of four that stand in the same text: 16 in 256, 512 or 1,024 tokens of prose."""
    from lamina.evaluators.tasks._choices import Item, Reader

    lengths = fitting(subject)
    reader = Reader(subject.model, subject.tokenizer)
    prose = _sentences()
    sizes = [len(ids) for ids in subject.tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"]]
    values, keys, groups, asked = [], list[str](), list[int](), list[Question]()
    for number in range(-(-subject.items // NEEDLES)):
        questions = document(prose, sizes, lengths[number % len(lengths)], random.Random(f"{subject.seed} {number}"))
        reads = reader.read([Item(q.context, q.choices) for q in questions])
        values += [float(hit(q, r.logs, by="sum")) for q, r in zip(questions, reads, strict=True)]
        keys += [q.key for q in questions]
        groups += [number] * len(questions)
        asked += questions
        subject.progress("needles", min(len(values), subject.items), subject.items)
    count, span = subject.items, ", ".join(f"{n:,}" for n in lengths)
    how = f"log-likelihood of {CHOICES} numbers of the same text, {NEEDLES} needles in each of {span} tokens"
    return Marks.of(values[:count], keys[:count], chance=chance(asked), how=how, groups=groups[:count])


def fitting(subject: Subject) -> list[int]:
    """The lengths that the model's context holds. Raises UnsupportedError where it holds none."""
    limit = getattr(getattr(subject.model, "config", None), "max_position_embeddings", None)
    found = [n for n in LENGTHS if not isinstance(limit, int) or n + ROOM <= limit]
    if not found:
        raise UnsupportedError(f"needles take {LENGTHS[0] + ROOM} tokens, and the model reads {limit}")
    return found


def _sentences() -> list[str]:
    """Sentences without digits of lamina's held-out prose, in its order."""
    from lamina.lab.sources import shipped

    texts = (" ".join(text.split()) for text in shipped("heldout"))
    return [
        s for text in texts for s in re.split(r"(?<=[.!?])\s+", text) if 40 < len(s) < 200 and not re.search(r"\d", s)
    ]


def document(prose: Sequence[str], sizes: Sequence[int], length: int, draw: random.Random) -> list[Question]:
    """One text of about `length` tokens of prose with needles in it, and a question for each of them."""
    names = draw.sample(NAMES, NEEDLES)
    digits = range(1, 10)
    numbers = [str(n) for n in draw.sample([*digits, *draw.choices(digits, k=NEEDLES - len(digits))], NEEDLES)]
    start = draw.randrange(len(prose) - length)
    end, total = start, 0
    while total < length:
        total += sizes[end]
        end += 1
    body = list(prose[start:end])
    depths = [int((place + draw.random()) * len(body) / NEEDLES) for place in range(NEEDLES)]
    for depth, name, number in reversed(list(zip(depths, names, numbers, strict=True))):
        body.insert(depth, f"The number of {name} is {number}.")
    text = " ".join(body)
    wrong = [draw.sample([str(n) for n in digits if str(n) != number], CHOICES - 1) for number in numbers]
    asks = [f"{text}\n\nThe number of {name} is" for name in names]
    return [Question.of(a, n, w) for a, n, w in zip(asks, numbers, wrong, strict=True)]
