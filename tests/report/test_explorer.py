"""The explorer's data: options packed and given back, the plan found again, prices and seconds as the planner has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import scripted
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lamina.core import registry
from lamina.core.documents import Budget, ModelRef, Plan, Recipe, Step
from lamina.core.menu import Menu, Option, Solved, Times, repriced
from lamina.report import explorer, write
from lamina.report.choices import exclusive
from lamina.report.explorer import payload
from lamina.report.flow import Texts, flow
from lamina.report.inside import GROUPS, inside
from lamina.report.methods import decisions
from lamina.report.read import read_run

SHA = "sha256:" + "3f9a5c1e" * 8
SCRIPTS = ("words", "solve", "model", "yaml")
GONE = [n for n in range(96) if n % 3]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def option(name: str, place: str, steps: list[Step], damage: float, **saves: float) -> Option:
    told = [Step(rewrite=s.rewrite, sites=s.sites, options=s.options, why={"damage": damage, **saves}) for s in steps]
    return Option(name=name, groups=(place,), steps=tuple(told), damage=damage * len(steps), saves=saves)


def options(block: int) -> list[Option]:
    """Of an attention and of an MLP: drop, narrow, round, narrow and round."""
    made: list[Option] = []
    for kind, whole in (("attention", 400.0), ("mlp", 1200.0)):
        place = f"block.{block}.{kind}"
        drop = Step(rewrite="drop", sites=(place,))
        gone = {f"{place}.neuron": [n + block for n in GONE]}
        narrow = Step(rewrite="narrow", sites=(f"{place}.neuron",), options={"gone": gone, "refit": 1e-5, "sure": True})
        bits = Step(rewrite="round", sites=(f"{place}.one", f"{place}.two"), options={"type": "Q8_0"})
        price = 0.01 * (1 + block)
        made += [
            option(
                "drop",
                place,
                [drop],
                9 * price,
                parameters=whole,
                bytes=2 * whole,
                kv_bytes=8.0 * (kind == "attention"),
            ),
            option("narrow to 32 of 96 neurons", place, [narrow], 2 * price, parameters=whole / 2, bytes=whole),
            option("Q8_0", place, [bits], price / 3, bytes=whole * 0.9),
            option(
                "narrow to 32 of 96 neurons + Q8_0", place, [narrow, bits], 3 * price, parameters=whole / 4, bytes=whole
            ),
        ]
    return made


MENU = Menu(
    of="m", whole={"parameters": 9000.0, "bytes": 18000.0, "kv_bytes": 32.0},
    options=tuple(o for b in range(4) for o in (*options(b), *options(b))), passes=1, tokens=9,
)  # fmt: skip
ONCE = [o for b in range(4) for o in options(b)]
TAKEN = [0, 5, 11, 15, 22]


def plan_of(chosen: list[int], more: tuple[Step, ...] = ()) -> Plan:
    steps = tuple(s for n in chosen for s in ONCE[n].steps)
    budget = Budget(metric="bytes", keep=0.5, protect=("block.3",))
    return Plan(model=ModelRef(name="m: {odd}", fingerprint=SHA), recipe="mixed", budget=budget, steps=(*more, *steps))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    MENU.save(tmp_path / "menu.json")
    plan_of(TAKEN).save(tmp_path / "plan.yaml")
    return tmp_path


def data_of(folder: Path) -> dict[str, Any]:
    made = payload(read_run(folder))
    assert made is not None
    return json.loads(explorer.encoded(made))


def written(data: Any, edit: str = "state.picks = PLAN.slice();") -> Plan:
    """The page's plan file, read as `lamina apply` reads it."""
    text = scripted.run(SCRIPTS, f"{edit} return planText();", None, data=data)
    return Plan.from_data(yaml.safe_load(text))


def bare(plan: Plan) -> list[tuple[Any, ...]]:
    return sorted((s.rewrite, s.sites, json.dumps(s.options, sort_keys=True)) for s in plan.steps)


