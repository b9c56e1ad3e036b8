"""lm-evaluation-harness on the model object: a local task, its marks by plain forwards, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.core.errors import InputError, UnsupportedError
from lamina.evaluators.tasks import lm_eval as harness
from lamina.evaluators.tasks._item import Subject, chosen, paired
from lamina.testing.models import tiny
from lamina.testing.tools import thinned, tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that it imports
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lamina[tasks]'")
    pytest.importorskip("lm_eval.models.huggingface")
pytestmark = pytest.mark.filterwarnings("ignore")

DOCS = [
    {"question": f"the {n} th", "choices": [f"then{n}", "that", "x" * (n % 3 + 1)][: 2 + n % 2], "answer": n % 2}
    for n in range(12)
]


def written(folder: Path, name: str, **config: Any) -> str:
    """A task of the documents above, as a file of the harness's format; JSON is YAML."""
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in DOCS))
    given_ = {
        "task": name, "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "doc_to_text": "{{question}}", "doc_to_target": "answer", **config,
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(given_))
    return f"lm-eval:{file}"


def choice(folder: Path, **more: Any) -> str:
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    kind = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "metric_list": metrics}
    return written(folder, "tiny_choice", **(kind | more))


def worth(model: Any, context: str, rest: str) -> float:
    """The log-likelihood of `rest` behind `context`, by one forward of both."""
    before, ids = tokenizer().encode(context), tokenizer().encode(context + rest)
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logs[i - 1, ids[i]]) for i in range(len(before), len(ids)))


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_choices_by_plain_forwards(metric: str, tmp_path: Path) -> None:
    (task,) = chosen(f"{choice(tmp_path)}@{metric}", "decoder")
    model = tiny("llama", vocab_size=260)
    marks = task.score(Subject(model=model, tokenizer=tokenizer(), items=10))
    assert (task.name, task.metric, task.higher, task.items) == (f"lm-eval:tiny_choice@{metric}", "accuracy", True, 12)
    assert len(marks.values) == 10
    counts = []
    for key, value in zip(marks.keys, marks.values, strict=True):
        doc = DOCS[int(key.split("/")[1])]
        logs = [worth(model, doc["question"], f" {c}") for c in doc["choices"]]
        sizes = [len(c) if metric == "acc_norm" else 1 for c in doc["choices"]]
        best = max(range(len(logs)), key=lambda i: logs[i] / sizes[i])
        assert value == (best == doc["answer"]), key
        counts.append(1 / len(logs))
    assert marks.chance == pytest.approx(sum(counts) / 10)
    assert 0 < marks.values.mean() < 1


def test_both_models_meet_the_same_items(tmp_path: Path) -> None:
    (task,) = chosen(choice(tmp_path, num_fewshot=2, fewshot_split="test"), "decoder")
    bench, dense, _ = thinned(vocab_size=260)
    first, second = (task.score(Subject(model=m, tokenizer=tokenizer(), items=8)) for m in (dense, bench.model))
    assert len(paired(task, first, second).dense) == 8
    other = task.score(Subject(model=dense, tokenizer=tokenizer(), items=8, seed=1))
    assert other.keys != first.keys


def test_a_text_is_marked_by_what_it_costs(tmp_path: Path) -> None:
    spec = written(
        tmp_path, "tiny_text", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{question}}"
    )
    (task,) = chosen(f"{spec}@bits_per_byte", "decoder")
    assert (task.metric, task.higher) == ("bits/byte", False)
    model = tiny("llama", vocab_size=260)
    marks = task.score(Subject(model=model, tokenizer=tokenizer(), items=3))
    assert marks.chance is None
    for key, value in zip(marks.keys, marks.values, strict=True):
        text = DOCS[int(key.split("/")[1])]["question"]
        ids = [0, *tokenizer().encode(text)]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total = sum(float(logs[i - 1, ids[i]]) for i in range(1, len(ids)))
        assert value == pytest.approx(-total / len(text.encode()) / math.log(2), rel=1e-4)


def test_the_model_and_its_tokenizer_stay_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (task,) = chosen(choice(tmp_path), "decoder")
    model, words = tiny("llama", vocab_size=260), tokenizer()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    level = logging.getLogger("lm_eval").level
    task.score(Subject(model=model, tokenizer=words, items=2))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert words.pad_token is None
    assert logging.getLogger("lm_eval").level == level
    assert not any(capsys.readouterr())


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = choice(tmp_path)
    (task,) = chosen(spec, "decoder")
    with pytest.raises(InputError, match="needs the model's tokenizer"):
        task.score(Subject(model=tiny("llama")))
    with pytest.raises(InputError, match=r"no metric 'acc_nrm'.*did you mean acc_norm"):
        chosen(f"{spec}@acc_nrm")
    with pytest.raises(InputError, match="no such file"):
        chosen("lm-eval:nothing.yaml")
    with pytest.raises(UnsupportedError, match="for decoder models, and this is a"):
        chosen(spec, "encoder")
    (tmp_path / "docs.jsonl").unlink()
    other = written(tmp_path, "lost", output_type="multiple_choice", doc_to_choice="{{choices}}")
    (tmp_path / "docs.jsonl").unlink()
    with pytest.raises(InputError) as caught:
        chosen(other)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'lamina\[tasks\]'"):
        chosen("lm-eval:arc_easy")


@pytest.mark.slow
def test_an_unknown_name_among_its_own() -> None:
    with pytest.raises(InputError, match="did you mean arc_easy"):
        chosen("lm-eval:arc_eazy")


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9), min_size=1), st.integers(1, 40), st.integers(0, 3))
def test_draw(sizes: dict[str, int], items: int, seed: int) -> None:
    found = harness.draw(sizes, items, seed)
    assert sum(map(len, found.values())) == min(items, sum(sizes.values()))
    for part, numbers in found.items():
        assert numbers == sorted(set(numbers))
        assert numbers
        assert 0 <= numbers[0] <= numbers[-1] < sizes[part]
    assert found == harness.draw(sizes, items, seed)


def test_marks() -> None:
    assert harness.mark(True, "acc", "x") == 1
    assert harness.mark((-8.0, 4), "word_perplexity", "x") == 2
    assert harness.mark((-8.0, 4), "bits_per_byte", "x") == pytest.approx(2 / math.log(2))
    with pytest.raises(UnsupportedError, match=r"lm-eval:f1 .*not one number per item|not one number per item"):
        harness.mark((1, 2, 3), "mcc", "lm-eval:f1")
