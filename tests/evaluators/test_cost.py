"""Speed, memory and size: in turn, by a clock that tests can set, and against what can be counted by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.core.documents import Evidence, Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import EVALUATORS
from lamina.core.speeds import NO_GAIN
from lamina.evaluators import _resident
from lamina.evaluators._live import LiveTensors, peak_of
from lamina.evaluators.memory import Memory, peak, resident
from lamina.evaluators.size import Size
from lamina.evaluators.speed import Speed
from lamina.lab import Lab, workloads
from lamina.lab.workloads import Workloads, modules_of, timed
from lamina.rewrites.drop import Drop
from lamina.testing.models import tiny

SITES = ("block.1", "block.2.mlp")
QUICK = {"prefill": 16, "prompt": 4, "decode": 3, "rounds": 3}
CPU = torch.device("cpu")


def text() -> torch.Tensor:
    return torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def pair() -> tuple[Any, Lab]:
    dense, lab = tiny("llama"), Lab(tiny("llama"), text())
    Drop().apply(Step(rewrite="drop", sites=SITES), lab)
    return dense, lab


def named(rows: tuple[Evidence, ...]) -> dict[tuple[str, str], Evidence]:
    return {(e.name, e.of): e for e in rows}


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Clock:
    """Stands still but for what the models are said to take: per call, by model, drifting by round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, costs: dict[int, float]) -> None:
        self.now, self.order, self.drift = 0.0, [], itertools.count(1)
        run = Workloads.prefill

        def prefill(bench: Workloads, model: Any, ids: torch.Tensor) -> Any:
            self.order.append(id(model))
            self.now += costs[id(model)] * (1 + 0.01 * next(self.drift))
            return run(bench, model, ids)

        monkeypatch.setattr(workloads, "clock", lambda _: self.now)
        monkeypatch.setattr(Workloads, "prefill", prefill)
        monkeypatch.setattr(Workloads, "decode", lambda *_: None)


