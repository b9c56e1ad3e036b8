"""Engines in turn: what one answer takes in transformers and in llama.cpp, dense, thinned, thinned, dense."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.speeds import SpeedRow, Spread, What
from lamina.maths.bootstrap import median_interval

if TYPE_CHECKING:
    from torch import nn

    from lamina.evaluators.energy import Meter
    from lamina.lab import Lab

ORDER = ("dense", "thinned", "thinned", "dense")
"""Of one round: whatever grows evenly while it lasts falls on both alike."""
CHILD = "lamina.evaluators._llama_child"
T = TypeVar("T")
SPARE = 8
"""Tokens of context that llama.cpp is given beyond what is asked of it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One answer: `decode` tokens for each of `batch` prompts of `length` tokens."""

    batch: int = 1
    length: int = 128
    decode: int = 32

    def __post_init__(self) -> None:
        for name in ("batch", "length", "decode"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    def tokens(self, what: What) -> int:
        """What the work is counted by: tokens read, else tokens made."""
        return self.batch * (self.length if what == "prefill" else self.decode)


class Engine(Protocol):
    """Something that runs both models. `alike`: no tensor has another shape in one than in the other."""

    name: str
    alike: bool

    def answer(self, who: str, cell: Cell) -> Mapping[What, float]:
        """Seconds of `prefill` and, where the model keeps a cache, of `decode`; `who`: dense or thinned."""
        ...


Rounds = dict[tuple[Cell, What], dict[str, list[float]]]


def measure(
    engine: Engine,
    cells: Sequence[Cell],
    *,
    rounds: int = 5,
    warmups: int = 1,
    seed: int = 0,
    order: Sequence[str] = ORDER,
    meter: Meter | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[SpeedRow, ...]:
    """A row for each work of each cell; with a `meter` also the energy of whole answers.

    Every round goes through all cells, and in each through `order`. A work that one model can't do is left out for
    both, and so is energy where the counter did not move.
    """
    if rounds < 1 or warmups < 0:
        raise InputError(f"at least 1 round and 0 warm-ups, not {rounds} and {warmups}", where="--rounds")
    found: Rounds = {}
    for number in range(-warmups, rounds):
        for cell in cells:
            runs = in_turn(lambda who, cell=cell: _answer(engine, who, cell, meter), order)
            if number >= 0:
                _note(found, cell, runs)
        progress(f"speed: {engine.name}", max(number + 1, 0), rounds)
    source = meter.name if meter is not None else ""
    rows = [_row(engine, cell, what, taken, seed, source) for (cell, what), taken in found.items()]
    full = [row for row in rows if len(row.dense_rounds) == rounds]
    return tuple(sorted(full, key=lambda r: (r.batch, r.length)))


def in_turn(run: Callable[[str], T], order: Sequence[str] = ORDER) -> dict[str, list[T]]:
    """One round: who → what its runs gave."""
    found: dict[str, list[T]] = {who: [] for who in order}
    for who in order:
        found[who].append(run(who))
    return found


def spread(values: Any, seed: int) -> Spread:
    """The median of `values` [rounds] with its interval."""
    low, high = median_interval(values, seed=seed) or (None, None)
    return Spread(value=float(statistics.median(values)), low=low, high=high)


def _answer(engine: Engine, who: str, cell: Cell, meter: Meter | None) -> dict[What, float]:
    before = meter.read() if meter is not None else None
    found: dict[What, float] = dict(engine.answer(who, cell))
    if meter is not None and before is not None:
        found["energy"] = meter.joules(before, meter.read())
    return found


def _note(found: Rounds, cell: Cell, runs: Mapping[str, Sequence[Mapping[What, float]]]) -> None:
    every = [run for rows in runs.values() for run in rows]
    for what in every[0]:
        if all(run.get(what, 0.0) > 0 for run in every):
            taken = found.setdefault((cell, what), {who: [] for who in runs})
            for who, rows in runs.items():
                taken[who].append(statistics.fmean(run[what] for run in rows))


def _row(engine: Engine, cell: Cell, what: What, taken: Mapping[str, list[float]], seed: int, source: str) -> SpeedRow:
    dense, thinned = np.array(taken["dense"]), np.array(taken["thinned"])
    energy = what == "energy"
    tokens = cell.tokens(what)
    told = [d / tokens if energy else tokens / d for d in (dense, thinned)]
    return SpeedRow(
        engine=engine.name, what=what, batch=cell.batch, length=cell.length, tokens=tokens,
        dense=spread(told[0], seed), thinned=spread(told[1], seed),
        ratio=spread(thinned / dense if energy else dense / thinned, seed),
        dense_rounds=tuple(map(float, dense)), thinned_rounds=tuple(map(float, thinned)),
        alike=engine.alike, seed=seed, source=source if energy else "",
    )  # fmt: skip


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether both have the same classes of modules and the same shapes and types of parameters, in order."""

    def told(model: nn.Module) -> list[Any]:
        kinds = [type(m).__name__ for m in model.modules()]
        return [*kinds, *((name, tuple(p.shape), p.dtype) for name, p in model.named_parameters())]

    return told(one) == told(other)


