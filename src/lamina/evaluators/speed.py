"""Speed: prefill and decoding, dense and thinned in turn in one run, and what the dropped parts promised."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lamina.core.documents import Evidence
from lamina.core.registry import evaluator
from lamina.core.speeds import NO_GAIN, no_gain
from lamina.evaluators.engines import ORDER, alike, in_turn, spread

if TYPE_CHECKING:
    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab

WORK = ("prefill", "decode")


@dataclass
class _Times:
    """Seconds per round, of both models, whether all their shapes are the same, and the share of the dense model's time
    that the dropped parts took.
    """

    thinned: list[float] = field(default_factory=list[float])
    dense: list[float] = field(default_factory=list[float])
    alike: bool = False
    share: list[float] = field(default_factory=list[float])


@evaluator("speed", status="stable")
@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of prefill and decoding, dense and thinned interleaved, with the ratio's interval.

    Each round runs dense, thinned, thinned, dense, so that drift of the machine falls on both alike. `gone` are the
    dropped sites of the dense model: their modules are timed inside it, in a run of their own in every round, and
    `promised_prefill` and `promised_decode` say which speed-up 1 / (1 − their share) promises.
    """

    batch: int = 1
    prefill: int = 256
    prompt: int = 32
    decode: int = 8
    rounds: int = 5
    warmups: int = 1
    seed: int = 0
    gone: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "prefill", "prompt", "decode", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.warmups < 0:
            raise ValueError(f"warmups must not be negative, not {self.warmups}")

    def evaluate(self, lab: Lab, /, *, reference: nn.Module | None) -> tuple[Evidence, ...]:
        """Evidence `prefill` and `decode` (tokens/s; ratio = speed-up), and what was promised where `gone` is given.

        Without a reference only the thinned model's own numbers. Decoding is left out for a model without a cache.
        """
        times = self._measure(lab, reference)
        tokens = {"prefill": self.batch * self.prefill, "decode": self.batch * self.decode}
        shapes = {
            "prefill": f"{self.batch}×{self.prefill} tokens",
            "decode": f"{self.batch}×{self.decode} tokens after {self.prompt}",
        }
        rows = [row for work in WORK for row in self._rows(work, times[work], tokens[work], shapes[work])]
        return tuple(rows)

    def _measure(self, lab: Lab, reference: nn.Module | None) -> dict[str, _Times]:
        from lamina.anatomy import Anatomy
        from lamina.lab.workloads import Workloads

        bench = Workloads(lab, self.batch)
        runs = self._runs(bench)
        same = reference is not None and alike(reference, lab.model)
        found = {work: _Times(alike=same) for work in WORK}
        dense = Anatomy.of(reference) if reference is not None and self.gone else None
        order = ("thinned", "thinned") if reference is None else ORDER
        models: dict[str, Any] = {"thinned": lab.model, "dense": reference}
        for number in range(-self.warmups, self.rounds):
            for work, run in runs.items():
                seconds = in_turn(lambda who, run=run: run(models[who]), order)
                share = self._share(bench, run, reference, dense) if dense is not None else None
                if number >= 0:
                    _note(found[work], seconds, share)
            lab.progress("speed", max(number + 1, 0), self.rounds)
        return found

    def _runs(self, bench: Any) -> dict[str, Callable[[Any], float | None]]:
        """The two workloads: a model → seconds."""
        from lamina.lab.workloads import clock

        whole, prompt = bench.ids(self.prefill), bench.ids(self.prompt)
        bench.ids(self.prompt + self.decode)

        def prefill(model: Any) -> float:
            start = clock(bench.device)
            bench.prefill(model, whole)
            return clock(bench.device) - start

        return {"prefill": prefill, "decode": lambda model: bench.decode(model, prompt, self.decode)}

    def _share(self, bench: Any, run: Callable[[Any], float | None], model: Any, anatomy: Anatomy) -> float | None:
        """The share of the dense model's time that its dropped parts take."""
        from lamina.lab.workloads import modules_of, timed

        with timed(model, modules_of(anatomy, self.gone), bench.device) as spans:
            total = run(model)
        return None if total is None else sum(spans) / total

    def _rows(self, work: str, times: _Times, tokens: int, shape: str) -> list[Evidence]:
        if not times.thinned:
            return []
        how = f"{shape}; median of {len(times.thinned)} rounds"
        ends: dict[str, Any] = {"n": len(times.thinned), "seed": self.seed}
        rows = []
        for of, seconds in (("dense", times.dense), ("thinned", times.thinned)):
            if seconds:
                values = tokens / np.array(seconds)
                rows.append(self._row(work, of, "tokens/s", values, how, ends))
        if times.dense:
            paired = np.array(times.dense) / np.array(times.thinned)
            ratio = self._row(work, "ratio", "", paired, f"{how}, dense and thinned interleaved", ends)
            reason = no_gain(ratio.low, ratio.high, alike=times.alike)
            rows.append(replace(ratio, how=f"{ratio.how}; {NO_GAIN}: {reason}") if reason else ratio)
        if times.share:
            promised = 1 / (1 - np.array(times.share))
            what = f"1 / (1 − share of the dropped parts in the dense model's time); {how}"
            rows.append(self._row(f"promised_{work}", "ratio", "", promised, what, ends))
        return rows

    def _row(self, name: str, of: Any, unit: str, values: Any, how: str, ends: dict[str, Any]) -> Evidence:
        found = spread(values, self.seed)
        return Evidence(name=name, value=found.value, unit=unit, of=of, low=found.low, high=found.high, how=how, **ends)


def _note(times: _Times, seconds: dict[str, list[float | None]], share: float | None) -> None:
    """One round's means; a workload that a model can't run is left out for both."""
    if any(s is None for row in seconds.values() for s in row):
        return
    for who, row in seconds.items():
        getattr(times, who).append(statistics.fmean(s for s in row if s is not None))
    if share is not None:
        times.share.append(share)
