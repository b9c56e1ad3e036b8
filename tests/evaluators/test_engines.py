"""Engines in turn: planted times, drift and noise; the tiny models by a clock that the tests set; llama.cpp itself."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_tiny
import pytest
import torch

from lamina.core.documents import Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.speeds import SpeedRow, What
from lamina.evaluators import _llama_child
from lamina.evaluators.energy import Counter, Meter
from lamina.evaluators.engines import Cell, LlamaCpp, Transformers, alike, measure
from lamina.evaluators.machine import busy, machine, threads
from lamina.evaluators.sublayers import table
from lamina.lab import Lab, workloads
from lamina.rewrites.drop import Drop
from lamina.rewrites.sparsify import Magnitude
from lamina.testing.models import text, tiny

CELL = Cell(batch=2, length=10, decode=5)


class Planted:
    """An engine that takes known times, which grow with every answer and scatter."""

    name, alike = "planted", False

    def __init__(self, *, dense: float = 4.0, thinned: float = 2.0, drift: float = 0.0, noise: float = 0.0) -> None:
        self.seconds, self.drift, self.noise = {"dense": dense, "thinned": thinned}, drift, noise
        self.calls: list[tuple[str, Cell]] = []
        self.draw = random.Random(7)
        self.decodes = {"dense": True, "thinned": True}

    def answer(self, who: str, cell: Cell) -> Mapping[What, float]:
        slow = 1 + self.drift * len(self.calls)
        self.calls.append((who, cell))
        read = self.seconds[who] * slow * self.draw.lognormvariate(0, self.noise)
        return {"prefill": read, "decode": 3 * read} if self.decodes[who] else {"prefill": read}


def named(rows: tuple[SpeedRow, ...]) -> dict[str, SpeedRow]:
    return {row.what: row for row in rows}


# ---------------------------------------------------------------- planted truth


def test_drift_falls_on_both_alike() -> None:
    for row in measure(Planted(drift=0.05), [CELL], rounds=6):
        assert row.ratio.value == pytest.approx(2.0)
        assert (row.ratio.low, row.ratio.high) == pytest.approx((2.0, 2.0))


@pytest.mark.parametrize("order", [("dense", "thinned"), ("dense", "dense", "thinned", "thinned")])
def test_in_other_orders_it_would_not(order: tuple[str, ...]) -> None:
    row = named(measure(Planted(drift=0.05), [CELL], rounds=6, order=order))["prefill"]
    assert row.ratio.high is not None
    assert row.ratio.high < 2.0, "the interval misses the truth, since all rounds lean to one side"


def test_drift_alone_is_no_gain() -> None:
    """A machine that slows down makes two equal models differ in any one-sided order, and not in turn."""
    (row, _) = measure(Planted(dense=2.0, thinned=2.0, drift=0.05), [CELL])
    assert row.verdict == "the interval includes 1"


def test_noise_widens_the_interval_and_the_truth_is_in_it() -> None:
    found = 0
    for seed in range(40):
        engine = Planted(noise=0.2)
        engine.draw = random.Random(seed)
        ratio = named(measure(engine, [CELL], rounds=15, seed=seed))["prefill"].ratio
        assert ratio.low is not None
        assert ratio.high is not None
        assert ratio.low < ratio.value < ratio.high
        found += ratio.low <= 2.0 <= ratio.high
    assert 35 <= found <= 40


def test_numbers_by_hand() -> None:
    row = named(measure(Planted(), [CELL], rounds=3))
    assert row["prefill"].tokens == 20
    assert row["prefill"].dense.value == 20 / 4.0
    assert row["prefill"].thinned.value == 20 / 2.0
    assert row["decode"].tokens == 10
    assert row["decode"].dense.value == pytest.approx(10 / 12.0)
    assert row["decode"].dense_rounds == (12.0,) * 3
    assert row["decode"].verdict == ""


def test_every_round_goes_through_all_cells_in_turn() -> None:
    engine, cells = Planted(), [CELL, Cell(batch=1, length=3, decode=5)]
    shown: list[Any] = []
    rows = measure(engine, cells, rounds=2, warmups=1, progress=lambda *told: shown.append(told))
    turn = [(who, cell) for cell in cells for who in ("dense", "thinned", "thinned", "dense")]
    assert engine.calls == turn * 3
    assert shown == [("speed: planted", n, 2) for n in (0, 1, 2)]
    assert [(r.batch, r.length) for r in rows] == [(1, 3)] * 2 + [(2, 10)] * 2
    assert all(len(r.dense_rounds) == 2 for r in rows), "warm-ups count for nothing"


def test_a_work_that_one_model_cannot_do_is_left_out() -> None:
    engine = Planted()
    engine.decodes["thinned"] = False
    assert set(named(measure(engine, [CELL], rounds=2))) == {"prefill"}


def test_equal_shapes_gain_nothing_whatever_the_clock_says() -> None:
    engine = Planted()
    engine.alike = True
    row = named(measure(engine, [CELL], rounds=4))["prefill"]
    assert row.ratio.low == 2.0
    assert "masks" in row.verdict


def test_one_round_has_no_interval() -> None:
    row = named(measure(Planted(), [CELL], rounds=1))["prefill"]
    assert (row.ratio.low, row.verdict) == (None, "a single round has no interval")


def test_energy_of_whole_answers_by_the_meter() -> None:
    """The counter goes on by 8 J in an answer of the dense model, 6 J in one of the thinned."""
    engine, used = Planted(), [0]
    watch = engine.answer

    def answer(who: str, cell: Cell) -> Mapping[What, float]:
        used[0] += {"dense": 8_000_000, "thinned": 6_000_000}[who]
        return watch(who, cell)

    engine.answer = answer  # type: ignore[method-assign]
    row = named(measure(engine, [CELL], rounds=3, meter=Meter([Counter("package-0", lambda: used[0])])))["energy"]
    assert (row.dense.value, row.thinned.value) == (0.8, 0.6)
    assert row.ratio.value == pytest.approx(0.75)
    assert (row.unit, row.source, row.verdict) == ("J/token", "energy of package-0", "")
    still = Meter([Counter("package-0", lambda: 5)])
    assert set(named(measure(Planted(), [CELL], rounds=2, meter=still))) == {"prefill", "decode"}


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"length": 0}, {"decode": -1}])
def test_cells_and_rounds_are_positive(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Cell(**wrong)
    with pytest.raises(InputError, match="1 round"):
        measure(Planted(), [CELL], rounds=0)


# ---------------------------------------------------------------- transformers, by a planted clock


@pytest.fixture
def pair() -> tuple[Any, Lab]:
    dense, lab = tiny("llama"), Lab(tiny("llama"), text(4, 12))
    Drop().apply(Step(rewrite="drop", sites=("block.1", "block.2.mlp")), lab)
    return dense, lab


COSTS = {"attention": 2.0, "mlp": 3.0, "embedding": 1.0, "head": 5.0}


@pytest.fixture
def clock(pair: tuple[Any, Lab], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands still but for what sublayers and the vocabulary are said to take, in every call."""
    now = SimpleNamespace(at=0.0, calls=0)
    monkeypatch.setattr(workloads, "clock", lambda _: now.at)
    dense, lab = pair
    for model, anatomy in ((dense, Lab(dense, text(4, 12)).anatomy), (lab.model, lab.anatomy)):
        paths = {f"{anatomy.block(s).path}.{anatomy.branch(s).core}": s.kind.value for s in anatomy.sublayers}
        paths |= {path: name for name, path in workloads.vocabulary_of(model).items()}
        for path, kind in paths.items():
            slow(model.get_submodule(path), COSTS[kind], now, monkeypatch)
    return now


