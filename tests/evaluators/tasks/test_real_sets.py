"""The tasks beyond text on their real data sets and, where they are, on real models."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lamina.core.errors import InputError
from lamina.evaluators.tasks import encoders, speech, vision
from lamina.evaluators.tasks._item import Subject, tasks
from lamina.lab.datasets import dataset, entries, kept
from lamina.lab.load import load

pytestmark = pytest.mark.slow
MODELS = os.environ.get("LAMINA_REAL_MODELS", "")


def real(name: str) -> Path:
    """The folder of a data set; skips where it can't be had, or is large and not in the cache."""
    if entries()[name].megabytes > 10 and not kept(name):
        pytest.skip(f"{name}: {entries()[name].megabytes} MB, not in the cache")
    try:
        return dataset(name)
    except InputError as error:
        pytest.skip(str(error))


def test_news() -> None:
    rows = encoders.articles((f.parent.name, f.read_bytes()) for f in sorted(real("bbc-news").glob("*/*.txt")))
    assert len(rows) == 2125
    counts = Counter(topic for topic, _ in rows)
    assert set(counts) == {"business", "entertainment", "politics", "sports", "tech"}
    assert min(counts.values()) > 300
    assert tasks()["bbc-news"].items == len(rows) - encoders.TOPICS


def test_reviews() -> None:
    rows = encoders.sentences((real("reviews") / "movieReviewSnippets_GroundTruth.txt").read_text(errors="replace"))
    assert len(rows) == 10041
    assert 0.4 < np.mean([label == "positive" for label, _ in rows]) < 0.6
    assert tasks()["review-sentiment"].items == len(rows) - encoders.FEELINGS


def test_clips() -> None:
    found = {clip.name: clip for clip in speech.clips(real("librivox"))}
    assert len(found) == 10
    assert all(1 < len(clip.samples) / speech.RATE < 30 for clip in found.values())
    assert all(0.01 < np.abs(clip.samples).max() <= 1 for clip in found.values())
    lines = (real("librivox") / "librivox" / "transcription").read_text().splitlines()
    for line in lines:  # the package's own, which holds one slip of the pen
        text, name = line.removeprefix("<s> ").removesuffix(")").split(" </s> (")
        own = speech.words(text.replace("a more a amiable", "a more amiable"))
        assert own == speech.words(speech.SAID[f"librivox/{name}.wav"])


def test_pictures() -> None:
    file = real("bigbench") / "cifar10_classification/base64/task.json"
    examples = json.loads(file.read_text(encoding="utf-8"))["examples"]
    assert len(examples) == 10_000 == tasks()["cifar10"].items + vision.FITTED
    assert vision.opened(examples[5000]["input"]).shape == (32, 32, 3)


def test_garments() -> None:
    data = gzip.decompress((real("fashion-mnist") / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert Counter(vision.idx(data).tolist()) == dict.fromkeys(range(10), 1000)


@pytest.mark.real_models
@pytest.mark.skipif(not MODELS, reason="needs LAMINA_REAL_MODELS: the folder that tools/real_models.py makes")
@pytest.mark.parametrize(
    ("model", "task", "low", "high"),
    [
        ("minilm", "bbc-news", 0.85, 1),
        ("dinov2-small", "cifar10", 0.45, 0.95),
        ("whisper-base", "librivox-loss", 0.2, 0.7),
    ],
)
def test_real_models(model: str, task: str, low: float, high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that a sound model reaches on few items; a wrong preparation of the inputs does not."""
    if not (Path(MODELS) / model / "config.json").is_file():
        pytest.skip(f"needs {model}: python tools/real_models.py {MODELS} {model}")
    real(tasks()[task].data)
    monkeypatch.setattr(vision, "FITTED", 100)
    monkeypatch.setattr(encoders, "TOPICS", 200)
    loaded = load(Path(MODELS) / model, dtype="float32", any_kind=True)
    if task != "cifar10" and loaded.tokenizer is None:
        pytest.skip(f"needs {model}'s tokenizer: python tools/real_inputs.py {MODELS} {model}")
    marks = tasks()[task].score(Subject(model=loaded.model, tokenizer=loaded.tokenizer, items=60, path=loaded.path))
    assert low < marks.values.mean() < high