@given(PLAIN)
def test_a_line_of_yaml_reads_back_as_what_it_was(value: Any) -> None:
    text = flow(value)
    assert "\n" not in text
    again = yaml.safe_load("x: " + text) if text else None
    assert again == {"x": value}


def test_long_lists_are_packed_and_the_place_is_marked() -> None:
    place = "block.1.mlp"
    step = Step(rewrite="narrow", sites=(f"{place}.neuron", "block.10.mlp"), options={"gone": {place: GONE}})
    text = Texts().step(step, place)
    assert place not in text.replace("block.10.mlp", "")
    assert len(text) < 150
    code = "return stepText(INPUT.given[0], INPUT.given[1], {});"
    line = scripted.run(("yaml",), code, [text, place])
    assert yaml.safe_load(line) == [{"rewrite": "narrow", "sites": [*step.sites], "options": {"gone": {place: GONE}}}]


def test_the_menu_stands_in_the_page_once_and_small(folder: Path) -> None:
    data = data_of(folder)
    assert len(data["options"]) == len(ONCE)
    assert data["plan"] == TAKEN
    assert data["protect"] == [n for n, s in enumerate(data["ids"]) if s.startswith("block.3")]
    assert len(data["pieces"]) == 1 + 4 + 1  # drop; narrow, of other neurons in each block; round
    assert data["left_out"] == []
    assert {tuple(s) for s in data["sets"]} == {tuple(range(0, 32, 4)), tuple(range(0, 32, 8))}


def test_the_run_s_plan_comes_back_step_by_step(folder: Path) -> None:
    plan, again = Plan.load(folder / "plan.yaml"), written(data_of(folder))
    assert (again.model, again.recipe, again.budget) == (plan.model, plan.recipe, plan.budget)
    assert bare(again) == bare(plan)
    assert [s.why for s in again.steps] == [pytest.approx(dict(s.why), rel=1e-5) for s in plan.steps]
    assert again.expects["bytes"] == 18000 - sum(ONCE[n].saves["bytes"] for n in TAKEN)
    assert again.expects["loss"] == pytest.approx(sum(ONCE[n].damage for n in TAKEN))


def test_another_choice_says_its_own_budget(folder: Path) -> None:
    edit = "state.picks = PLAN.slice(); clear(D.options[0].g[0]); take(1); state.resource = 1;"
    again = written(data_of(folder), edit)
    assert bare(again) == bare(plan_of([1, *TAKEN[1:]]))
    kept = 1 - sum(ONCE[n].saves["bytes"] for n in [1, *TAKEN[1:]]) / 18000
    assert again.budget.metric == "bytes"
    assert again.budget.protect == ("block.3",)
    assert 0 <= again.budget.keep - kept < 1e-4  # type: ignore[operator]


def test_steps_that_are_no_options_stay_with_the_plan_alone(folder: Path) -> None:
    refit = Step(rewrite="refit", sites=("block.2.mlp.down",), options={"ridge": 1e-6})
    plan_of(TAKEN, (refit,)).save(folder / "plan.yaml")
    data = data_of(folder)
    assert written(data).steps[0] == refit
    assert bare(written(data, "state.picks = PLAN.slice(); take(1);")) == bare(plan_of([1, *TAKEN[1:]]))
    assert "1 steps of the run's plan are no choices" in explorer.export_note(data)


def test_prices_are_the_planner_s(folder: Path) -> None:
    solved = Solved(of="m", needs={"bytes": 1.0}, factors={"round": 3.0, "narrow": 0.5}, level=0.25, rises=(0.1,))
    solved.save(folder / "solved.json")
    data = data_of(folder)
    told = [o["d"] for o in data["options"]]
    assert told == pytest.approx([0.25 * p for p in repriced(ONCE, solved.factors)], rel=1e-5)
    both = written(data, "state.picks = picksOf([3]);").steps
    assert [s.why["damage"] for s in both] == pytest.approx([0.03 * 0.5 * 0.25, 0.03 * 3.0 * 0.25], rel=1e-5)
    Solved(of="another", factors={"round": 3.0}).save(folder / "solved.json")
    assert [o["d"] for o in data_of(folder)["options"]] == pytest.approx([o.damage for o in ONCE], rel=1e-5)


