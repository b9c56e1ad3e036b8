"""Evidence of tasks against literal counts; planted truth: equal models, a broken one, one lost capability."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lamina.core.documents import Evidence, EvidenceFile
from lamina.evaluators.tasks._evidence import _test, above_chance, evidence, notes, profile, shown, verdict
from lamina.evaluators.tasks._item import Marks, Outcome, Task, paired
from lamina.maths.paired import holm, mcnemar, wilson

N = 400


def outcome(task: str, dense: Any, thinned: Any, **more: Any) -> Outcome:
    fields: dict[str, Any] = {"capability": "syntax", "metric": "accuracy", "higher": True, "chance": 0.25, **more}
    return Outcome(task=task, dense=np.asarray(dense, float), thinned=np.asarray(thinned, float), **fields)


def answers(share: float, seed: int) -> Any:
    return (np.random.default_rng(seed).random(N) < share).astype(float)


def worsened(marks: Any, share: float, seed: int) -> Any:
    """The marks with a share of the right answers lost."""
    return marks * (np.random.default_rng(seed).random(len(marks)) >= share)


def row(rows: Any, name: str, of: str = "difference") -> Evidence:
    (found,) = [e for e in rows if e.name == name and e.of == of]
    return found


def test_every_number_is_what_counting_gives() -> None:
    a, b = answers(0.7, 1), answers(0.7, 2)
    one = outcome("one", a, worsened(a, 0.3, 3), how="told")
    two = outcome("two", b, worsened(b, 0.02, 4), capability="code", chance=None)
    rows = evidence([one, two])
    for o in (one, two):
        worse, better = int(((o.dense == 1) & (o.thinned == 0)).sum()), int(((o.dense == 0) & (o.thinned == 1)).sum())
        found = row(rows, f"task:{o.task}")
        assert found.value == pytest.approx(o.thinned.mean() - o.dense.mean())
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.value < found.high
        assert f"{worse} items worse and {better} better" in found.how
        assert "exact McNemar, Holm over 2 tasks" in found.how
        for of, marks in (("dense", o.dense), ("thinned", o.thinned)):
            own = row(rows, f"task:{o.task}", of)
            assert (own.low, own.high) == wilson(marks.sum(), N)
            assert (own.value, own.n, own.chance) == (marks.mean(), N, o.chance)
    expected = holm([mcnemar(int(((o.dense - o.thinned) == 1).sum()), 0) for o in (one, two)])
    assert [row(rows, f"task:{o.task}").p for o in (one, two)] == expected
    assert "told" in row(rows, "task:one", "dense").how


def test_equal_models_show_nothing() -> None:
    tasks = [outcome(f"t{n}", answers(0.6, n), answers(0.6, n), capability="ab"[n % 2]) for n in range(6)]
    rows = evidence(tasks)
    for e in rows:
        if e.of == "difference":
            assert (e.value, e.p) == (0.0, 1.0)
    assert all(verdict(e) == "not distinguishable" for e in rows if e.name.startswith("task:") and e.of == "difference")
    said = notes(rows)
    assert said[0].startswith("thinned against dense: not distinguishable in 6 of 6 tasks")
    assert "could see a loss of" in said[1]
    assert len(said) == 2


def test_chance_alone_is_rarely_called_a_loss() -> None:
    """Models that differ on a third of the items without being better or worse, in 8 tasks: one run in 20 at most."""
    draw, found = np.random.default_rng(11), 0
    for _ in range(400):
        values = []
        for _ in range(8):
            a = (draw.random(100) < 0.6).astype(float)
            values.append(_test(outcome("t", a, np.where(draw.random(100) < 0.33, draw.permutation(a), a))))
        found += min(holm(values)) < 0.05
    assert 0 < found <= 33  # 20 expected at most; more than 33 has a chance of 0.3 %


def test_a_loss_of_the_size_that_is_told_is_found_in_four_runs_of_five() -> None:
    draw = np.random.default_rng(2)
    first = outcome("t", answers(0.7, 1), worsened(answers(0.7, 1), 0.1, 5))
    sees = row(evidence([first]), "task:t").sees
    assert sees is not None
    discordance = float(np.mean(first.dense != first.thinned))
    lost, won = (discordance + sees) / 2, (discordance - sees) / 2
    assert won >= 0
    counts = draw.multinomial(N, [lost, won, 1 - discordance], 2000)
    assert np.mean([w > b and mcnemar(int(w), int(b)) <= 0.05 for w, b, _ in counts]) == pytest.approx(0.8, abs=0.04)


def test_losses_are_worse_when_higher() -> None:
    dense = np.random.default_rng(0).normal(3, 0.5, 200)
    loss = {"metric": "nats/token", "higher": False, "chance": None}
    rows = evidence([outcome("text", dense, dense + 0.1 + 0.05 * answers(0.5, 1)[:200], **loss)])
    found = row(rows, "task:text")
    assert (verdict(found), found.better, found.unit) == ("worse", "lower", "nats/token")
    assert found.value == pytest.approx(0.125, abs=0.01)
    assert found.p is not None
    assert found.p < 1e-4
    assert found.sees is not None
    assert 0 < found.sees < 0.02
    better = row(evidence([outcome("text", dense, dense - 0.1, **loss)]), "task:text")
    assert verdict(better) == "better"
    capability = row(rows, "capability:syntax")
    assert capability.value == pytest.approx(found.value)
    assert capability.p is None


def test_items_of_one_text_count_as_one() -> None:
    """Each text lost as a whole: 500 items lost in 5 texts are no proof, in 250 texts they are."""
    dense = np.ones(N)
    for texts, significant in ((4, False), (200, True)):
        groups = tuple(np.arange(N) * texts // N)
        thinned = np.where(np.asarray(groups) < texts // 2, 0.0, 1.0)
        rows = evidence([outcome("t", dense, thinned, groups=groups)])
        found = row(rows, "task:t")
        assert found.p is not None
        assert (found.p < 0.05) is significant
        assert f"{texts} texts" in found.how
        assert found.value == -0.5
        wide = row(rows, "task:t", "thinned")
        assert wide.low is not None
        assert wide.high is not None
        assert (wide.high - wide.low > 0.3) is not significant


def test_one_lost_capability_is_named_and_the_others_are_not() -> None:
    tasks = [outcome(f"{c}{n}", a := answers(0.7, n), worsened(a, 0.05, 9 + n), capability=c)
             for n, c in enumerate("abc")]  # fmt: skip
    tasks.append(outcome("gone", answers(0.8, 7), answers(0.25, 8), capability="needles"))
    rows = evidence(tasks)
    hit = {e.capability for e in rows if e.name.startswith("capability:") and e.p is not None and e.p < 0.05}
    assert hit == {"needles"}
    assert any(line.startswith("needles is hit harder than the other capabilities") for line in notes(rows))


def test_what_was_at_chance_is_said_and_left_out_of_the_profile() -> None:
    blind = outcome("blind", answers(0.25, 1), answers(0.25, 2), capability="knowledge")
    able = outcome("able", answers(0.7, 1), answers(0.7, 1))
    assert not above_chance(blind)
    assert above_chance(able)
    assert [e.capability for e in profile([blind, able])] == ["syntax"]
    assert any(
        "no better than guessing when dense" in line and "blind" in line for line in notes(evidence([blind, able]))
    )


def test_a_capability_is_the_mean_of_its_tasks_with_their_error() -> None:
    a, b = answers(0.8, 1), answers(0.6, 2)
    one, two = outcome("one", a, worsened(a, 0.3, 3)), outcome("two", b, worsened(b, 0.1, 4))
    found = row(evidence([one, two]), "capability:syntax")
    gains = [o.thinned - o.dense for o in (one, two)]
    assert found.value == pytest.approx(np.mean([g.mean() for g in gains]))
    error = np.sqrt(sum(g.var(ddof=1) / N for g in gains)) / 2
    assert found.high is not None
    assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-6)
    assert found.n == 2 * N


def test_units_do_not_mix() -> None:
    dense = np.random.default_rng(0).normal(3, 0.5, N)
    loss = outcome("text", dense, dense + 1, metric="nats/token", higher=False, chance=None, capability="code")
    rows = profile([loss, outcome("able", answers(0.7, 1), answers(0.7, 1))])
    assert [(e.capability, e.unit, e.p) for e in rows] == [("syntax", "accuracy", None), ("code", "nats/token", None)]


def test_the_rows_go_to_a_file_and_back(tmp_path: Any) -> None:
    rows = evidence([outcome("t", answers(0.7, 1), answers(0.7, 2))])
    EvidenceFile(evidence=rows).save(tmp_path / "evidence.json")
    assert EvidenceFile.load(tmp_path / "evidence.json").evidence == rows
    old = EvidenceFile.from_data({"lamina": 1, "evidence": [{"name": "loss", "value": 1.0}]})
    assert (old.evidence[0].p, old.evidence[0].capability) == (None, "")


def test_marks_and_outcomes_refuse_what_does_not_pair() -> None:
    task = Task(name="t", capability="syntax", of=("decoder",), score=lambda s: Marks.of([1], ["a"]))
    one, other = Marks.of([1, 0], ["a", "b"]), Marks.of([1, 0], ["a", "c"])
    assert paired(task, one, one).dense.tolist() == [1, 0]
    with pytest.raises(ValueError, match="not given the same items"):
        paired(task, one, other)
    with pytest.raises(ValueError, match="not given the same items"):
        paired(task, one, Marks.of([1, 0], ["a", "b"], groups=[0, 0]))
    for values, keys, groups in (([1], ["a", "b"], []), ([], [], []), ([1, 2], ["a", "b"], [0])):
        with pytest.raises(ValueError, match="one number per item"):
            Marks.of(values, keys, groups=groups)
    with pytest.raises(ValueError, match="item 1 has no finite mark"):
        Marks.of([1, float("nan")], ["a", "b"])
    with pytest.raises(ValueError, match="one mark per item"):
        outcome("t", [1, 0], [1])


def test_p_values_in_words() -> None:
    assert (shown(None), shown(1e-6), shown(0.25)) == ("", "< 0.001", "0.250")
