"""Losses of texts, one number per text: prose and programs."""

from __future__ import annotations

import gzip
import json

from lamina.core.errors import UnsupportedError
from lamina.evaluators.tasks._item import Marks, Subject, task
from lamina.evaluators.tasks._questions import drawn, losses

BODY = 120
"""Characters of an article that are scored, about 27 tokens."""


@task("news", capability="prose", of="decoder", metric="nats/token", higher=False, data="bbc-news", items=2225)
def news(subject: Subject) -> Marks:
    """The loss of the beginning of a news article behind its headline."""
    from lamina.lab.datasets import dataset

    files = sorted(dataset("bbc-news").glob("*/*.txt"))
    texts = [_article(f.read_text(encoding="utf-8", errors="replace")) for f in drawn(files, subject)]
    return losses(subject, texts, "news")


def _article(text: str) -> tuple[str, str]:
    """The headline, and so much of what follows as is scored, to the end of a word."""
    headline, _, body = text.strip().partition("\n")
    flat = " ".join(body.split())
    return headline.strip() + "\n\n", flat[:BODY].rpartition(" ")[0] if len(flat) > BODY else flat


@task("humaneval", capability="code", of="decoder", metric="nats/token", higher=False, data="humaneval", items=164)
def humaneval(subject: Subject) -> Marks:
    """The loss of a program behind the signature and the description that ask for it (HumanEval)."""
    from lamina.lab.datasets import dataset

    lines = gzip.decompress((dataset("humaneval") / "HumanEval.jsonl.gz").read_bytes()).decode("utf-8").splitlines()
    problems = [json.loads(line) for line in lines if line.strip()]
    texts = [(p["prompt"], p["canonical_solution"].rstrip()) for p in drawn(problems, subject)]
    limit = getattr(getattr(subject.model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and limit < 1024:
        raise UnsupportedError(f"programs take up to 1,024 tokens, and the model reads {limit:,}")
    return losses(subject, texts, "humaneval")
