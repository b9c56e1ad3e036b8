"""The table of tasks, and the text tasks on made-up data: prompts, right choices, draws, marks."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamina.core.errors import InputError, UnsupportedError
from lamina.evaluators.tasks import _item, bigbench, needles, texts
from lamina.evaluators.tasks._item import Marks, Subject, Task, chosen, family, kind_of, task, tasks
from lamina.evaluators.tasks._questions import Question, answered, chance, drawn, hit, losses, told
from lamina.testing.models import tiny
from lamina.testing.tools import tokenizer

TOKENIZER = tokenizer()


def subject(**more: Any) -> Subject:
    fields: dict[str, Any] = {"model": tiny("llama", vocab_size=300), "tokenizer": TOKENIZER, "items": 6, **more}
    return Subject(**fields)


# ---------------------------------------------------------------- the table


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> dict[str, Task]:
    """An empty table of tasks."""
    monkeypatch.setattr(_item, "_discover", lambda: None)
    monkeypatch.setattr(_item, "_TASKS", table := {})
    monkeypatch.setattr(_item, "_FAMILIES", {})
    return table


def score(_: Subject) -> Marks:
    """What it shows.

    And more.
    """
    return Marks.of([1], ["a"])


def test_the_decorator_enters_the_card(own: dict[str, Task]) -> None:
    assert task("one", capability="syntax", of="decoder", data="bigbench")(score) is score
    task("two", capability="code", of=("vision", "speech"), metric="nats/token", higher=False)(score)
    assert list(tasks()) == ["two", "one"]
    assert own["one"].summary == "What it shows."
    assert (own["one"].of, own["two"].of) == (("decoder",), ("vision", "speech"))
    with pytest.raises(ValueError, match="registered twice"):
        task("one", capability="syntax", of="decoder")(lambda s: Marks.of([0], ["b"]))


def test_names_groups_and_families_are_chosen(own: dict[str, Task]) -> None:
    for name, of, more in (("a", "decoder", {}), ("b", "decoder", {"groups": ()}), ("c", "vision", {})):
        task(name, capability="x", of=of, **more)(score)
    family("lm-eval")(lambda rest: Task(name=f"lm-eval:{rest}", capability="y", of=("decoder",), score=score))

    def names(asked: str, kind: Any = "decoder") -> list[str]:
        return [t.name for t in chosen(asked, kind)]

    assert names("offline") == ["a"]
    assert names("offline", "vision") == ["c"]
    assert names("b, a ,b") == ["b", "a"]
    assert names("offline,b,lm-eval:arc_easy") == ["a", "b", "lm-eval:arc_easy"]
    with pytest.raises(InputError, match=r"no task named 'ofline'.*did you mean offline"):
        names("ofline")
    with pytest.raises(InputError, match="no task named"):
        names("nothing:x")
    with pytest.raises(UnsupportedError, match="is for vision models, and this is a decoder"):
        names("a,c")
    for empty in ("", " , "):
        with pytest.raises(InputError):
            names(empty)
    with pytest.raises(InputError, match="is for a speech model"):
        names("offline", "speech")


def test_models_are_told_apart() -> None:
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    t5 = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1, vocab_size=20)
    kinds = {
        "decoder": [tiny("llama"), tiny("nanogpt")],
        "encoder": [BertModel(BertConfig(vocab_size=20, **small))],
        "vision": [ViTModel(ViTConfig(image_size=8, patch_size=4, **small))],
        "encoder-decoder": [T5ForConditionalGeneration(t5)],
    }
    for kind, models in kinds.items():
        assert [kind_of(m) for m in models] == [kind] * len(models)


def test_every_task_says_what_it_is() -> None:
    from lamina.lab.datasets import entries

    for name, one in tasks().items():
        assert one.name == name
        assert one.summary.endswith(".")
        assert one.capability
        assert one.data in entries() if one.data else (one.package and one.licence), name


# ---------------------------------------------------------------- questions


def test_a_right_choice_must_beat_every_wrong_one() -> None:
    q = Question("c", (" ab", " abcdef", " x", " y"), frozenset({0, 3}))
    assert hit(q, np.array([-1.0, -2.0, -3.0, -9.0]), by="sum")
    assert hit(q, np.array([-3.0, -2.0, -9.0, -1.0]), by="sum")
    assert not hit(q, np.array([-3.0, -2.0, -9.0, -9.0]), by="sum")
    assert not hit(q, np.array([-2.0, -2.0, -9.0, -9.0]), by="sum")
    assert not hit(q, np.array([-3.0, -6.0, -9.0, -9.0]), by="bytes")  # -1 a byte against -6/7
    assert hit(q, np.array([-2.5, -6.0, -9.0, -9.0]), by="bytes")
    assert chance([q, Question.of("c", "a", ["b", "d"])]) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert told([q, Question.of("c", "a", ["b"])], "bytes") == "log-likelihood per byte of 2 to 4 choices, zero-shot"


def test_draws_follow_the_seed_and_hold_each_item_once() -> None:
    population = list(range(50))
    one = drawn(population, subject(items=20))
    assert one == drawn(population, subject(items=20))
    assert one != drawn(population, subject(items=20, seed=1))
    assert len(set(one)) == 20
    assert sorted(drawn(population, subject(items=500))) == population


def test_answers_are_marked_and_keyed() -> None:
    questions = [Question.of("a b ", "the", ["x", "q"]), Question.of("c ", "x", ["the"])]
    marks = answered(subject(), questions, "t", by="sum")
    again = answered(subject(), questions[::-1], "t", by="sum")
    assert marks.values.tolist() == again.values.tolist()[::-1]
    assert marks.keys == again.keys[::-1]
    assert set(marks.values) <= {0.0, 1.0}
    assert marks.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    with pytest.raises(InputError, match="no items"):
        answered(subject(), [], "t")


def test_losses_are_the_models_own() -> None:
    import torch

    s = subject()
    marks = losses(s, [("ab ", "cdef"), ("xyz", "q r s")], "t")
    for value, (before, after) in zip(marks.values, [("ab ", "cdef"), ("xyz", "q r s")], strict=True):
        ids = torch.tensor([TOKENIZER(before + after)["input_ids"]])
        start = len(TOKENIZER(before)["input_ids"])
        with torch.no_grad():
            model: Any = s.model
            logs = model(ids).logits[0].log_softmax(-1)
        own = [float(logs[n - 1, ids[0, n]]) for n in range(start, ids.shape[1])]
        assert value == pytest.approx(-np.mean(own), abs=1e-4)


# ---------------------------------------------------------------- the tasks' items


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files in the forms of the data sets."""

    def put(name: str, examples: list[Any]) -> None:
        path = tmp_path / name / "task.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"examples": examples}), encoding="utf-8")

    order = [(f'Which sentence has the correct adjective order: a " {x} " b " {y} " ?', n) for n, (x, y) in
             enumerate([("big red cat", "red big cat"), ("old tan dog", "tan old dog")] * 3)]  # fmt: skip
    put("hyperbaton", [{"input": t, "target_scores": {"a": 1 - n % 2, "b": n % 2}} for t, n in order])
    put("goal_step_wikihow/goal_inference", [{"input": "The goal of 'x' is ", "target_scores": {"a": 0, "b c": 1}}])
    put("arithmetic/2_digit_addition", [{"input": "What is 1 plus 2?", "target_scores": {"3": 1.0, "4": 0.0}}])
    put("intent_recognition", [{"input": "Utterance: Play it", "target_scores": {"play_music": 1, "rate_book": 0}}])
    qasc = [{"input": f"Fact: f. \nQuestion: q{n}?", "target": [f"answer {n}."]} for n in range(9)]
    put("natural_instructions/subtask041_qasc_answer_generation", qasc)
    for language in ("de", "en", "fr"):
        said = [{"input": f"{language} one two three four five six {n}"} for n in range(8)]
        put(f"multiemo/reviews_sentence_{language}", [*said, {"input": "short"}])
    (tmp_path / "tech").mkdir()
    for n in range(3):
        body = "Headline here\n\n" + "word " * (40 + 80 * n) + str(n)
        (tmp_path / "tech" / f"{n}.txt").write_text(body, encoding="utf-8")
    problems = [{"prompt": f"def f{n}():\n", "canonical_solution": "    return 1\n\n"} for n in range(2)]
    packed = gzip.compress("\n".join(map(json.dumps, problems)).encode())
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(packed)
    monkeypatch.setattr("lamina.lab.datasets.dataset", lambda name: tmp_path)
    return tmp_path


