"""`speed.json`: what the dense and the thinned model of a run take of time, memory and energy on one machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lamina.core.documents import FORMAT, Document, Evidence

What = Literal["prefill", "decode", "energy"]
Of = Literal["dense", "thinned"]
NO_GAIN = "**no gain**"
"""Stands in the `how` of every ratio that shows none; the reason follows behind a colon."""


def no_gain(low: float | None, high: float | None, *, alike: bool = False, less: bool = False) -> str:
    """Why a ratio with this 95 % interval shows no gain; "" where it shows one.

    `less`: a ratio below 1 is the better one, as of joules. `alike`: both models hold tensors of the same shapes, so
    that whatever the clock says is chance.
    """
    if alike:
        return "all shapes are as before: masks and rounded numbers are multiplied like others"
    if low is None or high is None:
        return "a single round has no interval"
    if low <= 1 <= high:
        return "the interval includes 1"
    if (low > 1) is less:
        return "the thinned model takes more energy" if less else "the thinned model is slower"
    return ""


def no_gains(evidence: Iterable[Evidence]) -> tuple[str, ...]:
    """A line for every ratio of an evidence that says of itself that it shows no gain."""
    rows = ((e, e.how.partition(NO_GAIN + ": ")) for e in evidence if e.of == "ratio")
    return tuple(f"{NO_GAIN} of {e.name}: ×{e.value:.3g}, {why}" for e, (_, mark, why) in rows if mark)


@dataclass(frozen=True, kw_only=True)
class Spread(Document):
    """A median over rounds with its 95 % interval, which one round alone has not."""

    value: float = field(metadata={"always": True})
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedRow(Document):
    """One work of one engine, dense and thinned in turn.

    `length`: tokens of each prompt; `tokens`: what one run of the work makes or reads, all `batch` rows together.
    `dense_rounds`, `thinned_rounds`: seconds of one run (of energy: joules), the mean of a round's two. `dense`,
    `thinned`: tokens per second (joules per token). `ratio`: how many times as fast the thinned model is (of energy:
    thinned joules over dense). `alike`: no tensor of one model has another shape than in the other.
    """

    engine: str
    what: What
    batch: int
    length: int
    tokens: int
    dense: Spread
    thinned: Spread
    ratio: Spread
    dense_rounds: tuple[float, ...] = ()
    thinned_rounds: tuple[float, ...] = ()
    alike: bool = False
    seed: int = 0
    source: str = ""

    @property
    def unit(self) -> str:
        """Of `dense` and `thinned`."""
        return "J/token" if self.what == "energy" else "tokens/s"

    @property
    def verdict(self) -> str:
        """Why there is no gain; "" where there is one."""
        return no_gain(self.ratio.low, self.ratio.high, alike=self.alike, less=self.what == "energy")

    def evidence(self) -> Iterator[Evidence]:
        """Dense, thinned and ratio, named `prefill@transformers:1x128`."""
        name = f"{self.what}@{self.engine}:{self.batch}x{self.length}"
        how = f"{self.batch}×{self.length} tokens"
        if self.what != "prefill":
            how = f"{self.tokens} tokens behind {how}" + (", prompt included" if self.what == "energy" else "")
        how += f"; median of {len(self.dense_rounds)} rounds, dense and thinned in turn" + (
            f"; {self.source}" if self.source else ""
        )
        ends: dict[str, Any] = {"n": len(self.dense_rounds), "seed": self.seed}
        both: tuple[tuple[Of, Spread], ...] = (("dense", self.dense), ("thinned", self.thinned))
        for of, spread in both:
            yield Evidence(name=name, unit=self.unit, of=of, how=how, **ends, **_numbers(spread))
        said = f"{how}; {NO_GAIN}: {self.verdict}" if self.verdict else how
        yield Evidence(name=name, of="ratio", how=said, **ends, **_numbers(self.ratio))


def _numbers(spread: Spread) -> dict[str, Any]:
    return {"value": spread.value, "low": spread.low, "high": spread.high}


@dataclass(frozen=True, kw_only=True)
class Part(Document):
    """What one part of a model costs: one of `count` sublayers of a shape, the embedding, the head, or the rest.

    `like`: the first of them; `shape`: of its maps. `prefill`: seconds of one of them in a pass over the prompt;
    `decode`: for a token. Shares are of the model's time and of all `count` together.
    """

    of: Of
    kind: str
    like: str = ""
    shape: str = ""
    count: int = 1
    parameters: int = 0
    prefill: float = 0.0
    prefill_share: float = 0.0
    decode: float | None = None
    decode_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Held(Document):
    """The most bytes that an engine holds at one time for a prompt of `batch` × `length` tokens.

    `weights`, `kv` (the cache behind the prompt) and `activations` (all else at the peak) are tensors. `process`: the
    peak of the resident memory of a process that has only this model; `libraries`: what it had before the model.
    """

    engine: str
    of: Of
    batch: int
    length: int
    weights: int
    kv: int | None = None
    activations: int | None = None
    process: int | None = None
    libraries: int | None = None

    def evidence(self) -> Iterator[Evidence]:
        """A number for each kind that is known, named `weights@transformers:1x128`."""
        place = f"{self.engine}:{self.batch}x{self.length}"
        for name in ("weights", "kv", "activations", "process"):
            value = getattr(self, name)
            if value is not None:
                how = f"a prompt of {self.batch}×{self.length} tokens"
                yield Evidence(name=f"{name}@{place}", value=float(value), unit="B", of=self.of, n=1, how=how)


@dataclass(frozen=True, kw_only=True)
class SpeedFile(Document):
    """`speed.json`: everything that `lamina speed` measured. `of`: the fingerprint of the receipts that it is of.

    `machine`: processor, cores, threads, load, versions. `batch`, `length`: what the table of `parts` is of.
    """

    lamina: int = field(default=FORMAT, metadata={"always": True})
    of: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rows: tuple[SpeedRow, ...] = field(default=(), metadata={"always": True})
    batch: int = field(default=1, metadata={"always": True})
    length: int = field(default=0, metadata={"always": True})
    parts: tuple[Part, ...] = ()
    held: tuple[Held, ...] = ()
    notes: tuple[str, ...] = ()

    def get(self, engine: str, what: str, batch: int, length: int) -> SpeedRow | None:
        """The row of that work, or None."""
        asked = (engine, what, batch, length)
        return next((r for r in self.rows if (r.engine, r.what, r.batch, r.length) == asked), None)

    def evidence(self) -> tuple[Evidence, ...]:
        """All numbers as evidence, for `evidence.json` and the report."""
        return tuple(e for row in (*self.rows, *self.held) for e in row.evidence())
