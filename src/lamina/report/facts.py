"""What the documents say, as rows and sentences: budget, verdict, costs, evidence, contract, healing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lamina.core.documents import Budget, Evidence, EvidenceFile, Receipts
from lamina.report.charts import Dot
from lamina.report.numbers import (
    DASH,
    NBSP,
    NONE,
    count,
    data,
    fixed,
    macs,
    percent,
    scaled,
    signed,
    significant,
    span,
    times,
)
from lamina.report.read import Run

LABELS = {
    "perplexity": "Perplexity",
    "loss": "Loss",
    "kl": "KL to the dense model",
    "prefill": "Prefill speed",
    "decode": "Decode speed",
    "promised_prefill": "Prefill speed, promised by work",
    "promised_decode": "Decode speed, promised by work",
    "peak_memory": "Peak memory",
    "expected_loss": "Rise of the loss, predicted",
    "parameters": "Parameters",
    "bytes": "Bytes of weights",
    "kv_bytes": "KV cache per token",
}
SPEEDS = ("prefill", "decode")
TASKS = ("task:", "task.", "capability:")
"""How names of evidence begin that is of a task, or of a capability that several tasks measure."""
CHECKS = {
    "reload_logits": "Logits after reload equal those in memory",
    "reload_cache": "Cached decoding equals the full forward",
    "reload_padding": "A left-padded batch equals its rows",
    "reload_generate": "generate() runs",
}
UNITS: dict[str, str] = {"prefill": "tokens/s", "decode": "tokens/s", "loss": "nats/token", "kl": "nats/token"}
UNITS["expected_loss"] = UNITS["loss"]
COUNTED = {"parameters": count, "bytes": data, "kv_bytes": data, "peak_memory": data}


@dataclass(frozen=True)
class Cost:
    """One cost before and after."""

    label: str
    before: float
    after: float
    shown: tuple[str, str]

    @property
    def left(self) -> float:
        """The share that is left."""
        return self.after / self.before if self.before else 1.0


def budget(asked: Budget) -> str:
    """What was asked, in words."""
    of = asked.metric
    if asked.keep is not None:
        share = percent(asked.keep).replace(".0" + NBSP, NBSP)
        return f"keep {share} of the {of if of != 'bytes' else 'bytes of weights'}"
    if asked.limit is not None:
        return f"at most {data(asked.limit) if of == 'bytes' else count(asked.limit) + ' ' + of}"
    return f"take out {asked.drop} {of if asked.drop != 1 else of.removesuffix('s')}"


def costs(run: Run) -> list[Cost]:
    """Costs of the whole model, from the receipts, else from the evidence."""
    shown = (
        ("parameters", "Parameters", count),
        ("bytes", "Bytes of weights", data),
        ("macs", "Multiply-adds per token", macs),
        ("kv_bytes", "KV cache per token", data),
    )
    found: list[Cost] = []
    for key, label, say in shown:
        pair = sides(run.receipts, run.evidence, key)
        if pair is not None and any(pair):
            found.append(Cost(label, *pair, (say(pair[0]), say(pair[1]))))
    return found


def sides(receipts: Receipts | None, evidence: EvidenceFile | None, key: str) -> tuple[float, float] | None:
    """A cost of the dense and the thinned model, from the receipts, else from the evidence."""
    if receipts is not None and receipts.receipts:
        return getattr(receipts.receipts[0].before, key), getattr(receipts.receipts[-1].after, key)
    if evidence is None:
        return None
    dense, thinned = evidence.get(key, "dense"), evidence.get(key, "thinned")
    return (dense.value, thinned.value) if dense and thinned else None


def number(e: Evidence) -> str:
    """One piece of evidence as a number with its unit left out, in the way that its name asks for."""
    if e.of == "ratio":
        return times(e.value)
    if e.name in COUNTED:
        return COUNTED[e.name](e.value)
    if e.of == "difference" or e.name in ("loss", "kl", "expected_loss"):
        return (signed if e.of == "difference" else fixed)(e.value, 3)
    if e.name == "perplexity":
        return fixed(e.value, 2 if e.value < 10 else 1)
    if e.name in SPEEDS:
        return fixed(e.value, 0 if e.value >= 100 else 1)
    return significant(e.value, 4) if abs(e.value) < 1e5 else scaled(e.value)


def interval(e: Evidence | None) -> str:
    """The 95 % interval, or a dash."""
    if e is None or e.low is None or e.high is None:
        return ""
    low, high = (number(Evidence(name=e.name, of=e.of, value=v)) for v in (e.low, e.high))
    if e.of == "ratio":
        low, high = low[1:], high[1:]
    return span(low, high)


def ratio(evidence: EvidenceFile, name: str) -> Evidence | None:
    """The measured ratio, or the bare quotient of the two measurements."""
    found = evidence.get(name, "ratio")
    dense, thinned = evidence.get(name, "dense"), evidence.get(name, "thinned")
    if found is None and dense and thinned and dense.value:
        return Evidence(name=name, of="ratio", value=thinned.value / dense.value)
    return found


@dataclass(frozen=True)
class Verdict:
    """The first thing to read: sentences, four figures, and whether it became faster."""

    sentence: str
    tiles: tuple[tuple[str, str, str], ...]
    warning: str = ""


def verdict(run: Run) -> Verdict:
    """The verdict in one sentence with its numbers and intervals."""
    parts: list[str] = []
    tiles: list[tuple[str, str, str]] = []
    pair, bits = (sides(run.receipts, run.evidence, key) for key in ("parameters", "bytes"))
    what, say = "parameters", count
    if pair is not None and bits is not None and pair[0] == pair[1] and bits[0] > bits[1]:
        pair, what, say = bits, "the bytes", data
    if pair is not None and pair[0]:
        gone = percent(1 - pair[1] / pair[0])
        parts.append(f"{gone} of {what} gone")
        tiles.append((gone, f"{what.removeprefix('the ')} gone", f"{say(pair[0])} → {say(pair[1])}"))
    if run.evidence is None:
        parts.append("quality and speed are not measured yet")
        return Verdict(_sentence(parts), tuple(tiles))
    rise = ratio(run.evidence, "perplexity")
    if rise is not None:
        arrow = _arrow(run.evidence, "perplexity")
        inside = times(rise.value) + (f", 95{NBSP}%{NBSP}{interval(rise)}" if interval(rise) else "")
        parts.append(f"perplexity {arrow} ({inside})" if arrow else f"perplexity {inside}")
        tiles.append((times(rise.value), "perplexity", _below(interval(rise), arrow)))
    speeds: list[str] = []
    for name in SPEEDS:
        speed = ratio(run.evidence, name)
        if speed is not None:
            speeds.append(f"{name} {times(speed.value)}" + (f" ({interval(speed)})" if interval(speed) else ""))
            tiles.append((times(speed.value), f"{name} speed", _below(interval(speed), _arrow(run.evidence, name))))
    if speeds:
        parts.append(", ".join(speeds))
    return Verdict(_sentence(parts), tuple(tiles), slow(run.evidence))


def _arrow(evidence: EvidenceFile, name: str) -> str:
    dense, thinned = evidence.get(name, "dense"), evidence.get(name, "thinned")
    unit = f"{NBSP}{UNITS[name]}" if name in SPEEDS else ""
    return f"{number(dense)} → {number(thinned)}{unit}" if dense and thinned else ""


def _below(inside: str, arrow: str) -> str:
    return "; ".join(part for part in (f"95{NBSP}%{NBSP}{inside}" if inside else "", arrow) if part)


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""


def slow(evidence: EvidenceFile) -> str:
    """A clear line where a speed's ratio is not above 1 with its whole interval; empty where it is, or unmeasured."""
    lines: list[str] = []
    measured = 0
    for name in SPEEDS:
        speed = ratio(evidence, name)
        if speed is None:
            continue
        measured += 1
        low = speed.low if speed.low is not None else speed.value
        if low > 1:
            continue
        slower = speed.high is not None and speed.high < 1
        inside = f" (95{NBSP}%{NBSP}{interval(speed)})" if interval(speed) else ""
        lines.append(f"{name} {times(speed.value)}{inside}" + (", slower than dense" if slower else ""))
    if not lines:
        return ""
    head = "No speed-up was shown" if len(lines) == measured else "No speed-up was shown for one of the two"
    end = f"The 95{NBSP}% interval does not lie above 1." if len(lines) == 1 else "Neither interval lies above 1."
    return f"{head}: {'; '.join(lines)}. {end}"