def test_prompts_hold_what_they_should(data: Path) -> None:
    for example in bigbench.examples("hyperbaton"):
        q = bigbench._phrases(example)
        first = example["input"].split('"')[1].strip()
        assert (q.choices[0] == f" {first}") is (example["target_scores"]["a"] == 1)
        assert sorted(q.choices[0].split()) == sorted(q.choices[1].split())
    (one,) = bigbench.examples("intent_recognition")
    q = bigbench._intent(one, 0)
    assert (q.context, q.choices, q.right) == ('"Play it" is a request to', (" play music", " rate book"), {0})
    (one,) = bigbench.examples("goal_step_wikihow/goal_inference")
    assert bigbench.asked(one, "c") == Question("c", (" a", " b c"), frozenset({1}))


def test_wrong_answers_are_other_answers(data: Path) -> None:
    q = bigbench._science("Fact: never shown. \nQuestion: who?", [f"a{n}" for n in range(5)], 2, 0)
    assert q.context == "Question: who?\nAnswer:"
    assert q.choices[0] == " a2"
    assert len(set(q.choices)) == 4
    for draw in range(40):
        found = bigbench.others(["a", "A", "b", "c", "d", "b"], "a", str(draw), 3)
        assert len({f.casefold() for f in found}) == 3
        assert "a" not in {f.casefold() for f in found}
    letters = ["a", "b", "c", "d", "e"]
    assert bigbench.others(letters, "a", "x", 2) == bigbench.others(letters, "a", "x", 2)
    assert bigbench.others(["a", "A", "b"], "a", "x", 3) == ["b"]  # no more are there
    pairs = bigbench.translations(subject(items=3), "de", "German")
    assert len(pairs) == 3
    for q in pairs:
        assert q.context.startswith("German: de one")
        assert q.choices[0].removeprefix(" en ") == q.context.split("\n")[0].removeprefix("German: de ")
    for q in bigbench.endings(subject(items=3), "fr"):
        assert (q.context + q.choices[0]).startswith("fr one two three four five six")
        assert q.choices[0][-1] not in {c[-1] for c in q.choices[1:]}