def slow(module: Any, seconds: float, now: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = module.forward

    @functools.wraps(run)
    def forward(*given: Any, **named: Any) -> Any:
        now.at += seconds
        return run(*given, **named)

    monkeypatch.setattr(module, "forward", forward)


def test_transformers_by_the_clock(pair: tuple[Any, Lab], clock: SimpleNamespace) -> None:
    dense, lab = pair
    cells = [Cell(batch=2, length=6, decode=3), Cell(batch=1, length=4, decode=3)]
    engine = Transformers(lab, dense, cells)
    assert engine.prompt(cells[0]).shape == (2, 6)
    one = 1.0 + 5.0 + 4 * (2.0 + 3.0)
    assert engine.answer("dense", cells[0]) == {"prefill": one, "decode": 3 * one}
    rest = one - (2.0 + 3.0) - 3.0
    assert engine.answer("thinned", cells[1]) == {"prefill": rest, "decode": 3 * rest}
    row = named(measure(engine, cells[:1], rounds=2))["decode"]
    assert row.ratio.value == pytest.approx(one / rest)
    assert row.dense.value == pytest.approx(2 / one)
    assert not row.alike


def test_the_table_of_sublayers_by_the_clock(pair: tuple[Any, Lab], clock: SimpleNamespace) -> None:
    dense, lab = pair
    parts = table(lab, dense, Cell(batch=2, length=6, decode=3), rounds=2)
    found = {(p.of, p.kind): p for p in parts}
    assert [p.kind for p in parts if p.of == "dense"] == ["attention", "mlp", "embedding", "head", "rest"]
    for of, whole, counts in (("dense", 26.0, (4, 4)), ("thinned", 18.0, (3, 2))):
        kinds = {"attention": counts[0], "mlp": counts[1], "embedding": 1, "head": 1}
        for kind, count in kinds.items():
            part = found[of, kind]
            assert (part.count, part.prefill, part.decode) == (count, COSTS[kind], COSTS[kind])
            assert part.prefill_share == pytest.approx(count * COSTS[kind] / whole)
            assert part.decode_share == pytest.approx(count * COSTS[kind] / whole)
        assert found[of, "rest"].prefill == 0.0
        assert sum(p.prefill_share for p in parts if p.of == of) == pytest.approx(1.0)
    assert found["dense", "mlp"].like == "block.0.mlp"
    assert found["dense", "mlp"].parameters == Lab(dense, text(4, 12)).anatomy.cost("block.0.mlp").parameters
    assert found["dense", "head"].shape == "×".join(map(str, dense.get_output_embeddings().weight.shape))
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for model in (dense, lab.model) for m in model.modules()
    )
    assert hooks == 0


