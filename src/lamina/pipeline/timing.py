"""`lamina speed`: time, memory and energy of a run's two models, engine by engine → `speed.json`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lamina.core import registry
from lamina.core.documents import plain
from lamina.core.errors import InputError, LaminaError, did_you_mean
from lamina.core.files import fingerprint
from lamina.core.speeds import Held, Of, Part, SpeedFile, SpeedRow
from lamina.pipeline.checks import context
from lamina.pipeline.verbs import applied

if TYPE_CHECKING:
    from lamina.evaluators.energy import Meter
    from lamina.evaluators.engines import Cell
    from lamina.lab import Lab
    from lamina.pipeline.run import Run

FILE = "speed.json"
ENGINES = ("transformers", "llamacpp")
LENGTHS = (128, 512)
BOTH: tuple[Of, Of] = ("dense", "thinned")


@dataclass(frozen=True, kw_only=True)
class HowFast:
    """What to time. `lengths` None: 128 and 512 tokens, as far as the context holds them. `engines` None: all that can
    run both models. `threads` None: as many as torch has.
    """

    batches: tuple[int, ...] = (1, 4)
    lengths: tuple[int, ...] | None = None
    decode: int = 32
    engines: tuple[str, ...] | None = None
    rounds: int = 5
    warmups: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, values in (("--batch", self.batches), ("--length", self.lengths or (1,)), ("--engine", self.engines)):
            if values is not None and (not values or len(set(values)) < len(values)):
                raise InputError("at least one value, and each once", where=name)
        numbers = {"--decode": self.decode, "--rounds": self.rounds, "--threads": self.threads}
        numbers |= {"--batch": min(self.batches), "--length": min(self.lengths or (1,))}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise InputError(f"at least 1, not {value}", where=name)
        for name in self.engines or ():
            if name not in ENGINES:
                raise InputError(f"no engine named {name!r}", where="--engine", hint=did_you_mean(name, ENGINES))


@dataclass(frozen=True)
class _Bench:
    """What all engines share."""

    run: Run
    how: HowFast
    lab: Lab
    cells: tuple[Cell, ...]
    meter: Meter | None
    threads: int

    @property
    def dtype(self) -> str:
        """The numbers that the models compute in."""
        return str(next(self.lab.model.parameters()).dtype).removeprefix("torch.")

    def measured(self, engine: Any) -> tuple[SpeedRow, ...]:
        """The engine's rows."""
        from lamina.evaluators.engines import measure

        return measure(
            engine, self.cells, rounds=self.how.rounds, warmups=self.how.warmups, seed=self.run.recipe.seed,
            meter=self.meter, progress=self.run.progress,
        )  # fmt: skip

    @property
    def largest(self) -> Cell:
        """The cell that needs the most memory."""
        return max(self.cells, key=lambda c: c.batch * (c.length + c.decode))


def speed(run: Run, how: HowFast | None = None) -> SpeedFile:
    """Measure the dense and the thinned model in turn, anew each time that it is asked for, and write `speed.json`."""
    how = how or HowFast()
    mark = _mark(run)
    from lamina.evaluators.energy import meter
    from lamina.evaluators.machine import busy, machine, threads
    from lamina.lab import Lab

    cells = _cells(run, how)
    with run.verb("speed", [mark, plain(how), time.time_ns()], [FILE]), threads(how.threads) as count:
        lab = Lab(run.thinned, run.tokens.heldout, seed=run.recipe.seed, progress=run.progress)
        counters, why = meter(lab.device)
        bench = _Bench(run, how, lab, cells, counters, count)
        facts = machine(count, dtype=bench.dtype, device=str(lab.device))
        rows: list[SpeedRow] = []
        held: list[Held] = []
        parts: tuple[Part, ...] = ()
        notes = [n for n in (busy(facts), why) if n]
        for name in how.engines or ENGINES:
            run.say(f"measuring {name}")
            try:
                found = (_transformers if name == "transformers" else _llamacpp)(bench)
            except LaminaError as error:
                if how.engines is not None or (name == ENGINES[-1] and not rows):
                    raise
                notes.append(f"{name}: not measured: {error}")
                continue
            rows += found[0]
            held += found[1]
            parts += found[2]
            notes += found[3]
        if counters is not None and not any(r.what == "energy" for r in rows):
            notes.append("energy: the counter did not move in every run: ask for more tokens")
        done = SpeedFile(
            of=mark, machine=facts, rows=tuple(rows), batch=cells[0].batch, length=cells[0].length, parts=parts,
            held=tuple(held), notes=tuple(notes),
        )  # fmt: skip
        done.save(run.path(FILE))
    return done


def measured(run: Run) -> SpeedFile | None:
    """What `speed.json` holds of the models as they are; None where there is none, or it is of others."""
    path = run.path(FILE)
    found = SpeedFile.load(path) if path.is_file() else None
    return found if found is not None and found.of == _mark(run) else None


def _mark(run: Run) -> str:
    return fingerprint(plain(applied(run)))