NAMES = ("hyperbaton", "goal-inference", "addition", "intent", "science", "german", "french", "news", "humaneval")


@pytest.mark.parametrize("name", NAMES)
def test_a_task_gives_the_same_marks_for_the_same_seed(data: Path, name: str) -> None:
    long = tiny("llama", vocab_size=300, max_position_embeddings=2048)
    card = tasks()[name]
    marks, again = (card.score(subject(model=long, items=3)) for _ in range(2))
    assert marks.keys == again.keys
    assert marks.values.tolist() == again.values.tolist()
    assert 1 <= len(marks.keys) <= 3
    assert marks.how
    other = card.score(subject(model=tiny("llama", vocab_size=300, seed=1, max_position_embeddings=2048), items=3))
    assert other.keys == marks.keys
    if card.metric != "accuracy":
        assert marks.chance is None
        assert (marks.values > 0).all()
        assert (marks.values != other.values).any()


def test_articles_are_cut_at_a_word(data: Path) -> None:
    before, after = texts._article("Head\n\n" + "word " * 200)
    assert before == "Head\n\n"
    assert after.endswith("word")
    assert texts.BODY - 8 < len(after) <= texts.BODY
    assert texts._article("Head\nshort one") == ("Head\n\n", "short one")


def test_programs_need_a_long_context(data: Path) -> None:
    with pytest.raises(UnsupportedError, match="1,024"):
        texts.humaneval(subject())


# ---------------------------------------------------------------- needles


def test_needles_stand_in_the_text_at_all_depths() -> None:
    prose = [f"This is sentence number {n} of the long prose that hides it all." for n in range(900)]
    sizes = [12] * len(prose)
    depths = []
    for number in range(30):
        questions = needles.document(prose, sizes, 240, random.Random(number))
        assert len(questions) == needles.NEEDLES
        text = questions[0].context.rsplit("\n\n", 1)[0]
        assert text.count("This is sentence") == 20
        for q in questions:
            whole, asked = q.context.rsplit("\n\n", 1)
            assert whole == text
            assert text.count(f"{asked}{q.choices[0]}.") == 1, asked
            assert all(f"is{c}." in text for c in q.choices)
            assert len(set(q.choices)) == needles.CHOICES
            depths.append(text.index(f"{asked}{q.choices[0]}.") / len(text))
    assert np.histogram(depths, 4, (0, 1))[0].min() > 40
    again = needles.document(prose, sizes, 240, random.Random(3))
    assert again == needles.document(prose, sizes, 240, random.Random(3))
    assert again != needles.document(prose, sizes, 240, random.Random(4))


def test_needles_are_read_with_their_text_once() -> None:
    model: Any = tiny("llama", vocab_size=300, max_position_embeddings=2048)
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(needles, "LENGTHS", (64,))
    try:
        marks = needles.needles(subject(model=model, items=24))
    finally:
        monkey.undo()
        hook.remove()
    assert len(marks.keys) == len(set(marks.keys)) == 24
    assert marks.groups == (0,) * 16 + (1,) * 8
    assert marks.chance == 0.25
    long = [n for n in seen if n > 300]
    assert len(long) == 2


def test_needles_keep_within_the_context() -> None:
    def lengths(limit: int) -> list[int]:
        return needles.fitting(subject(model=tiny("llama", vocab_size=300, max_position_embeddings=limit)))

    assert lengths(2048) == [256, 512, 1024]
    assert lengths(1024) == [256, 512]
    with pytest.raises(UnsupportedError, match="384 tokens, and the model reads 380"):
        lengths(380)
