"""`lamina speed`: what it writes, prints and refuses, on the tiny model, with times that the tests plant."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from rich.console import Console

from lamina import api
from lamina.core.documents import EvidenceFile, Plan, Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.speeds import SpeedFile
from lamina.evaluators.energy import Counter, Meter
from lamina.evaluators.engines import Transformers
from lamina.evaluators.memory import Peak
from lamina.lab.workloads import Workloads
from lamina.pipeline import Run
from lamina.pipeline.timing import FILE, HowFast, measured

SMALL = ("--batch", "1,2", "--length", "8", "--decode", "3", "--rounds", "2", "--threads", "1")
HOW: dict[str, Any] = {"batches": (1,), "lengths": (8,), "decode": 2, "rounds": 2}


@pytest.fixture(scope="module")
def folder(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without one block."""
    run = tmp_path_factory.mktemp("speed") / "run"
    call(*tiny_run.thin_command(bench, run, "--blocks", "1"))
    return run


@pytest.fixture
def masked(folder: Path, tmp_path: Path) -> Path:
    """A run in which weights become zeros, and nothing else."""
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    (site, *_) = Run.open(run).anatomy.linears("block.1.mlp")
    plan = Plan.load(run / "plan.yaml")
    step = Step(rewrite="magnitude", sites=(site.id,), options={"sparsity": 0.5})
    replace(plan, steps=(step,)).save(run / "plan.yaml")
    call("apply", str(run))
    return run


def call(*arguments: str) -> None:
    from lamina.cli import main

    with pytest.MonkeyPatch.context() as patch:
        tiny_run.make_quick(patch)
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
    assert end.value.code == 0


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands for the fresh processes whose memory is measured; says what they were asked."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("lamina.evaluators.memory.resident", lambda job: asked.append(job) or (90_000_000, 30_000_000))
    return asked


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The thinned model is so many times as fast as the dense one, which needs 1 s for a prompt and 2 s behind it."""

    def plant(times: float) -> None:
        monkeypatch.setattr("lamina.evaluators.sublayers.table", lambda *_, **__: ())
        monkeypatch.setattr("lamina.evaluators.memory.peak", lambda *_: Peak(weights=4, kv=2, activations=1))
        seconds = {"dense": 1.0, "thinned": 1.0 / times}
        monkeypatch.setattr(
            Transformers, "answer", lambda _, who, cell: {"prefill": seconds[who], "decode": 2 * seconds[who]}
        )

    return plant


def test_the_verb_writes_and_prints(
    lamina: Any, folder: Path, planted: Callable[[float], None], processes: list[dict[str, Any]]
) -> None:
    planted(1.25)
    code, out, err = lamina("speed", folder, *SMALL, "--engine", "transformers")
    assert (code, err) == (0, "")
    found = SpeedFile.load(folder / FILE)
    assert [(r.what, r.batch, r.length) for r in found.rows] == [
        ("prefill", 1, 8), ("decode", 1, 8), ("prefill", 2, 8), ("decode", 2, 8),
    ]  # fmt: skip
    assert all(r.ratio.value == pytest.approx(1.25) and not r.verdict and not r.alike for r in found.rows)
    dense = found.held[0]
    assert (dense.batch, dense.length, dense.weights, dense.kv, dense.activations) == (2, 8, 4, 2, 1)
    assert (dense.process, dense.libraries) == (90_000_000, 30_000_000)
    assert [(Path(job["spec"]).name, len(job["prompt"])) for job in processes] == [("model", 2)] * 2
    assert processes[0]["spec"] != processes[1]["spec"] == str(folder / "model")
    assert found.machine["threads"] == 1
    assert found.machine["cores"] >= 1
    assert {"torch", "transformers", "python"} <= set(found.machine)
    for words in ("transformers: tokens/s of prefill", "×1.25", "memory, 2×8"):
        assert words in out
    assert "no gain" not in out
    assert out.splitlines()[-1] == str(folder / FILE)
    assert not (folder / ".state" / "speed").exists()


def test_no_gain_is_in_bold(lamina: Any, folder: Path, planted: Callable[[float], None]) -> None:
    from lamina.commands.speed import show

    planted(0.5)
    _, out, _ = lamina("speed", folder, *SMALL, "--engine", "transformers")
    assert out.count("no gain: the thinned model is slower") == 4
    found = SpeedFile.load(folder / FILE)
    ratios = [e for e in found.evidence() if e.of == "ratio"]
    assert len(ratios) == 4
    assert all("**no gain**: the thinned model is slower" in e.how for e in ratios)
    colours = Console(file=io.StringIO(), force_terminal=True, width=140, color_system="standard", no_color=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.terminal.console", colours)
        show(found)
    printed = colours.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("\x1b[1mno gain: the thinned model is slower\x1b[0m") == 4


def test_masks_are_never_a_gain(lamina: Any, masked: Path, planted: Callable[[float], None]) -> None:
    planted(2.0)
    code, out, err = lamina("speed", masked, *SMALL, "--engine", "transformers")
    assert (code, err) == (0, "")
    assert out.count("no gain: all shapes are as before: masks") == 4
    assert all(r.alike and r.ratio.value == 2.0 for r in SpeedFile.load(masked / FILE).rows)


def test_both_engines_where_both_can(lamina: Any, folder: Path) -> None:
    """Nothing planted: times come from transformers and from llama.cpp."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed (pip install xllamacpp)")
    code, out, err = lamina("speed", folder, *SMALL)
    assert (code, err) == (0, "")
    found = SpeedFile.load(folder / FILE)
    assert {(r.engine, r.what) for r in found.rows} == {
        (engine, what) for engine in ("transformers", "llamacpp") for what in ("prefill", "decode")
    }
    assert {(h.engine, h.of) for h in found.held} == {
        (engine, of) for engine in ("transformers", "llamacpp") for of in ("dense", "thinned")
    }
    assert not any(r.alike for r in found.rows)
    held = {(h.engine, h.of): h for h in found.held}
    for engine in ("transformers", "llamacpp"):
        assert held[engine, "dense"].weights > held[engine, "thinned"].weights
    assert (held["transformers", "dense"].kv or 0) > (held["transformers", "thinned"].kv or 0) > 0
    assert {p.kind for p in found.parts} == {"attention", "mlp", "embedding", "head", "rest"}
    assert {(p.of, p.kind): p.count for p in found.parts}["thinned", "mlp"] == 3
    assert (found.batch, found.length) == (1, 8)
    assert "attention like block.0.attention" in out
    assert "llamacpp: tokens/s of decoding" in out
    assert not (folder / ".state" / "speed").exists()
    assert not (folder / "model.gguf").exists()


