"""The strip, its scale and the other charts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.core.documents import Budget, ModelRef, Plan, Step
from lamina.report.charts import Dot, curve, intervals
from lamina.report.numbers import count, data, fixed, percent, signed, significant, span, times
from lamina.report.read import Place, Run, Score, SiteScores, read_run
from lamina.report.strip import Marks, chunking, panels
from lamina.report.svg import DARK, LEVELS, LIGHT, Scale, el, ticks


def run_of(survey: SiteScores, *steps: Step) -> Run:
    plan = Plan(model=ModelRef(name="m", fingerprint="f"), budget=Budget(keep=0.5), steps=steps)
    return Run(Path(), None, plan, survey, None, None, published=False)


def survey_of(**scores: float) -> SiteScores:
    sites = {key.replace("__", "."): value for key, value in scores.items()}
    kinds = {site: Place.of(site).kind for site in sites if Place.of(site)}  # type: ignore[union-attr]
    return SiteScores(scores={"m": {s: Score(v, None) for s, v in sites.items()}}, kinds=kinds)


def test_every_block_falls_into_one_chunk() -> None:
    for depth in range(1, 130):
        size, per_line = chunking(depth)
        assert size <= 14
        assert size * per_line <= 44
        assert size * per_line * -(-depth // (size * per_line)) >= depth
    assert chunking(30) == (10, 3)
    assert chunking(80) == (10, 4)
    assert chunking(12) == (12, 1)


def test_a_dropped_block_takes_its_sublayers_along() -> None:
    marks = Marks.of(run_of(SiteScores(), Step(rewrite="drop", sites=("block.3",))).plan)
    inside = Place.of("block.3.mlp")
    assert inside
    assert marks.fate(inside) == ("dropped", "dropped with block.3 (step 1)")
    other = Place.of("block.13.mlp")
    assert other
    assert marks.fate(other) == ("kept", "kept")


def test_other_rewrites_are_changed_not_dropped() -> None:
    marks = Marks.of(run_of(SiteScores(), Step(rewrite="replace", sites=("block.3.mlp",))).plan)
    place = Place.of("block.3.mlp")
    assert place
    assert marks.fate(place) == ("changed", "replace (step 1)")


def test_stacks_apart_and_hybrid_kinds_share_a_row() -> None:
    survey = survey_of(encoder__block__0__mlp=1.0, decoder__block__0__mlp=2.0, decoder__block__1__moe=3.0)
    (panel,) = panels(run_of(survey), "m")
    assert sorted(stack.name for stack in panel.stacks) == ["decoder", "encoder"]
    decoder = next(stack for stack in panel.stacks if stack.name == "decoder")
    assert "MLP / MoE" in decoder.chunks[0][0]


def test_a_plan_without_a_survey_is_drawn() -> None:
    (panel,) = panels(run_of(SiteScores(), Step(rewrite="drop", sites=("block.1.mlp",))), "")
    assert 'data-site="block.1.mlp"' in panel.stacks[0].chunks[0][1]


def test_tooltip_names_site_score_cost_and_fate(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.plan is not None
    chunk = "".join(chunk for _, chunk in panels(run, "damage")[0].stacks[0].chunks)
    site = run.plan.steps[1].sites[0]
    tip = chunk.split(f'data-site="{site}"')[1].split("</title>")[0].replace("\N{NO-BREAK SPACE}", " ")
    assert f"{site}\ndamage: 0.0" in tip
    assert " ± " in tip
    assert "nats" in tip
    assert "2.65 M parameters, 5.31 MB" in tip
    assert "dropped (step 2)" in tip


def test_scales() -> None:
    assert Scale.of([0.01, 0.1, 2.0]).how == "log"
    assert Scale.of([-1.0, 0.01, 0.02, 0.03, 5.0]).how == "signed log"
    assert Scale.of([0.4, 0.5, 0.6]).how == "linear"
    for values in ([0.01, 0.1, 2.0], [-1.0, 0.01, 0.02, 5.0], [0.4, 0.5]):
        scale = Scale.of(values)
        assert scale(min(values)) == 0
        assert scale(max(values)) == 1
        assert scale.level(max(values)) == f"q{LEVELS - 1}"
        for at in (0.0, 0.3, 1.0):
            assert scale(scale.at(at)) == pytest.approx(at, abs=1e-9)
    assert Scale.of([1.0])(1.0) == 0.5


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_palettes_order_by_lightness_alone() -> None:
    light, dark = [luminance(c) for c in LIGHT], [luminance(c) for c in DARK]
    assert light == sorted(light, reverse=True)
    assert dark == sorted(dark)


def test_elements_are_escaped() -> None:
    assert el("text", "<b>", class_='"x"') == '<text class="&#34;x&#34;">&lt;b&gt;</text>'


def test_charts_take_extremes() -> None:
    flat = intervals([Dot("a", 1.0, "1")], reference=1.0, log=True, name="n", reference_name="dense")
    wide = intervals([Dot("a", -3.0, "1", -9.0, 40.0)], reference=0.0, log=False, name="n", reference_name="r")
    still = curve([(1, 2.0), (2, 2.0)])
    for chart in (flat, wide, still):
        assert "nan" not in chart
        assert "inf" not in chart
    assert len(ticks(0, 1)) <= 6
    assert ticks(3, 3) == [3]


def test_numbers() -> None:
    def plain(text: str) -> str:
        return text.replace("\N{NO-BREAK SPACE}", " ")

    assert plain(count(134_515_008)) == "134.5 M"
    assert plain(count(1_240_000_000)) == "1.24 B"
    assert plain(data(269_030_016)) == "269 MB"
    assert plain(data(768)) == "768 B"
    assert plain(data(22_080)) == "22.1 kB"
    assert times(1.533) == "×1.53"
    assert plain(percent(0.251)) == "25.1 %"
    assert signed(0.4271) == "+0.427"
    assert signed(-0.02) == "−0.020"
    assert fixed(-0.0001, 2) == "0.00"
    assert significant(2.14e-05) == "2.14e−5"
    assert significant(0.01234) == "0.0123"
    assert significant(0) == "0"
    assert fixed(float("nan"), 1) == "not finite"
    assert span("+0.1", "+0.2") == "0.1–0.2"
    assert span("−0.1", "+0.2") == "−0.1 to +0.2"
    assert plain(count(999_960)) == "1.00 M"
    assert plain(count(-5_000)) == "−5.00 k"