def _cells(run: Run, how: HowFast) -> tuple[Cell, ...]:
    """All pairs of batch and length, the shortest first."""
    from lamina.evaluators.engines import Cell

    limit = context(run.loaded.model) or 1 << 30
    lengths: Sequence[int] = how.lengths or [n for n in LENGTHS if n + how.decode <= limit] or [limit - how.decode]
    for length in lengths:
        if not 0 < length <= limit - how.decode:
            what = f"{max(length, 0)} tokens and {how.decode} behind them are more than the model's {limit}"
            raise InputError(what, where="--length", hint="ask for fewer, with --length or --decode")
    return tuple(Cell(batch=b, length=n, decode=how.decode) for b in sorted(how.batches) for n in sorted(lengths))


Found = tuple[Sequence[SpeedRow], Sequence[Held], tuple[Part, ...], Sequence[str]]


def _transformers(bench: _Bench) -> Found:
    """Rows, memory, the table of sublayers, notes."""
    from lamina.evaluators.engines import Transformers
    from lamina.evaluators.memory import peak
    from lamina.evaluators.sublayers import table

    dense, lab = bench.run.loaded.model, bench.lab
    engine = Transformers(lab, dense, bench.cells)
    rows = bench.measured(engine)
    cell, held, notes = bench.largest, list[Held](), list[str]()
    parts: tuple[Part, ...] = ()
    try:
        parts = table(lab, dense, bench.cells[0], rounds=bench.how.rounds, progress=bench.run.progress)
    except LaminaError as error:
        notes.append(f"sublayers: not timed: {error}")
    for of, model in zip(BOTH, (dense, lab.model), strict=True):
        most = peak(engine.benches[cell.batch], model, engine.prompt(cell))
        process, libraries, why = _resident(bench, of, engine.prompt(cell).tolist())
        notes += [why] if why else []
        held.append(
            Held(
                engine="transformers", of=of, batch=cell.batch, length=cell.length,
                weights=most.weights, kv=most.kv, activations=most.activations, process=process, libraries=libraries,
            )
        )  # fmt: skip
    return rows, held, parts, notes


def _resident(bench: _Bench, of: str, prompt: list[list[int]]) -> tuple[int | None, int | None, str]:
    """The peak of a fresh process's memory, what it had before the model, and why not."""
    from lamina.evaluators.memory import resident

    run = bench.run
    spec = run.path("model") if of == "thinned" else run.recipe.model
    if of == "dense" and run.model is not None:
        return None, None, "memory of the process: not measured of the dense model, which was given in memory"
    if bench.lab.device.type != "cpu":
        return None, None, "" if of == "dense" else "memory of the process: not measured beside a GPU"
    job: dict[str, Any] = {
        "spec": str(spec), "dtype": bench.dtype, "prompt": prompt,
        "trust_remote_code": of == "thinned" or run.recipe.trust_remote_code, "decode": bench.largest.decode,
        "threads": bench.threads,
    }  # fmt: skip
    run.say(f"measuring the memory of a fresh process, {of}")
    try:
        process, libraries = resident(job)
    except LaminaError as error:
        return None, None, f"memory of the process: {error}"
    why = "" if process is not None else "memory of the process: the system does not tell its peak"
    return process, libraries, why


def _llamacpp(bench: _Bench) -> Found:
    """Rows and memory of both models as GGUF files in float32, made by the same exporter."""
    from lamina.evaluators.engines import LlamaCpp
    from lamina.lab.workloads import Workloads

    run, folder, held = bench.run, bench.run.state / "speed", list[Held]()
    benches = {c.batch: Workloads(bench.lab, c.batch) for c in bench.cells}
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        files = _files(run, folder)
        prompt = lambda cell: benches[cell.batch].ids(cell.length)  # noqa: E731
        with LlamaCpp(files, prompt, bench.cells, threads=bench.threads) as engine:
            rows = bench.measured(engine)
            cell = bench.largest
            for of in BOTH:
                process, libraries = engine.resident(of)
                held.append(
                    Held(
                        engine="llamacpp", of=of, batch=cell.batch,
                        length=cell.length, weights=files[of].stat().st_size, process=process, libraries=libraries,
                    )
                )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    note = "llamacpp: both models as GGUF files in float32 but for maps that were rounded; weights are the file's bytes"
    return rows, held, (), [note]


def _files(run: Run, folder: Path) -> dict[str, Path]:
    """The two GGUF files; the thinned one is `model.gguf` where the run holds it."""
    exporter, loaded = registry.EXPORTERS.make("gguf"), run.loaded
    for problem in exporter.check(run.receipts().receipts, run.thinned, loaded):
        raise problem.error()
    files = {"dense": folder / "dense.gguf", "thinned": run.path("model.gguf")}
    if not files["thinned"].is_file():
        files["thinned"] = folder / "thinned.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    source = {"name": loaded.name, "tokenizer": loaded.tokenizer, "source": loaded.source, "path": loaded.path}
    for of, model, receipts in (("dense", loaded.model, ()), ("thinned", run.thinned, run.receipts())):
        if not files[of].is_file():
            run.say(f"writing the {of} model as GGUF")
            exporter.export(model, SimpleNamespace(receipts=receipts, **source), files[of])
    return files
