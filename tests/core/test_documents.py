"""Recipe, plan, receipts and evidence survive writing and reading; what they do not know is refused with a hint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.core.documents import (
    Budget,
    Data,
    Document,
    Evidence,
    EvidenceFile,
    Heal,
    ModelRef,
    Plan,
    Receipt,
    Receipts,
    Recipe,
    Step,
)
from lamina.core.errors import InputError
from lamina.core.sites import Cost

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 2**53)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
OPTIONS = st.dictionaries(WORDS, PLAIN, max_size=3)
WHY = st.dictionaries(WORDS, NUMBERS, max_size=3)
SITES = st.lists(WORDS, max_size=4).map(tuple)
COSTS = st.builds(Cost, COUNTS, COUNTS, COUNTS, COUNTS)
BUDGETS = st.one_of(
    st.builds(
        Budget,
        metric=st.sampled_from(["parameters", "bytes", "blocks", "sublayers"]),
        keep=st.floats(0, 1, exclude_min=True),
        protect=SITES,
    ),
    st.builds(Budget, metric=st.sampled_from(["parameters", "bytes"]), limit=st.integers(1, 2**53)),
    st.builds(Budget, metric=st.sampled_from(["blocks", "sublayers"]), drop=st.integers(0, 999), protect=SITES),
)
HEALS = st.one_of(
    st.builds(Heal, healer=WORDS, steps=st.integers(1, 9999), options=OPTIONS),
    st.builds(Heal, healer=WORDS, minutes=st.floats(0.1, 999), options=OPTIONS),
)
RECIPES = st.builds(
    Recipe,
    name=WORDS,
    model=WORDS,
    budget=BUDGETS,
    heal=st.none() | HEALS,
    data=st.builds(Data, calibration=WORDS, length=st.integers(1, 4096)),
    measure_options=OPTIONS,
    planner_options=OPTIONS,
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    seed=COUNTS,
    gguf=st.booleans(),
)
MODELS = st.builds(ModelRef, name=WORDS, fingerprint=WORDS)
STEPS = st.builds(Step, rewrite=WORDS, sites=SITES, options=OPTIONS, why=WHY)
PLANS = st.builds(
    Plan, model=MODELS, recipe=WORDS, budget=BUDGETS, steps=st.lists(STEPS, max_size=3).map(tuple), expects=WHY
)
RECEIPT = st.builds(Receipt, rewrite=WORDS, sites=SITES, before=COSTS, after=COSTS, structure=OPTIONS, options=OPTIONS)
RECEIPTS = st.builds(
    Receipts, model=MODELS, plan=WORDS, receipts=st.lists(RECEIPT, max_size=3).map(tuple), healed=OPTIONS
)
EVIDENCE = st.builds(
    Evidence,
    name=WORDS,
    value=NUMBERS,
    unit=WORDS,
    of=st.sampled_from(["dense", "thinned", "difference", "ratio", "contract"]),
    low=st.none() | NUMBERS,
    high=st.none() | NUMBERS,
    n=COUNTS,
    how=WORDS,
)
EVIDENCES = st.builds(EvidenceFile, evidence=st.lists(EVIDENCE, max_size=3).map(tuple), notes=SITES)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.one_of(RECIPES, PLANS, RECEIPTS, EVIDENCES))
def test_written_and_read_it_is_the_same(tmp_path: Path, suffix: str, document: Document) -> None:
    path = tmp_path / f"document{suffix}"
    document.save(path)
    first = path.read_bytes()
    read = type(document).load(path)
    assert read.to_data() == document.to_data()
    read.save(path)
    assert path.read_bytes() == first


def test_yaml_is_what_people_read(tmp_path: Path) -> None:
    plan = Plan(
        model=ModelRef(name="m", fingerprint="sha256:0"),
        budget=Budget(keep=0.75, protect=("block.0",)),
        steps=(Step(rewrite="drop", sites=("block.1", "block.2.mlp"), why={"damage": 0.011}),),
    )
    plan.save(tmp_path / "plan.yaml")
    assert (tmp_path / "plan.yaml").read_text() == (
        "lamina: 1\n"
        "model: {name: m, fingerprint: 'sha256:0'}\n"
        "recipe: default\n"
        "budget:\n  metric: parameters\n  keep: 0.75\n  protect: [block.0]\n"
        "steps:\n- rewrite: drop\n  sites: [block.1, block.2.mlp]\n  why: {damage: 0.011}\n"
    )


RECIPE: dict[str, Any] = {"budget": {"metric": "parameters", "keep": 0.75}}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"budget": {"keep": 0.5}, "modell": "x"}, ["'modell'", "did you mean model"]),
        ({"budget": {"kep": 0.5}}, ["'budget.kep'", "did you mean keep"]),
        ({**RECIPE, "data": {"calibraton": "x"}}, ["'data.calibraton'", "did you mean calibration"]),
        ({**RECIPE, "heal": {"steps": 3, "healr": "x"}}, ["'heal.healr'", "did you mean healer"]),
        ({"budget": {"keep": 0.5, "limit": 3}}, ["exactly one of keep, limit and drop"]),
        ({"budget": {"metric": "parameters"}}, ["exactly one of keep, limit and drop"]),
        ({"budget": {"keep": 0}}, ["keep must lie in (0, 1], not 0"]),
        ({"budget": {"keep": 1.5}}, ["keep must lie in (0, 1], not 1.5"]),
        ({"budget": {"keep": math.nan}}, ["keep must lie in (0, 1], not nan"]),
        ({"budget": {"limit": -3}}, ["limit must be positive"]),
        ({"budget": {"metric": "blocks", "drop": -1}}, ["drop must not be negative"]),
        ({"budget": {"metric": "blocks", "limit": 3}}, ["blocks take keep or drop, not limit"]),
        ({"budget": {"metric": "bytes", "drop": 3}}, ["drop counts blocks or sublayers, not bytes"]),
        ({"budget": {"metric": "layers", "drop": 3}}, ["budget.metric", "'blocks'"]),
        ({**RECIPE, "heal": {}}, ["exactly one of steps and minutes"]),
        ({**RECIPE, "seed": "many"}, ["seed", "integer"]),
        ({**RECIPE, "dtype": "float64"}, ["dtype", "'bfloat16'"]),
        ({}, ["budget"]),
        ([], ["a recipe is a mapping of keys, not list"]),
        ("keep: 75%", ["a recipe is a mapping of keys, not str"]),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(data: Any, says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.from_data(data, where="recipe.yaml")
    line = str(caught.value)
    assert line.startswith("recipe.yaml: ")
    assert "\n" not in line
    assert all(word in line for word in says), line


def test_an_unknown_key_deep_in_a_plan_is_refused() -> None:
    data = {
        "model": {"name": "m", "fingerprint": "f"},
        "budget": {"keep": 0.5},
        "steps": [{"rewrite": "drop", "sites": [], "whi": {}}],
    }
    with pytest.raises(InputError, match=r"'steps\.0\.whi'.*did you mean why"):
        Plan.from_data(data)


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_format_is_refused(version: int) -> None:
    with pytest.raises(InputError, match="lamina"):
        Recipe.from_data({**RECIPE, "lamina": version})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "budget: [", "not valid yaml"),
        ("a.yaml", "", "a recipe is a mapping of keys, not NoneType"),
        ("a.json", "{'a': 1}", "not valid json"),
        ("a.json", "", "not valid json"),
        ("a.yaml", "budget: {keep: 0.5}\nbudget: {keep: 0.7}\n", "the key 'budget' is given twice"),
        ("a.json", '{"budget": 1, "budget": 2}', "the key 'budget' is given twice"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        Recipe.load(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_what_can_not_be_read_is_one_clear_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="can't read") as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


def test_json_holds_no_nan() -> None:
    document = EvidenceFile(evidence=(Evidence(name="x", value=math.nan),))
    with pytest.raises(ValueError, match="not JSON compliant"):
        json.dumps(document.to_data(), allow_nan=False)


def test_evidence_by_name_and_owner() -> None:
    dense, thinned = (Evidence(name="perplexity", value=v, of=o) for v, o in ((5.0, "dense"), (6.0, "thinned")))  # type: ignore[arg-type]
    file = EvidenceFile(evidence=(dense, thinned))
    assert file.get("perplexity") == thinned
    assert file.get("perplexity", "dense") == dense
    assert file.get("perplexity", "ratio") is None


def test_a_plan_lists_its_sites_in_order() -> None:
    steps = (Step(rewrite="drop", sites=("b", "a")), Step(rewrite="drop", sites=("c",)))
    plan = Plan(model=ModelRef(name="m", fingerprint="f"), budget=Budget(keep=0.5), steps=steps)
    assert plan.sites() == ("b", "a", "c")