@dataclass(frozen=True)
class Row:
    """One row of the evidence table."""

    label: str
    unit: str
    dense: str
    thinned: str
    change: str
    inside: str
    n: str
    how: str


def table(evidence: EvidenceFile) -> list[Row]:
    """Dense, thinned and what lies between them, one row per measured name; costs stand in their own section."""
    skip = {"parameters", "bytes", "kv_bytes", "expected_loss", *CHECKS}
    rows = (e for e in evidence.evidence if e.of != "contract" and not e.name.startswith(TASKS))
    names = dict.fromkeys(e.name for e in rows if e.name not in skip)
    order = {name: i for i, name in enumerate(LABELS)}
    return [_row(evidence, name) for name in sorted(names, key=lambda n: order.get(n, 99))]


def _row(evidence: EvidenceFile, name: str) -> Row:
    dense, thinned = evidence.get(name, "dense"), evidence.get(name, "thinned")
    between = evidence.get(name, "ratio") or evidence.get(name, "difference")
    change = between or (ratio(evidence, name) if name != "loss" else None)
    bounded = change if interval(change) else thinned
    found = [e for e in (change, thinned, dense) if e is not None]
    return Row(
        label=LABELS.get(name, name),
        unit=UNITS.get(name) or next((e.unit for e in (dense, thinned) if e and name not in COUNTED), ""),
        dense=number(dense) if dense else NONE,
        thinned=number(thinned) if thinned else NONE,
        change=number(change) if change else NONE,
        inside=interval(bounded) or NONE,
        n=next((fixed(e.n, 0) for e in found if e.n), NONE),
        how=next((e.how for e in found if e.how), ""),
    )