def test_dense_and_thinned_take_turns_and_drift_falls_on_both(
    pair: tuple[Any, Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, lab = pair
    clock = Clock(monkeypatch, {id(dense): 4.0, id(lab.model): 2.0})
    found = named(Speed(**QUICK, warmups=1).evaluate(lab, reference=dense))
    d, t = id(dense), id(lab.model)
    assert clock.order == [d, t, t, d] * 4
    ratio = found["prefill", "ratio"]
    assert ratio.value == pytest.approx(2.0)
    assert (ratio.low, ratio.high) == pytest.approx((2.0, 2.0))
    drifts = [1 + 0.01 * (4 * k + 2.5) for k in (1, 2, 3)]
    assert found["prefill", "thinned"].value == pytest.approx(16 / (2.0 * drifts[1]))
    assert found["prefill", "dense"].n == 3
    assert ("decode", "ratio") not in found


def test_no_gain_is_said_where_there_is_none(pair: tuple[Any, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    dense, lab = pair
    Clock(monkeypatch, {id(dense): 4.0, id(lab.model): 2.0})
    assert NO_GAIN not in named(Speed(**QUICK).evaluate(lab, reference=dense))["prefill", "ratio"].how
    monkeypatch.undo()
    Clock(monkeypatch, {id(dense): 2.0, id(lab.model): 4.0})
    slow = named(Speed(**QUICK).evaluate(lab, reference=dense))["prefill", "ratio"]
    assert slow.how.endswith("; **no gain**: the thinned model is slower")
    monkeypatch.undo()
    masked = Lab(tiny("llama"), text())
    Clock(monkeypatch, {id(dense): 4.0, id(masked.model): 2.0})
    chance = named(Speed(**QUICK).evaluate(masked, reference=dense))["prefill", "ratio"]
    assert chance.value == pytest.approx(2.0)
    assert "**no gain**: all shapes are as before" in chance.how


def test_all_numbers_are_there_and_nothing_stays_behind(pair: tuple[Any, Lab]) -> None:
    dense, lab = pair
    shown: list[Any] = []
    lab.progress = lambda *row: shown.append(row)
    found = named(Speed(**QUICK, gone=SITES).evaluate(lab, reference=dense))
    assert set(found) == {
        *itertools.product(("prefill", "decode"), ("dense", "thinned", "ratio")),
        ("promised_prefill", "ratio"), ("promised_decode", "ratio"),
    }  # fmt: skip
    assert all(e.value > 0 and e.low is not None and e.low <= e.value <= (e.high or 0) for e in found.values())
    assert found["promised_prefill", "ratio"].value > 1
    assert hooks(dense) == hooks(lab.model) == 0
    assert shown[-1] == ("speed", 3, 3)
    assert set(named(Speed(**QUICK).evaluate(lab, reference=None))) == {("prefill", "thinned"), ("decode", "thinned")}


def test_a_promise_is_one_over_the_time_that_stays(pair: tuple[Any, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    dense, lab = pair
    ticks = itertools.count()
    monkeypatch.setattr(workloads, "clock", lambda _: float(next(ticks)))
    found = named(Speed(**QUICK, gone=("block.1",)).evaluate(lab, reference=dense))
    # Every look at the clock is a second: the block takes 1 of the 3 that pass between start and end.
    assert found["promised_prefill", "ratio"].value == pytest.approx(1 / (1 - 1 / 3))


def test_what_is_timed_are_whole_blocks_or_a_branch_with_its_norms(pair: tuple[Any, Lab]) -> None:
    dense, _ = pair
    anatomy = Lab(dense, text()).anatomy
    found = modules_of(anatomy, ("block.1.attention", "block.1.mlp", "block.2.mlp"))
    branch = anatomy.branch("block.2.mlp")
    assert found == ("model.layers.1", *(f"model.layers.2.{p}" for p in (branch.core, *branch.own)))
    assert len(found) == 3
    with timed(dense, found, CPU) as spans, torch.no_grad():
        dense(text())
    assert len(spans) == 3
    assert all(s > 0 for s in spans)


def test_a_model_without_a_cache_has_no_decoding() -> None:
    lab = Lab(tiny("nanogpt"), text())
    assert set(named(Speed(**QUICK).evaluate(lab, reference=None))) == {("prefill", "thinned")}


def test_decoding_gives_generates_tokens(pair: tuple[Any, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    _, lab = pair
    bench, fed = Workloads(lab, 2), []
    run = lab.model.forward
    monkeypatch.setattr(lab.model, "forward", lambda **k: fed.append(k["input_ids"]) or run(**k))
    prompt = bench.ids(6)
    assert prompt.shape == (2, 6)
    assert bench.decode(lab.model, prompt, 4) is not None
    monkeypatch.undo()
    want = lab.model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    assert torch.equal(torch.cat(fed[1:], 1), want[:, 6:])


def test_beyond_the_context_is_one_clear_line(pair: tuple[Any, Lab]) -> None:
    limit = pair[1].model.config.max_position_embeddings  # type: ignore[union-attr]
    with pytest.raises(InputError, match=f"{limit + 1} tokens are more than the model's {limit}"):
        Speed(**{**QUICK, "prefill": limit + 1}).evaluate(pair[1], reference=None)


@pytest.mark.parametrize(
    ("name", "options"), [("speed", {"rounds": 0}), ("speed", {"warmups": -1}), ("memory", {"length": 1})]
)
def test_wrong_options_are_named(name: str, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        EVALUATORS.make(name, options)


def test_the_peak_is_what_can_be_counted_by_hand() -> None:
    assert peak_of(lambda: torch.zeros(1000) + 1, CPU) == 8000
    assert peak_of(lambda: torch.zeros(1000).view(10, 100).add_(1), CPU) == 4000

    def chain() -> torch.Tensor:
        x = torch.zeros(1000)
        for _ in range(5):
            x = x * 2  # the old one is freed after the new one is made
        return x

    assert peak_of(chain, CPU) == 8000
    given = torch.zeros(1000)
    assert peak_of(lambda: given.t().contiguous().add_(1), CPU) == 0
    with LiveTensors() as tracker:
        kept = [torch.zeros(250) for _ in range(4)]
        del kept[0]
    assert (tracker.live, tracker.peak) == (3000, 4000)


def test_memory_counts_weights_cache_and_logits(pair: tuple[Any, Lab]) -> None:
    dense, lab = pair
    found = named(Memory(length=64).evaluate(lab, reference=dense))
    again = named(Memory(length=64).evaluate(lab, reference=dense))
    assert found == again
    own, whole = found["peak_memory", "thinned"], found["peak_memory", "dense"]
    total = lab.anatomy.total()
    assert own.value > total.bytes + 64 * total.kv_bytes
    assert whole.value > own.value
    assert found["peak_memory", "ratio"].value == pytest.approx(own.value / whole.value)
    assert set(named(Memory(length=64).evaluate(lab, reference=None))) == {("peak_memory", "thinned")}


def test_memory_is_told_by_parts(pair: tuple[Any, Lab]) -> None:
    dense, lab = pair
    bench = Workloads(lab, 2)
    for model, anatomy in ((dense, Lab(dense, text()).anatomy), (lab.model, lab.anatomy)):
        found = peak(bench, model, bench.ids(32))
        total = anatomy.total()
        assert found.weights == total.bytes
        assert found.kv == 2 * 32 * total.kv_bytes
        assert found.activations > 0
        assert found.total == found.weights + found.kv + found.activations
    own = named(Memory(batch=2, length=32).evaluate(lab, reference=dense))["peak_memory", "thinned"]
    assert own.value == found.total
    assert own.how.endswith(" activations")
    assert f"{found.weights / found.total:.0%} weights" in own.how


def test_resident_memory_as_the_system_tells_it(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t   2048 kB\nVmRSS:\t    100 kB\n", encoding="utf-8")
    assert _resident.resident(status) == 100 * 1024
    assert _resident.peak(status) == 2048 * 1024
    assert _resident.peak(tmp_path / "nothing") is None
    reset = tmp_path / "clear_refs"
    _resident.forget(reset)
    assert reset.read_text() == "5"
    _resident.forget(tmp_path / "no" / "folder")


@pytest.mark.slow
def test_a_fresh_process_tells_its_peak(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    job = {"dtype": "float32", "trust_remote_code": False, "prompt": [[5, 6, 7]], "decode": 2, "threads": 1}
    most, before = resident({**job, "spec": str(tmp_path / "model")})
    assert (most is None) == (before is None)
    assert most is None or before is None or most > before > 10_000_000
    with pytest.raises(UnsupportedError, match="resident memory failed: ") as caught:
        resident({**job, "spec": str(tmp_path / "nothing")})
    assert "\n" not in str(caught.value)


def test_size_is_counted(pair: tuple[Any, Lab]) -> None:
    dense, lab = pair
    found = named(Size().evaluate(lab, reference=dense))
    for of, model in (("dense", dense), ("thinned", lab.model)):
        count = sum(p.numel() for p in model.parameters())
        assert found["parameters", of].value == count
        assert found["bytes", of].value == 4 * count
    assert found["kv_bytes", "ratio"].value == 0.75
    assert found["kv_bytes", "dense"].value == 4 * 2 * 2 * 8 * 4, "blocks × (key, value) × heads × width × bytes"
    assert len(Size().evaluate(lab, reference=None)) == 3


def test_tied_weights_count_once() -> None:
    lab = Lab(tiny("llama", tie_word_embeddings=True), text())
    assert named(Size().evaluate(lab, reference=None))["parameters", "thinned"].value == sum(
        p.numel() for p in lab.model.parameters()
    )
