"""The order of a plan's steps: joined by rewrite, rounding late, drops last; lost names are refused."""

from __future__ import annotations

import pytest

from lamina.core.documents import Step
from lamina.core.errors import UnsupportedError
from lamina.lab import Lab
from lamina.lab.order import merged
from lamina.testing.models import text, tiny


def lab() -> Lab:
    return Lab(tiny("llama"), text(2, 8))


def test_steps_are_joined_and_rounding_and_drops_come_last() -> None:
    one, two = "block.1.mlp.up_proj", "block.2.mlp.up_proj"
    steps = (
        Step(rewrite="drop", sites=("block.3.mlp",)),
        Step(rewrite="round", sites=(one,), options={"type": "Q4_0"}),
        Step(rewrite="narrow", sites=("block.1.mlp.neuron",), options={"gone": {"block.1.mlp.neuron": [1]}}),
        Step(rewrite="round", sites=(two,), options={"type": "Q8_0"}),
        Step(rewrite="drop", sites=("block.3.attention",)),
    )
    found = merged(steps, lab())
    assert [s.rewrite for s in found] == ["narrow", "round", "drop"]
    assert found[1].options == {"type": {one: "Q4_0", two: "Q8_0"}}
    assert found[2].sites == ("block.3",)


def test_options_that_differ_as_a_whole_stay_steps_of_their_own() -> None:
    gone = ("block.1.mlp.neuron", "block.2.mlp.neuron")
    steps = [
        Step(rewrite="narrow", sites=(s,), options={"gone": {s: [1]}, "refit": r})
        for s, r in zip(gone, (0.0, 0.1), strict=True)
    ]
    assert merged(steps, lab()) == steps


def test_a_site_that_another_step_would_rename_is_refused() -> None:
    replaced = Step(rewrite="replace", sites=("block.2.attention",))
    for other in (Step(rewrite="drop", sites=("block.2.mlp",)), Step(rewrite="replace", sites=("block.2.mlp",))):
        with pytest.raises(UnsupportedError, match=r"block\.2\.mlp would have another name"):
            merged([replaced, other], lab())
    elsewhere = Step(rewrite="drop", sites=("block.1.mlp",))
    assert merged([replaced, elsewhere], lab()) == [replaced, elsewhere]
    both = Step(rewrite="replace", sites=("block.2.attention", "block.2.mlp"))
    assert merged([both], lab()) == [both]


def test_steps_that_take_blocks_away_come_last_and_alone() -> None:
    bench = lab()
    merge = Step(rewrite="merge", sites=("block.0", "block.1"))
    cut = Step(rewrite="narrow", sites=("block.3.mlp.neuron",), options={"gone": {"block.3.mlp.neuron": [1]}})
    assert [s.rewrite for s in merged([merge, cut], bench)] == ["narrow", "merge"]
    bits = Step(rewrite="round", sites=("block.3.mlp.up_proj",), options={"type": "Q4_0"})
    for other in (Step(rewrite="drop", sites=("block.3",)), Step(rewrite="laco", sites=("block.2", "block.3")), bits):
        with pytest.raises(UnsupportedError, match=f"{other.rewrite} would find others under their names"):
            merged([merge, other], bench)