class Transformers:
    """Both models in this process, greedy tokens one by one as `generate` makes them."""

    name = "transformers"

    def __init__(self, lab: Lab, reference: nn.Module, cells: Sequence[Cell]) -> None:
        """Raises InputError where a cell is longer than the models' context."""
        from lamina.lab.workloads import Workloads

        self.models = {"dense": reference, "thinned": lab.model}
        self.alike = alike(reference, lab.model)
        self.benches = {cell.batch: Workloads(lab, cell.batch) for cell in cells}
        for cell in cells:
            self.benches[cell.batch].ids(cell.length + cell.decode)

    def prompt(self, cell: Cell) -> Any:
        """Token ids [batch, length]."""
        return self.benches[cell.batch].ids(cell.length)

    def answer(self, who: str, cell: Cell) -> Mapping[What, float]:
        """Seconds by the work."""
        read, made = self.benches[cell.batch].answer(self.models[who], self.prompt(cell), cell.decode)
        return {"prefill": read} if made is None else {"prefill": read, "decode": made}


class LlamaCpp:
    """llama.cpp on the processor, through xllamacpp: each GGUF file in a fresh process of its own, asked in turn.

    What is told are llama.cpp's own times of prompt and of generation, the longest of a batch's rows, which it works on
    together. A context manager. Raises UnsupportedError without xllamacpp.
    """

    name = "llamacpp"

    def __init__(
        self, files: Mapping[str, Path], prompt: Callable[[Cell], Any], cells: Sequence[Cell], *, threads: int = 1
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise UnsupportedError(
                "llama.cpp is timed through xllamacpp, which is not installed", hint="pip install 'lamina[llamacpp]'"
            )
        self.alike = len({path.stat().st_size for path in files.values()}) == 1
        self.files, self.prompt = files, prompt
        slots, longest = max(c.batch for c in cells), max(c.length + c.decode for c in cells) + SPARE
        self.ask = {"threads": threads, "slots": slots, "context": slots * longest}
        self.ask["together"] = max(c.batch * c.length for c in cells) + slots
        self._held = ExitStack()
        self._children: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> LlamaCpp:
        with ExitStack() as held:
            for who, path in self.files.items():
                job = json.dumps({**self.ask, "path": str(path)})
                self._children[who] = held.enter_context(_process([sys.executable, "-m", CHILD, job]))
            for who in self.files:
                self._hear(who)
            self._held = held.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._held.close()

    def answer(self, who: str, cell: Cell) -> Mapping[What, float]:
        """Seconds by the work."""
        prompt = self.prompt(cell)
        rows = prompt if isinstance(prompt, list) else prompt.tolist()
        found = self._tell(who, {"prompt": rows, "decode": cell.decode})
        return {"prefill": found["prefill"], "decode": found["decode"]}

    def resident(self, who: str) -> tuple[int | None, int | None]:
        """The peak of the process's resident memory so far, and what it had before the model, in bytes."""
        found = self._tell(who, {"memory": True})
        return found["peak"], found["before"]

    def _tell(self, who: str, what: Mapping[str, Any]) -> dict[str, Any]:
        pipe = self._children[who].stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # what it says last tells why
            pipe.write(json.dumps(what) + "\n")
            pipe.flush()
        return self._hear(who)

    def _hear(self, who: str) -> dict[str, Any]:
        child = self._children[who]
        assert child.stdout is not None
        line = child.stdout.readline()
        found = json.loads(line) if line else {"error": f"its process ended, code {child.wait()}"}
        if "error" in found:
            raise UnsupportedError(f"llama.cpp: {found['error']}", where=self.files[who])
        return found


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is asked line by line, and ends with the block."""
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield child
    finally:
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
