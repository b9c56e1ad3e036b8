"""Tables of latency: what is measured where, by which name, and with the model left alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lamina.core.documents import Budget, Limit, Step
from lamina.core.errors import InputError
from lamina.core.menu import Option, Times
from lamina.core.registry import PLANNERS
from lamina.lab import Bench, Lab, workloads
from lamina.planners._latency import change, measured, saved
from lamina.testing.models import lively, text, tiny


def lab() -> Lab:
    return Lab(lively(tiny("llama")), text(8, 24), batch_size=2)


def option(name: str, site: str, *steps: Step) -> Option:
    return Option(name=name, groups=(site,), steps=steps, damage=1.0)


def narrow(anatomy: Any, site: str, count: int) -> Step:
    units = next(u for u in anatomy.units(anatomy.site(site)) if u.kind.value in ("neuron", "kv_group"))
    return Step(rewrite="narrow", sites=(units.id,), options={"gone": {units.id: list(range(count))}, "refit": 0.01})


def ranks(anatomy: Any, site: str, rank: int, rewrite: str = "svd-llm") -> Step:
    maps = [m.id for m in anatomy.linears(anatomy.site(site))]
    return Step(rewrite=rewrite, sites=tuple(maps), options={"rank": dict.fromkeys(maps, rank)})


def test_a_change_is_named_by_the_shapes_that_it_makes() -> None:
    anatomy = lab().anatomy
    first, second = (change((narrow(anatomy, f"block.{n}.mlp", 8),), anatomy, f"block.{n}.mlp") for n in (1, 2))
    assert first == second != ""
    assert change((narrow(anatomy, "block.1.mlp", 16),), anatomy, "block.1.mlp") != first
    bits = Step(rewrite="round", sites=("block.1.mlp.gate_proj",), options={"type": "Q4_0"})
    assert change((narrow(anatomy, "block.1.mlp", 8), bits), anatomy, "block.1.mlp") == first, "bits change no shape"
    assert change((bits,), anatomy, "block.1.mlp") == ""
    one, other = (change((ranks(anatomy, "block.1.mlp", 4, r),), anatomy, "block.1.mlp") for r in ("svd", "svd-llm"))
    assert one == other


@pytest.mark.parametrize("work", ["decode:1x8", "prefill:2x8"])
def test_every_module_of_a_sublayer_is_timed_once_per_call(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks when it is looked at, a module takes one tick, whatever it does."""
    bench = lab()
    anatomy, before = bench.anatomy, {k: v.clone() for k, v in bench.model.state_dict().items()}
    options = [
        option("drop", "block.0.mlp", Step(rewrite="drop", sites=("block.0.mlp",))),
        option("half", "block.1.mlp", narrow(anatomy, "block.1.mlp", 8)),
        option("half", "block.2.mlp", narrow(anatomy, "block.2.mlp", 8)),
        option("one", "block.1.attention", narrow(anatomy, "block.1.attention", 1)),
        option("rank", "block.1.mlp", ranks(anatomy, "block.1.mlp", 4)),
    ]
    ticks = itertools.count()
    monkeypatch.setattr(workloads, "clock", lambda _: float(next(ticks)))
    times = measured(bench, options, work)
    assert times.sites == {s.id: 2.0 for s in anatomy.sublayers}, "a core and a norm"
    assert sorted(times.left.values()) == [1.0, 1.0, 1.0]
    assert saved(times, options[0], anatomy) == 2.0
    assert saved(times, options[1], anatomy) == 0.0
    halved = Times(total=9.0, sites=times.sites, left=dict.fromkeys(times.left, 0.25))
    assert saved(halved, options[2], anatomy) == 1.5
    assert all(torch.equal(v, before[k]) for k, v in bench.model.state_dict().items())


def test_what_is_changed_takes_less_time_where_there_is_much_to_do() -> None:
    bench = Lab(tiny("llama", hidden_size=256, intermediate_size=2048), text(8, 24), batch_size=2)
    options = [option("less", "block.1.mlp", narrow(bench.anatomy, "block.1.mlp", 1984))]
    times = measured(bench, options, "prefill:8x64")
    assert next(iter(times.left.values())) < 0.7
    assert 0 < sum(times.sites.values()) <= times.total * 1.5


def test_a_plan_under_a_limit_of_latency_and_of_bytes_meets_both(tmp_path: Any) -> None:
    bench = Bench(lab(), folder=tmp_path, mark="m")
    limit = Limit(metric="latency", keep=0.8, at="decode:1x8")
    steps = PLANNERS.make("knapsack", {"rounds": 0}).plan(
        None, Budget(metric="bytes", keep=0.7, also=(limit,)), bench.lab.anatomy, bench
    )
    times = Times.load(tmp_path / Times.name(limit.resource))
    assert times.of == "m"
    assert sum(s.why.get(limit.resource, 0.0) for s in steps) >= 0.2 * times.total
    assert sum(s.why.get("bytes", 0.0) for s in steps) >= 0.3 * bench.lab.anatomy.total().bytes
    with pytest.raises(InputError, match="the budget asks to free"):
        PLANNERS.make("knapsack").plan(
            None, Budget(metric="latency", keep=0.01, at="decode:1x8"), bench.lab.anatomy, bench
        )


def test_a_model_without_a_cache_does_not_decode() -> None:
    from lamina.planners._latency import _Clockwork

    bench = lab()
    clockwork = _Clockwork(bench, "decode", 1, 8)
    clockwork.runs.decode = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(InputError, match="keeps no cache"):
        clockwork.seconds(bench.model)