def test_an_engine_that_cannot_is_told_and_refused_if_asked_for(
    lamina: Any, folder: Path, planted: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise UnsupportedError("no such tensor", where="GGUF")

    planted(1.5)
    monkeypatch.setattr("lamina.pipeline.timing._files", fail)
    code, out, _ = lamina("speed", folder, *SMALL)
    assert code == 0
    assert "llamacpp: not measured: GGUF: no such tensor" in out
    before = (folder / FILE).read_bytes()
    tiny_run.refused(lamina("speed", folder, *SMALL, "--engine", "llamacpp"), "no such tensor")
    assert (folder / FILE).read_bytes() == before
    assert tiny_run.left_behind(folder) in ([], [".state/speed.json"])


def test_what_only_a_part_lacks_is_told(
    lamina: Any, folder: Path, planted: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows stay where the table of sublayers or a process's memory can't be had; nothing at all is an error."""

    def fail(*_: Any, **__: Any) -> Any:
        raise UnsupportedError("this can't be")

    planted(1.5)
    monkeypatch.setattr("lamina.evaluators.sublayers.table", fail)
    monkeypatch.setattr("lamina.evaluators.memory.resident", fail)
    code, out, _ = lamina("speed", folder, *SMALL, "--engine", "transformers")
    assert code == 0
    assert "sublayers: not timed: this can't be" in out
    assert out.count("memory of the process: this can't be") == 2
    assert "×1.5" in out
    monkeypatch.setattr(Transformers, "answer", fail)
    monkeypatch.setattr("lamina.pipeline.timing._files", fail)
    tiny_run.refused(lamina("speed", folder, *SMALL), "this can't be")


def test_energy_is_in_the_table_where_the_machine_tells_it(
    lamina: Any, folder: Path, planted: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(1.5)
    why = "energy: not readable here: there is no /sys/class/powercap"
    monkeypatch.setattr("lamina.evaluators.energy.meter", lambda _: (None, why))
    _, out, _ = lamina("speed", folder, *SMALL, "--engine", "transformers")
    assert why in out
    used = iter(range(0, 10**9, 600_000))
    counter = Meter([Counter("package-0", lambda: next(used))])
    monkeypatch.setattr("lamina.evaluators.energy.meter", lambda _: (counter, ""))
    _, out, _ = lamina("speed", folder, *SMALL, "--engine", "transformers")
    assert "joules per token" in out
    assert "not readable" not in out
    energy = SpeedFile.load(folder / FILE).get("transformers", "energy", 1, 8)
    assert energy is not None
    assert energy.dense.value == pytest.approx(0.6 / 3)
    assert energy.source == "energy of package-0"


def test_for_python_and_for_the_report(folder: Path, planted: Callable[[float], None], tmp_path: Path) -> None:
    planted(1.25)
    found = api.speed(folder, batches=[1], lengths=[8], decode=2, engines=["transformers"], rounds=2)
    run = Run.open(folder)
    assert measured(run) == found
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    evidence = EvidenceFile.load(copy / "evidence.json")
    both = EvidenceFile(evidence=(*evidence.evidence, *found.evidence()), notes=evidence.notes)
    both.save(copy / "evidence.json")
    page = api.report(copy).read_text(encoding="utf-8")
    assert "decode@transformers:1x8" in page
    run.path(FILE).write_text((folder / FILE).read_text(encoding="utf-8").replace(found.of, "sha256:0"))
    assert measured(run) is None, "times of another model are not this one's"
    run.path(FILE).unlink()
    assert measured(run) is None


def test_lengths_that_fit_the_context(folder: Path, bench: Path) -> None:
    from lamina.pipeline.timing import _cells

    run = Run.open(folder)
    limit = run.loaded.model.config.max_position_embeddings  # type: ignore[union-attr]
    cells = _cells(run, HowFast(decode=4))
    assert {c.batch for c in cells} == {1, 4}
    assert all(c.length + 4 <= limit for c in cells)
    assert max(c.length for c in cells) == max([n for n in (128, 512) if n + 4 <= limit] or [limit - 4])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch", "1,x"), "--batch"),
        (("--batch", "0"), "--batch"),
        (("--batch", "2,2"), "--batch"),
        (("--length", "8,,9"), "--length"),
        (("--length", "1000000"), "--length"),
        (("--decode", "0"), "--decode"),
        (("--rounds", "0"), "--rounds"),
        (("--threads", "-1"), "--threads"),
        (("--engine", "llama"), "llamacpp"),
    ],
)
def test_what_is_wrong_is_named(lamina: Any, folder: Path, words: tuple[str, str], said: str) -> None:
    tiny_run.refused(lamina("speed", folder, *words), said)


def test_before_anything_is_thinned_there_is_nothing_to_time(lamina: Any, tmp_path: Path) -> None:
    tiny_run.refused(lamina("speed", tmp_path), "no run folder")
    with pytest.raises(InputError, match="--rounds"):
        HowFast(rounds=0)


def test_every_time_it_is_asked_for_it_is_measured(
    folder: Path, planted: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for times in (1.5, 2.0):
        planted(times)
        still = Meter([Counter("x", lambda: 1)])
        monkeypatch.setattr("lamina.evaluators.energy.meter", lambda _, still=still: (still, ""))
        found = api.speed(folder, engines=("transformers",), **HOW)
        assert found.rows[0].ratio.value == pytest.approx(times)
        assert any("the counter did not move" in note for note in found.notes)


def test_the_workload_is_one_prompt_and_its_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By count: dense, thinned, thinned, dense; warm-up and rounds, rows, sublayers."""
    seen: list[tuple[int, int, int]] = []
    answer = Workloads.answer

    def counted(bench: Workloads, model: Any, ids: Any, steps: int) -> Any:
        seen.append((*ids.shape, steps))
        return answer(bench, model, ids, steps)

    monkeypatch.setattr(Workloads, "answer", counted)
    api.speed(folder, engines=("transformers",), **HOW)
    assert seen == [(1, 8, 2)] * (4 * (1 + 2) + 4 * (1 + 2))
