"""Tasks for encoders of text: what a linear probe reads from the mean of a frozen model's last vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.core.errors import InputError
from lamina.evaluators.tasks._item import Marks, Subject, task
from lamina.evaluators.tasks._probe import probed

Array = NDArray[np.float64]
TOPICS, TOPIC_TOKENS = 500, 64
"""Articles that the probe is fitted on, and the tokens of each: an article's beginning tells its topic."""
FEELINGS, FEELING_TOKENS = 500, 64
CLEAR = 0.5
"""Of ratings from -4 to 4: a sentence whose mean lies nearer 0 is neither."""
ROWS = 16
"""Texts of a forward."""


@task("bbc-news", capability="topics", of="encoder", data="bbc-news", items=1625)
def bbc_news(subject: Subject) -> Marks:
    """Which of five topics a news article has: a logistic probe on mean-pooled vectors."""
    from lamina.lab.datasets import dataset

    files = sorted(dataset("bbc-news").glob("*/*.txt"))
    return _told("bbc-news", subject, articles((f.parent.name, f.read_bytes()) for f in files), TOPICS, TOPIC_TOKENS)


@task("review-sentiment", capability="sentiment", of="encoder", data="reviews", items=9541)
def review_sentiment(subject: Subject) -> Marks:
    """Whether a sentence of a movie review praises or blames: a logistic probe on mean-pooled vectors."""
    from lamina.lab.datasets import dataset

    text = (dataset("reviews") / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="utf-8", errors="replace")
    return _told("review-sentiment", subject, sentences(text), FEELINGS, FEELING_TOKENS)


def articles(files: Iterable[tuple[str, bytes]]) -> list[tuple[str, str]]:
    """Topics and articles; one that stands there twice is taken once, so that none is both fitted and marked."""
    found: dict[str, str] = {}
    for topic, content in files:
        found.setdefault(" ".join(content.decode("utf-8", errors="replace").split()), topic)
    return [(topic, text) for text, topic in found.items()]


def sentences(rows: str) -> list[tuple[str, str]]:
    """`positive` or `negative` and the sentence, of lines `number TAB mean rating TAB sentence`."""
    found: dict[str, str] = {}
    for line in filter(str.strip, rows.split("\n")):
        _, rating, sentence = line.split("\t", 2)
        if abs(float(rating)) > CLEAR:
            found.setdefault(" ".join(sentence.split()), "positive" if float(rating) > 0 else "negative")
    return [(label, text) for text, label in found.items()]


def _told(name: str, subject: Subject, rows: Sequence[tuple[str, str]], fitted: int, tokens: int) -> Marks:
    texts = [text for _, text in rows]
    return probed(
        name,
        subject,
        [label for label, _ in rows],
        lambda chosen: mean_vectors(subject, [texts[i] for i in chosen], tokens, name),
        fitted=fitted,
        keys=[hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts],
        how=f"logistic probe on the mean of the last vectors of {tokens} tokens",
    )


def mean_vectors(subject: Subject, texts: Sequence[str], tokens: int, name: str = "") -> Array:
    """The mean of the last hidden states over each text's first tokens, float64 [texts, width].

    Texts of like length go together, padded on the right. Raises InputError where the model has no tokenizer.
    """
    import torch

    if subject.tokenizer is None:
        raise InputError("this task needs the model's tokenizer", where=name, hint="put its files into the folder")
    model: Any = getattr(subject.model, "base_model", subject.model)
    device, fill = next(model.parameters()).device, subject.tokenizer.pad_token_id or 0
    ids = subject.tokenizer(list(texts), truncation=True, max_length=tokens)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: list[Array | None] = [None] * len(ids)
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        size = len(ids[chosen[-1]])
        rows = torch.tensor([ids[i] + [fill] * (size - len(ids[i])) for i in chosen], device=device)
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (size - len(ids[i])) for i in chosen], device=device)
        with torch.inference_mode():
            states = model(input_ids=rows, attention_mask=mask).last_hidden_state.double()
            means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for i, row in zip(chosen, means.cpu().numpy(), strict=True):
            found[i] = row
        subject.progress(name, start + len(chosen), len(order))
    return np.stack([row for row in found if row is not None])