def test_what_does_not_fit_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer, "MOST", 140 * len(ONCE) + 300)
    data = data_of(folder)
    lost = {name for o in data["left_out"] for name in [o.rpartition(" (")[0]]}
    assert lost == {"narrow to 32 of 96 neurons", "narrow to 32 of 96 neurons + Q8_0"}
    assert sum(int(o.rpartition("(")[2][:-1]) for o in data["left_out"]) == len(ONCE) - len(data["options"])
    assert bare(written(data)) == bare(plan_of(TAKEN)), "a plan's own options stay"
    assert "Left out, since the page would be too large: narrow to 32" in explorer.note(data)


def test_seconds_are_those_of_the_planner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the whole registry
    from lamina.anatomy import Anatomy
    from lamina.planners._latency import change, saved
    from lamina.testing.models import tiny

    anatomy = Anatomy.of(tiny("llama"))
    place, mlp = "block.1.attention", "block.1.mlp"
    units = {k: next(iter(anatomy.units(anatomy.site(s)))) for k, s in (("kv", place), ("neuron", mlp))}
    maps = [s.id for s in anatomy.linears(anatomy.site(mlp))]
    ranks = {"rank": dict.fromkeys(maps, 3)}
    kv, neurons = units["kv"], units["neuron"]
    steps = [
        ("drop", place, Step(rewrite="drop", sites=(place,))),
        ("Q8_0", mlp, Step(rewrite="round", sites=tuple(maps), options={"type": "Q8_0"})),
        ("svd at 50%", mlp, Step(rewrite="svd", sites=tuple(maps), options=ranks)),
        (
            f"narrow to {neurons.width - 2} of {neurons.width} neurons", mlp,
            Step(rewrite="narrow", sites=(neurons.id,), options={"gone": {neurons.id: [0, 1]}}),
        ),
        (
            f"narrow to {kv.width - 1} of {kv.width} kv groups", place,
            Step(rewrite="narrow", sites=(kv.id,), options={"gone": {kv.id: [0]}}),
        ),
    ]  # fmt: skip
    made = [option(name, at, [s], 0.1, bytes=1.0) for name, at, s in steps]
    left = {change(o.steps, anatomy, o.groups[0]): 0.3 + 0.1 * n for n, o in enumerate(made)}
    left = {k: v for k, v in left.items() if k and "round" not in k}
    times = Times(of="m", work="decode:1x512", total=0.01, sites={place: 0.002, mlp: 0.003}, left=left)
    times.save(folder / Times.name("latency@decode:1x512"))
    Menu(of="m", whole={"bytes": 10.0}, options=tuple(made)).save(folder / "menu.json")
    data = data_of(folder)
    at = [r["key"] for r in data["resources"]].index("latency@decode:1x512")
    told = [o["s"][at] for o in data["options"]]
    assert told == pytest.approx([saved(times, o, anatomy) for o in made], rel=1e-5)
    assert sum(t > 0 for t in told) == 4
    assert data["resources"][at]["unknown"] == 0
    without = Times(of="m", work="decode:1x512", total=0.01, sites={mlp: 0.003}, left={})
    without.save(folder / Times.name("latency@decode:1x512"))
    assert data_of(folder)["resources"][at]["unknown"] == 3


def test_sets_that_may_not_all_go_are_the_planner_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from lamina.anatomy import Anatomy
    from lamina.planners._menu import unlike
    from lamina.planners._moves import dropped
    from lamina.testing.models import tiny

    anatomy = Anatomy.of(tiny("llama"))
    made = []
    for site in anatomy.sublayers:
        saves = dropped(anatomy, site).saves
        step = Step(rewrite="drop", sites=(site.id,))
        made.append(option("drop", site.id, [step], 0.1, kv_bytes=float(saves.kv_bytes), bytes=float(saves.bytes)))
    assert sorted(map(sorted, exclusive(made))) == sorted(map(sorted, unlike(anatomy, made)))