def ratio_dots(evidence: EvidenceFile) -> list[Dot]:
    """Every ratio to the dense model."""
    notes = {"perplexity": "lower is better", "peak_memory": "lower is better", "prefill": "higher is better"}
    notes["decode"] = notes["prefill"]
    dots: list[Dot] = []
    named = [e.name for e in evidence.evidence if e.of == "ratio" and not e.name.startswith(TASKS)]
    for name in dict.fromkeys(["perplexity", *SPEEDS, "peak_memory", *named]):
        e = ratio(evidence, name)
        if e is not None and e.value > 0 and math.isfinite(e.value):
            note = notes.get(name, "")
            label = LABELS.get(name, name) + (f", {note}" if note else "")
            dots.append(_dot(e, label))
    return dots


def loss_dots(run: Run) -> list[Dot]:
    """The rise of the loss, predicted and measured, and the KL divergence; in nats per token."""
    evidence = run.evidence or EvidenceFile(evidence=())
    dots: list[Dot] = []
    expected = evidence.get("expected_loss", "difference") or evidence.get("expected_loss")
    planned = run.plan.expects.get("loss") if run.plan else None
    if expected is None and planned is not None:
        expected = Evidence(name="expected_loss", of="difference", value=planned)
    if expected is not None:
        dots.append(_dot(expected, "Rise of the loss, predicted by the plan", predicted=True))
    rise = evidence.get("loss", "difference")
    if rise is not None:
        dots.append(_dot(rise, "Rise of the loss, measured"))
    kl = evidence.get("kl") or evidence.get("kl", "difference")
    if kl is not None:
        dots.append(_dot(kl, "KL divergence from the dense model"))
    return dots


def _dot(e: Evidence, label: str, *, predicted: bool = False) -> Dot:
    inside = interval(e)
    shown = number(e) + (f"  ({inside})" if inside else "")
    bounds = (e.low, e.high) if inside else (None, None)
    return Dot(label, e.value, shown, *bounds, predicted=predicted, note=e.how)


def forecast(run: Run) -> str:
    """Predicted against measured loss, in a sentence."""
    dots = {d.predicted: d for d in loss_dots(run) if d.label.startswith("Rise")}
    if len(dots) < 2:
        return ""
    predicted, measured = dots[True].value, dots[False].value
    line = f"The plan predicted {signed(predicted)} nats per token and {signed(measured)} was measured"
    if measured > 0 and predicted > 0:
        line += f" ({times(measured / predicted)} the prediction)"
    return line + ("; the prediction does not count the healing." if run.receipts and run.receipts.healed else ".")


@dataclass(frozen=True)
class Check:
    """One clause of the reload contract; `passed` is None where the evidence carries no tolerance."""

    label: str
    shown: str
    how: str
    passed: bool | None


def checks(evidence: EvidenceFile) -> list[Check]:
    """The reload contract. A difference passes at or below `high`, its tolerance; a flag passes at 1."""
    found: list[Check] = []
    for e in evidence.evidence:
        if e.of != "contract":
            continue
        if e.name.endswith(("logits", "cache", "padding")):
            shown = f"largest difference {significant(e.value, 2)}"
            if e.high is not None:
                shown += f", tolerance {significant(e.high, 1)}"
            passed = None if e.high is None else e.value <= e.high
        else:
            shown, passed = ("yes" if e.value else "no") if e.value in (0, 1) else significant(e.value), e.value >= 1
        found.append(Check(CHECKS.get(e.name, e.name), shown, e.how, passed))
    return found


def history(healed: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The losses of a healing run as (step, loss): from a list of numbers, of pairs, or of mappings."""
    points: list[tuple[float, float]] = []
    raw = healed.get("history")
    for i, item in enumerate(cast("Sequence[Any]", raw) if isinstance(raw, list | tuple) else (), 1):
        if isinstance(item, Mapping):
            step, loss = item.get("step", i), item.get("loss")
        else:
            step, loss = item if isinstance(item, list | tuple) and len(item) == 2 else (i, item)
        if isinstance(step, int | float) and isinstance(loss, int | float) and math.isfinite(loss):
            points.append((float(step), float(loss)))
    return sorted(points)


def healing(healed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the healer noted besides its history."""
    return [(key.replace("_", " "), _say(value)) for key, value in healed.items() if key != "history"]


def _say(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NONE}[value]
    if isinstance(value, int | float):
        return f"{value:.4g}" if isinstance(value, float) else fixed(value, 0)
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_say(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_say(v) for v in value) or DASH
    return str(value)