def test_sublayers_of_another_width_are_told_apart(pair: tuple[Any, Lab]) -> None:
    dense, _ = pair
    lab = Lab(tiny("llama"), text(4, 12))
    mlp = lab.model.get_submodule(f"{lab.anatomy.block('block.1').path}.{lab.anatomy.branch('block.1.mlp').core}")
    for module in mlp.children():
        if isinstance(module, torch.nn.Linear):
            narrow = torch.nn.Parameter(module.weight[:16] if module.weight.shape[0] > 32 else module.weight[:, :16])
            module.weight = narrow
    fresh = Lab(lab.model, text(4, 12))
    parts = table(fresh, dense, Cell(batch=1, length=4, decode=1), rounds=1, warmups=0)
    shown = [(p.count, p.like) for p in parts if (p.of, p.kind) == ("thinned", "mlp")]
    assert shown == [(3, "block.0.mlp"), (1, "block.1.mlp")]


def test_a_model_without_a_cache_has_no_decoding() -> None:
    dense, lab = tiny("nanogpt"), Lab(tiny("nanogpt"), text(4, 12))
    cell = Cell(batch=1, length=4, decode=2)
    assert set(Transformers(lab, dense, [cell]).answer("dense", cell)) == {"prefill"}
    parts = table(lab, dense, cell, rounds=1, warmups=0)
    assert {p.decode for p in parts} == {p.decode_share for p in parts} == {None}
    assert sum(p.prefill_share for p in parts if p.of == "dense") == pytest.approx(1.0)


def test_only_what_changes_shapes_can_gain(pair: tuple[Any, Lab]) -> None:
    dense, thinned = pair
    masked = Lab(tiny("llama"), text(4, 12))
    linear = masked.anatomy.linears(masked.anatomy.site("block.0.mlp"))[0].id
    Magnitude().apply(Step(rewrite="magnitude", sites=(linear,), options={"sparsity": 0.5}), masked)
    assert alike(dense, masked.model)
    assert not alike(dense, thinned.model)
    assert not alike(dense, tiny("llama").bfloat16())


def test_beyond_the_context_is_refused_before_any_run(pair: tuple[Any, Lab]) -> None:
    dense, lab = pair
    limit = lab.model.config.max_position_embeddings  # type: ignore[union-attr]
    with pytest.raises(InputError, match=f"{limit + 1} tokens are more"):
        Transformers(lab, dense, [Cell(length=limit - 4, decode=5)])


def test_bytes_of_a_cache_are_counted_once(pair: tuple[Any, Lab]) -> None:
    dense, lab = pair
    bench = workloads.Workloads(lab, 2)
    out = bench.prefill(dense, bench.ids(6))
    total = Lab(dense, text(4, 12)).anatomy.total()
    assert workloads.cache_bytes(out.past_key_values) == 2 * 6 * total.kv_bytes
    keys = torch.zeros(8)
    assert workloads.cache_bytes({"a": [keys, (keys.view(2, 4),)], "b": SimpleNamespace(c=torch.zeros(2))}) == 40
    assert workloads.cache_bytes(None) == 0