def test_without_a_menu_sublayers_can_be_dropped_at_the_price_of_damage(run_folder: Path) -> None:
    data = data_of(run_folder)
    assert data["source"] == "damage"
    assert {data["names"][o["n"]] for o in data["options"]} == {"drop"}
    assert len(data["options"]) == 60
    plan = Plan.load(run_folder / "plan.yaml")
    assert sorted(data["ids"][data["options"][n]["g"][0]] for n in data["plan"]) == sorted(plan.sites())
    damage = data["measures"][[m["name"] for m in data["measures"]].index("damage")]
    for o in data["options"]:
        assert o["d"] == pytest.approx(damage["v"][o["g"][0]], rel=1e-3)
    assert sorted(written(data).sites()) == sorted(plan.sites())


def test_without_prices_nothing_is_said_of_damage(run_folder: Path) -> None:
    frame = pl.read_parquet(run_folder / "survey.parquet").filter(pl.col("measure") != "damage")
    frame.write_parquet(run_folder / "survey.parquet")
    data = data_of(run_folder)
    assert not data["priced"]
    assert "nothing is said of damage" in explorer.note(data)
    (run_folder / "plan.yaml").unlink()
    head = data_of(run_folder)["head"]
    assert SHA in head["model"], "the survey knows which model it is of"
    (run_folder / "recipe.yaml").unlink()
    assert data_of(run_folder)["head"] is None


def units(path: Path, width: int) -> None:
    rows = [
        {"site": f"block.{b}.mlp.neuron", "kind": "neuron", "block": b, "unit": u, "span": 1, "measure": "energy",
         "value": float((7 * u) % width + b), "stderr": None, "scale": "", "parameters": 1, "bytes": 1, "macs": 1,
         "kv_bytes": 0, "tokens": 1, "seed": 0, "fingerprint": SHA}
        for b in range(2) for u in range(width)
    ]  # fmt: skip
    pl.DataFrame(rows).write_parquet(path)


def test_units_one_by_one_or_in_groups_of_like_score(tmp_path: Path) -> None:
    path, sites = tmp_path / "survey.parquet", {"block.0.mlp": 5, "block.1.mlp": 8}
    units(path, 10)
    (made,), note = inside(path, sites, 10_000)
    assert (made["width"], made["grouped"], note) == (10, False, "")
    assert made["v"]["8"] == [float((7 * u) % 10 + 1) for u in range(10)]
    units(path, 640)
    (made,), _ = inside(path, sites, 10_000)
    assert made["grouped"]
    assert made["v"]["5"] == [pytest.approx(10 * g + 4.5, rel=0.01) for g in range(GROUPS)]
    assert inside(path, sites, 100) == ([], "no room on the page for the unit scores energy of neurons")


def test_long_lists_of_a_step_are_cut_short_in_the_table() -> None:
    _, (row,), _ = decisions(plan_of([1]))
    assert "block.0.attention.neuron: 1 2 4" in row.options
    assert "… (64 in all)" in row.options
    assert len(row.options) < 200


def test_the_page_stays_small(folder: Path) -> None:
    path = write(folder)
    assert path.stat().st_size < 400_000
    assert 'id="lamina-data"' in path.read_text(encoding="utf-8")


def test_pages_without_sites_have_no_explorer(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    (folder / "survey.parquet").unlink()
    assert payload(read_run(folder)) is None
    assert 'id="lamina-data"' not in write(folder).read_text(encoding="utf-8")


def test_a_recipe_without_a_measure_is_no_gap(run_folder: Path) -> None:
    registry.recipe("bare", None, summary="No measure.", measure="", planner="greedy")
    for name, kind in (("recipe.yaml", Recipe), ("plan.yaml", Plan)):
        made = kind.load(run_folder / name)
        change = {"name": "bare"} if kind is Recipe else {"recipe": "bare"}
        dataclasses.replace(made, **change).save(run_folder / name)
    html = write(run_folder).read_text(encoding="utf-8")
    assert "<dt>measure</dt>" not in html
    assert "The recipe&#39;s measure" not in html
    assert "<dt>planner</dt>" in html
