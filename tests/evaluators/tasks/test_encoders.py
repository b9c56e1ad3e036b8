"""Encoders: what the probe is fitted on and marked on, and the vectors that it sees."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_kinds import WIDTH, drop
from transformers import BertConfig, BertModel

from lamina.core.errors import InputError
from lamina.evaluators.tasks import _probe, encoders
from lamina.evaluators.tasks._item import Subject, paired, tasks
from lamina.lab import datasets
from lamina.testing.tools import tokenizer

WORDS = {"sports": ["aaa", "aba", "bab", "bb"], "tech": ["xyx", "yyy", "xxy", "xx"]}


@pytest.fixture(scope="module")
def bert() -> Any:
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=260, num_hidden_layers=3, **WIDTH))
    return model.eval()


@pytest.fixture
def news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty articles of two topics, told by their words; half are fitted."""
    chance = random.Random(1)
    for topic, known in WORDS.items():
        (tmp_path / topic).mkdir()
        for number in range(20):
            text = " ".join(chance.choice(known) for _ in range(chance.randint(4, 12)))
            (tmp_path / topic / f"{number:03}.txt").write_text(f"{text} {number}")
    monkeypatch.setattr(datasets, "dataset", lambda name: tmp_path)
    monkeypatch.setattr(encoders, "TOPICS", 20)
    return tmp_path


def test_mean_vectors_are_those_of_each_text_alone(bert: Any) -> None:
    texts = ["the match", "a", "code and chips and the disk", "goal goal goal", "x" * 50] * 5
    found = encoders.mean_vectors(Subject(model=bert, tokenizer=tokenizer()), texts, 12)
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([tokenizer()(text)["input_ids"][:12]])
        with torch.no_grad():
            expected = bert(input_ids=ids).last_hidden_state[0].double().mean(0)
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)


def test_topics_are_told_where_words_tell_them(bert: Any, news: Path) -> None:
    task, seen = tasks()["bbc-news"], list[tuple[str, int, int]]()
    subject = Subject(model=bert, tokenizer=tokenizer(), items=15, progress=lambda *at: seen.append(at))
    marks = task.score(subject)
    assert marks.values.shape == (15,)
    assert marks.values.mean() == 1
    assert marks.chance is not None
    assert 0.5 <= marks.chance < 0.8
    assert seen[-1] == ("bbc-news", 35, 35)
    for number, file in enumerate(sorted(news.glob("*/*.txt"))):  # topics that words do not tell
        file.rename(news / random.Random(number).choice(list(WORDS)) / f"{file.parent.name}{number}.txt")
    assert task.score(subject).values.mean() < 0.9


def test_both_models_meet_the_same_items(bert: Any, news: Path) -> None:
    thinned = BertModel(bert.config)
    thinned.load_state_dict(bert.state_dict())
    drop(thinned.eval(), {"input_ids": torch.arange(3, 12)[None]}, "block.1")
    task = tasks()["bbc-news"]
    first, second = (task.score(Subject(model=m, tokenizer=tokenizer(), items=12)) for m in (bert, thinned))
    assert len(paired(task, first, second).keys) == 12
    other = task.score(Subject(model=bert, tokenizer=tokenizer(), items=12, seed=1))
    with pytest.raises(ValueError, match="same items"):
        paired(task, first, other)


def test_reviews(bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "dataset", lambda name: tmp_path)
    monkeypatch.setattr(encoders, "FEELINGS", 20)
    rows = [f"{n}\t{3.1 if n % 2 else -2.5}\t{'aab aba' if n % 2 else 'xyx'} {n}\n" for n in range(40)]
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_text("".join(rows))
    marks = tasks()["review-sentiment"].score(Subject(model=bert, tokenizer=tokenizer(), items=20))
    assert marks.values.tolist() == [1.0] * 20


def test_twice_is_once() -> None:
    files = [("a", b"One  article.\n"), ("b", b"Another\xa3"), ("c", b"One article.")]
    assert encoders.articles(files) == [("a", "One article."), ("b", "Another\ufffd")]


def test_sentences_without_a_clear_rating_are_left_out() -> None:
    rows = "1\t2.5\tGood,\tindeed.\n2\t-0.5\tNeither\n3\t-3\tBad\n4\t1\tBad\n"
    assert encoders.sentences(rows) == [("positive", "Good, indeed."), ("negative", "Bad")]


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 20), st.integers(0, 3))
def test_split(count: int, fitted: int, marked: int, seed: int) -> None:
    if count <= fitted:
        with pytest.raises(ValueError, match="items"):
            _probe.split(count, fitted, marked, seed)
        return
    parts, more = _probe.split(count, fitted, marked, seed), _probe.split(count, fitted, marked + 1, seed)
    both = [*parts.fitted.tolist(), *parts.marked.tolist()]
    assert len(set(both)) == len(both) == min(fitted + marked, count)
    assert set(both) <= set(range(count))
    assert more.fitted.tolist() == parts.fitted.tolist()
    assert more.marked.tolist()[: len(parts.marked)] == parts.marked.tolist()


def test_the_probe_is_ridge_on_scaled_features() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    train, test = rng.normal(3, [1, 10, 0.1, 0], (60, 4)), rng.normal(3, [1, 10, 0.1, 1], (200, 4))
    classes, truth = np.array(["x", "y"])[(train[:, 0] > 3) * 1], np.array(["x", "y"])[(test[:, 0] > 3) * 1]
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=_probe.PENALTY, max_iter=5000)).fit(train, classes)
    found = _probe.right(train, classes, test, truth)
    assert (found == (oracle.predict(test) == truth)).all()
    assert 0.6 < found.mean() < 1


def test_what_is_missing_is_one_line(bert: Any, news: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks()["bbc-news"]
    with pytest.raises(InputError, match="bbc-news: this task needs the model's tokenizer"):
        task.score(Subject(model=bert))
    broken = BertModel(bert.config).eval()
    torch.nn.init.constant_(broken.embeddings.word_embeddings.weight, float("nan"))
    with pytest.raises(InputError, match="not finite"):
        task.score(Subject(model=broken, tokenizer=tokenizer()))
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"pip install 'lamina\[probes\]'"):
        task.score(Subject(model=bert, tokenizer=tokenizer()))