def test_facts_of_the_machine(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU 9\n", encoding="utf-8")
    facts = machine(3, dtype="float32", cpuinfo=info)
    assert (facts["processor"], facts["threads"], facts["dtype"]) == ("Some CPU 9", 3, "float32")
    assert {"cores", "torch", "transformers", "lamina", "python"} <= set(facts)
    assert machine(1, cpuinfo=tmp_path / "none")["processor"]
    assert busy({"threads": 1, "cores": 2, "load": 3.0}).startswith("the machine was busy: load 3 on 2 cores")
    assert busy({"threads": 2, "cores": 2, "load": 2.4}) == busy({"threads": 2, "cores": 2}) == ""
    before = torch.get_num_threads()
    with threads(before + 1) as count:
        assert count == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------- llama.cpp


def test_the_childs_seconds_are_the_slowest_rows() -> None:
    asked: list[dict[str, Any]] = []

    def ask(body: dict[str, Any]) -> Any:
        asked.append(body)
        times = [{"prompt_n": 3, "prompt_ms": 100.0 + n, "predicted_n": 5, "predicted_ms": 40.0 - n} for n in (0, 1)]
        return [{"timings": t} for t in times]

    found = _llama_child.answer(ask, [[1, 2, 3], [4, 5, 6]], 4)
    assert found == {"prefill": 0.101, "decode": 0.04}
    assert (asked[0]["n_predict"], asked[0]["cache_prompt"], asked[0]["ignore_eos"]) == (5, False, True)
    with pytest.raises(RuntimeError, match="of 9"):
        _llama_child.answer(ask, [[1, 2, 3], [4, 5, 6]], 8)
    with pytest.raises(RuntimeError, match="answered 2 of 1"):
        _llama_child.answer(ask, [[1, 2, 3]], 4)
    one = {"timings": {"prompt_n": 1, "prompt_ms": 1.0, "predicted_n": 2, "predicted_ms": 2.0}}
    assert _llama_child.answer(lambda _: one, [[1]], 1) == {"prefill": 0.001, "decode": 0.002}


def prompts(cell: Cell) -> list[list[int]]:
    return [[3 + (n + row) % 200 for n in range(cell.length)] for row in range(cell.batch)]


@pytest.fixture
def files(tmp_path: Path) -> Callable[[], dict[str, Path]]:
    pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed (pip install xllamacpp)")
    return lambda: {who: gguf_tiny.write(tmp_path / f"{who}.gguf") for who in ("dense", "thinned")}


def test_llamacpp_in_two_processes(files: Callable[[], dict[str, Path]]) -> None:
    cells = [Cell(batch=1, length=5, decode=2), Cell(batch=3, length=7, decode=2)]
    with LlamaCpp(files(), prompts, cells) as engine:
        children = list(engine._children.values())
        rows = measure(engine, cells, rounds=2, warmups=0)
        peak, before = engine.resident("dense")
    assert engine.alike
    assert [(r.what, r.batch, r.length, r.tokens) for r in rows] == [
        ("prefill", 1, 5, 5), ("decode", 1, 5, 2), ("prefill", 3, 7, 21), ("decode", 3, 7, 6),
    ]  # fmt: skip
    assert all(seconds > 0 for r in rows for seconds in (*r.dense_rounds, *r.thinned_rounds))
    assert all("masks" in r.verdict for r in rows)
    assert len({child.pid for child in children}) == 2
    assert all(child.poll() is not None for child in children), "no process stays behind"
    assert (peak is None) == (before is None)
    assert peak is None or before is None or peak > before


def test_a_file_that_llamacpp_cannot_read(files: Callable[[], dict[str, Path]], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    engine = LlamaCpp({**files(), "thinned": broken}, prompts, [CELL])
    with pytest.raises(UnsupportedError, match=r"broken\.gguf: llama\.cpp: ") as caught, engine:
        pass
    assert "\n" not in str(caught.value)
    assert all(child.poll() is not None for child in engine._children.values())


def test_without_xllamacpp_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else find(name))
    with pytest.raises(UnsupportedError, match=r"lamina\[llamacpp\]"):
        LlamaCpp({}, prompts, [CELL])


def test_a_child_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another module in the child's place: it answers once and ends with code 3."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    lines = "import json, sys; print(json.dumps({'ready': 1}), flush=True); sys.stdin.readline(); sys.exit(3)"
    (tmp_path / "dying_child.py").write_text(lines, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("lamina.evaluators.engines.CHILD", "dying_child")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"x")
    with (
        pytest.raises(UnsupportedError, match="its process ended, code 3"),
        LlamaCpp({"dense": path}, prompts, [CELL]) as engine,
    ):
        engine.answer("dense", CELL)
