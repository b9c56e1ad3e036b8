"""Outcomes of tasks as evidence: differences with intervals and corrected p values, and a profile of capabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lamina.core.documents import Evidence
from lamina.evaluators.tasks._item import Outcome
from lamina.maths import paired
from lamina.maths.bootstrap import ratio_interval

LEVEL = 0.05
"""The chance of even one false finding among the tests of a run."""
TASK, CAPABILITY = "task:", "capability:"
"""What the names of such evidence begin with."""
SPREAD = 1.959964
"""Standard errors to each side of a 95 % interval."""


def evidence(outcomes: Sequence[Outcome]) -> tuple[Evidence, ...]:
    """Per task dense, thinned and the difference; then one row per capability and unit.

    The p values of the tasks' differences are corrected by Holm over all of them; so are those of the capabilities, of
    which each is held against the others that are measured in the same unit.
    """
    alpha = LEVEL / max(len(outcomes), 1)
    corrected = paired.holm([_test(o) for o in outcomes])
    rows: list[Evidence] = []
    for outcome, p in zip(outcomes, corrected, strict=True):
        rows += [_own(outcome, "dense"), _own(outcome, "thinned"), _difference(outcome, p, alpha, len(outcomes))]
    return (*rows, *profile(outcomes))


def above_chance(outcome: Outcome) -> bool:
    """Whether the dense model does better than guessing, so that there is something to lose."""
    dense = _own(outcome, "dense")
    return dense.chance is None or dense.low is None or dense.low > dense.chance


def _common(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": TASK + outcome.task, "unit": outcome.metric, "n": len(outcome.dense), "seed": outcome.seed,
        "capability": outcome.capability, "better": "higher" if outcome.higher else "lower",
    }  # fmt: skip


def _own(outcome: Outcome, of: Any) -> Evidence:
    """One model's mean: with Wilson's interval where it is a share of items that stand alone, else by bootstrap."""
    marks = outcome.dense if of == "dense" else outcome.thinned
    if outcome.exact:
        low, high = paired.wilson(float(marks.sum()), len(marks))
        how = "Wilson's interval"
    else:
        low, high = ratio_interval(*outcome.units(marks), seed=outcome.seed) or (None, None)
        how = f"BCa bootstrap over {_what(outcome)}"
    how = "; ".join(part for part in (outcome.how, how) if part)
    return Evidence(
        value=float(marks.mean()), low=low, high=high, of=of, how=how, chance=outcome.chance, **_common(outcome)
    )


def _what(outcome: Outcome) -> str:
    return f"{len(set(outcome.groups))} texts" if outcome.groups else "items"


def _counts(outcome: Outcome) -> tuple[int, int]:
    """How many items the thinned model lost and won."""
    return int((outcome.gain < 0).sum()), int((outcome.gain > 0).sum())


def _test(outcome: Outcome) -> float:
    """The p value of the difference, not yet corrected."""
    if outcome.exact:
        return paired.mcnemar(*_counts(outcome))
    return paired.flipped(outcome.units(outcome.gain)[0], seed=outcome.seed)


def _difference(outcome: Outcome, p: float, alpha: float, tests: int) -> Evidence:
    """Thinned − dense with a paired interval, the corrected p value and the smallest loss that could be seen."""
    change = outcome.thinned - outcome.dense
    low, high = ratio_interval(*outcome.units(change), seed=outcome.seed) or (None, None)
    worse, better = _counts(outcome)
    if outcome.exact:
        sees = paired.visible(len(change), (worse + better) / len(change), alpha=alpha)
        test = "exact McNemar"
    else:
        sees = paired.visible_mean(paired.error(*outcome.units(change)), alpha=alpha)
        test = f"signs flipped over {_what(outcome)}"
    holm = f", Holm over {tests} tasks" if tests > 1 else ""
    how = f"thinned − dense, {worse} items worse and {better} better; paired bootstrap; {test}{holm}"
    return Evidence(
        value=float(change.mean()), low=low, high=high, of="difference", how=how, p=p, sees=sees, **_common(outcome)
    )


@dataclass(frozen=True)
class _Mean:
    """The mean gain of a capability over its tasks, with its standard error."""

    capability: str
    outcomes: tuple[Outcome, ...]

    @property
    def gain(self) -> float:
        return float(np.mean([o.gain.mean() for o in self.outcomes]))

    @property
    def error(self) -> float:
        return float(np.linalg.norm([paired.error(*o.units(o.gain)) for o in self.outcomes]) / len(self.outcomes))

    @property
    def items(self) -> int:
        return sum(len(o.dense) for o in self.outcomes)


def profile(outcomes: Sequence[Outcome]) -> tuple[Evidence, ...]:
    """The mean difference of each capability, its tasks alike in weight, and how it compares with the others.

    `p` is one-sided, that the capability is hit no harder than the others' mean; None where there are no others in the
    same unit. Tasks that the dense model can't do better than by guessing are left out.
    """
    able = [o for o in outcomes if above_chance(o)]
    rows: list[Evidence] = []
    units = sorted({(o.metric, o.higher) for o in able}, key=lambda u: u[0] != "accuracy")
    for unit in units:
        same = sorted((o for o in able if (o.metric, o.higher) == unit), key=lambda o: o.capability)
        means = [_Mean(name, tuple(own)) for name, own in groupby(same, key=lambda o: o.capability)]
        tested = paired.holm([_harder(m, [x for x in means if x is not m]) for m in means])
        rows += [_row(m, p if len(means) > 1 else None, unit) for m, p in zip(means, tested, strict=True)]
    return tuple(rows)


def _harder(one: _Mean, rest: Sequence[_Mean]) -> float:
    """One-sided p value that a capability is hit no harder than the mean of the rest."""
    if not rest:
        return 1.0
    others = float(np.linalg.norm([m.error for m in rest]) / len(rest))
    return paired.lower(one.gain, one.error, float(np.mean([m.gain for m in rest])), others)


def _row(one: _Mean, p: float | None, unit: tuple[str, bool]) -> Evidence:
    metric, higher = unit
    value = one.gain if higher else -one.gain
    half = SPREAD * one.error
    bounds = (value - half, value + half) if np.isfinite(half) else (None, None)
    names = ", ".join(o.task for o in one.outcomes)
    return Evidence(
        name=CAPABILITY + one.capability, value=value, low=bounds[0], high=bounds[1], unit=metric, of="difference",
        n=one.items, seed=one.outcomes[0].seed, capability=one.capability, better="higher" if higher else "lower", p=p,
        how=f"mean of {names} ± 1.96 standard errors; against the other capabilities, one-sided, Holm",
    )  # fmt: skip


def notes(rows: Sequence[Evidence]) -> tuple[str, ...]:
    """What the tasks say, in plain sentences: what differs, what does not, what could have been seen."""
    tasks = [e for e in rows if e.name.startswith(TASK) and e.of == "difference"]
    if not tasks:
        return ()
    lines = [_verdicts(tasks), _sight(tasks)]
    blind = [e.name.removeprefix(TASK) for e in rows if e.of == "dense" and e.name.startswith(TASK) and at_chance(e)]
    if blind:
        lines.append(f"no better than guessing when dense, so that nothing could be lost: {', '.join(blind)}")
    hit = [e for e in rows if e.name.startswith(CAPABILITY) and e.p is not None and e.p < LEVEL]
    lines += [f"{e.capability} is hit harder than the other capabilities (p {shown(e.p)})" for e in hit]
    return tuple(line for line in lines if line)


def at_chance(row: Evidence) -> bool:
    """Whether a model's own mean is not shown to be better than guessing."""
    return row.chance is not None and row.low is not None and row.low <= row.chance


def shown(p: float | None) -> str:
    """A p value as people write it."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict(row: Evidence) -> str:
    """What a task's difference says: worse, better or not distinguishable."""
    if row.p is None or row.p >= LEVEL:
        return "not distinguishable"
    return "worse" if (row.value < 0) == (row.better == "higher") else "better"


def _verdicts(tasks: Sequence[Evidence]) -> str:
    parts: list[str] = []
    for word in ("worse", "better", "not distinguishable"):
        names = [e.name.removeprefix(TASK) for e in tasks if verdict(e) == word]
        if names:
            parts.append(f"{word} in {len(names)} of {len(tasks)} tasks ({', '.join(names)})")
    return "thinned against dense: " + "; ".join(parts)


def _sight(tasks: Sequence[Evidence]) -> str:
    """The power line: which loss the run could see."""
    shares = sorted(e.sees for e in tasks if e.unit == "accuracy" and e.sees is not None)
    if not shares:
        return ""
    low, high = f"{100 * shares[0]:.1f}", f"{100 * shares[-1]:.1f}"
    span = low if low == high else f"{low} to {high}"
    return f"in a task of accuracy this run could see a loss of {span} points (80 % power at the corrected level)"
