"""Tasks of BIG-bench (Srivastava et al., 2022, arXiv 2206.04615) whose items have choices."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence
from typing import Any

from lamina.evaluators.tasks._item import Marks, Subject, task
from lamina.evaluators.tasks._questions import Question, answered, drawn

SHORT = range(5, 11)
"""Words of the sentences that are translated or ended."""
TRIES = 64
"""Draws of a wrong answer before all of the pool is gone through."""


def examples(name: str) -> list[dict[str, Any]]:
    """The examples of one task, as its authors wrote them."""
    from lamina.lab.datasets import dataset

    text = (dataset("bigbench") / name / "task.json").read_text(encoding="utf-8")
    return json.loads(text)["examples"]


def asked(example: dict[str, Any], context: str) -> Question:
    """A question of an example's own choices; right are those of the highest score."""
    scores = example["target_scores"]
    best = max(scores.values())
    right = frozenset(n for n, score in enumerate(scores.values()) if score == best)
    return Question(context, tuple(f" {c.strip()}" for c in scores), right)


@task("hyperbaton", capability="syntax", of="decoder", data="bigbench", items=50_000)
def hyperbaton(subject: Subject) -> Marks:
    """Which of two phrases has its adjectives in the usual order."""
    found = drawn(examples("hyperbaton"), subject)
    return answered(subject, [_phrases(e) for e in found], "hyperbaton", by="sum")


def _phrases(example: dict[str, Any]) -> Question:
    """The two phrases themselves, which have the same words, rather than the letters that stand for them."""
    first, second = re.findall(r'[ab] " (.*?) "', example["input"])
    right, wrong = (first, second) if example["target_scores"]["a"] == 1 else (second, first)
    return Question.of("Here is a", right, [wrong])


@task("goal-inference", capability="reasoning", of="decoder", data="bigbench", items=1703)
def goal_inference(subject: Subject) -> Marks:
    """Which goal a step serves, of four (wikiHow)."""
    found = drawn(examples("goal_step_wikihow/goal_inference"), subject)
    return answered(subject, [asked(e, e["input"].strip()) for e in found], "goal-inference")


@task("addition", capability="reasoning", of="decoder", data="bigbench", items=1000)
def addition(subject: Subject) -> Marks:
    """The sum of two numbers of two digits, among other numbers and words."""
    found = drawn(examples("arithmetic/2_digit_addition"), subject)
    return answered(subject, [asked(e, f"Question: {e['input']}\nAnswer:") for e in found], "addition")


@task("intent", capability="understanding", of="decoder", data="bigbench", items=693)
def intent(subject: Subject) -> Marks:
    """What somebody asks a machine for, of four intents."""
    found = drawn(examples("intent_recognition"), subject)
    return answered(subject, [_intent(e, subject.seed) for e in found], "intent")


def _intent(example: dict[str, Any], seed: int) -> Question:
    """What is said, with its intent and three others."""
    said = example["input"].strip().removeprefix("Utterance: ")
    scores = example["target_scores"]
    right = max(scores, key=scores.__getitem__)
    wrong = others([c for c in scores if not scores[c]], right, f"{seed} {said}", 3)
    return Question.of(f'"{said}" is a request to', _plain(right), [_plain(c) for c in wrong])


def _plain(intent: str) -> str:
    return intent.replace("_", " ")


@task("science", capability="knowledge", of="decoder", data="bigbench", items=6500)
def science(subject: Subject) -> Marks:
    """The answer to a question of elementary science without a text to read it from, of four (QASC)."""
    every = examples("natural_instructions/subtask041_qasc_answer_generation")
    answers = [str(e["target"][0]) for e in every]
    chosen = drawn(range(len(every)), subject)
    questions = [_science(every[n]["input"], answers, n, subject.seed) for n in chosen]
    return answered(subject, questions, "science")


def _science(text: str, answers: Sequence[str], number: int, seed: int) -> Question:
    """A question with the answers of three others, drawn for it alone."""
    question = text.partition("Question:")[2].strip()
    right = answers[number]
    return Question.of(f"Question: {question}\nAnswer:", right, others(answers, right, f"{seed} {number}", 3))


def others(pool: Sequence[str], right: str, draw: str, count: int) -> list[str]:
    """So many members of a pool that differ from the right one and among each other, by a draw of that name.

    Fewer, where the pool has no more.
    """
    generator, found = random.Random(draw), dict[str, str]()
    for one in itertools.chain((generator.choice(pool) for _ in range(TRIES)), pool):
        if one.casefold() != right.casefold() and len(found) < count:
            found.setdefault(one.casefold(), one)
        if len(found) == count:
            break
    return [*found.values()]


@task("german", capability="other languages", of="decoder", data="bigbench", items=569)
def german(subject: Subject) -> Marks:
    """What a German sentence says in English, of three sentences (MultiEmo)."""
    return answered(subject, translations(subject, "de", "German"), "german")


@task("french", capability="other languages", of="decoder", data="bigbench", items=544)
def french(subject: Subject) -> Marks:
    """How a French sentence ends, of three endings (MultiEmo)."""
    return answered(subject, endings(subject, "fr"), "french")


def sentences(language: str) -> list[str]:
    """The sentences of reviews in one language; those of the same number say the same."""
    return [e["input"].strip() for e in examples(f"multiemo/reviews_sentence_{language}")]


def translations(subject: Subject, language: str, name: str) -> list[Question]:
    """Sentences with their English and that of two others of like length."""
    pairs = [(a, b) for a, b in zip(sentences(language), sentences("en"), strict=True) if len(b.split()) in SHORT]
    pool = [b for _, b in pairs]
    return [
        Question.of(f"{name}: {a}\nEnglish:", b, others(pool, b, f"{subject.seed} {a}", 2))
        for a, b in drawn(pairs, subject)
    ]


def endings(subject: Subject, language: str) -> list[Question]:
    """Sentences cut at six tenths of their words, with the rest and that of two others."""
    words = [s.split() for s in sentences(language)]
    cut = [(" ".join(w[: len(w) * 6 // 10]), " ".join(w[len(w) * 6 // 10 :])) for w in words if len(w) in SHORT]
    pool = [end for _, end in cut]
    return [Question.of(a, b, others(pool, b, f"{subject.seed} {a}", 2)) for a, b in drawn(cut, subject)]
