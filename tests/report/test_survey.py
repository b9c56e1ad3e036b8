"""The survey that people hold: tables, ranks with intervals, agreement, stability, grids, lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import survey_files as files

from lamina import terminal
from lamina.core.errors import InputError
from lamina.core.scores import Scores
from lamina.report import listing, ranks
from lamina.report.survey import Survey, groups


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return files.many(tmp_path / "run")


@pytest.fixture
def survey(folder: Path) -> Survey:
    return Survey.open(folder)


def small(tmp_path: Path, values: Mapping[str, Any], *, errors: Mapping[str, Any] | None = None, **more: Any) -> Survey:
    """MLPs of one stack, scored by measures: {measure: [value of each block]}."""
    rows = [
        files.row(m, f"block.{b}.mlp", "mlp", float(v), stderr=float((errors or {}).get(m, [math.nan] * 99)[b]))
        for m, vs in values.items()
        for b, v in enumerate(vs)
    ]
    return Survey.open(files.write(tmp_path / "small", rows, **more))


# ranks


@pytest.mark.parametrize("seed", range(4))
def test_midranks_and_spearman_are_scipys(seed: int) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.integers(0, 8, 25).astype(float), draw.normal(size=25).round(1)
    assert np.array_equal(ranks.midranks(a), scipy.stats.rankdata(a))
    assert ranks.spearman(a, b) == (pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12), 25)
    a[3], b[7] = math.nan, math.inf
    both = [i for i in range(25) if i not in (3, 7)]
    assert ranks.spearman(a, b) == (pytest.approx(scipy.stats.spearmanr(a[both], b[both]).statistic, abs=1e-12), 23)


def test_spearman_of_too_little() -> None:
    assert math.isnan(ranks.spearman([1, 2], [1, 2])[0])
    assert math.isnan(ranks.spearman([1, 1, 1, 1], [1, 2, 3, 4])[0])


def test_the_interval_is_fishers_with_the_variance_of_bonett_and_wright() -> None:
    low, high = ranks.interval(0.6, 30)
    reach = 1.959964 * math.sqrt((1 + 0.18) / 27)
    assert (math.atanh(low), math.atanh(high)) == (
        pytest.approx(math.atanh(0.6) - reach), pytest.approx(math.atanh(0.6) + reach),
    )  # fmt: skip
    assert ranks.interval(-0.6, 30) == (pytest.approx(-high), pytest.approx(-low))
    assert all(math.isnan(x) for x in (*ranks.interval(0.6, 3), *ranks.interval(math.nan, 30)))
    for n in (4, 12, 80):  # at ±1 the interval is not empty
        low, high = ranks.interval(1.0, n)
        assert high == 1
        assert low == ranks.interval(1 - 12 / (n * (n * n - 1)), n)[0] < 1
        assert ranks.interval(-1.0, n) == (-1, pytest.approx(-low))


def test_the_interval_covers_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    pearson = 0.7
    true = 6 / math.pi * math.asin(pearson / 2)
    hits = 0
    for _ in range(400):
        x = draw.normal(size=30)
        y = pearson * x + math.sqrt(1 - pearson**2) * draw.normal(size=30)
        low, high = ranks.interval(*ranks.spearman(x, y))
        hits += low <= true <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_rank_intervals_are_those_of_a_literal_loop() -> None:
    values, errors = [0.3, 0.1, 0.2, 0.9, 0.15], [0.1, 0.05, 0.0, 0.3, 0.2]
    draw = np.random.default_rng(0)
    seen: list[list[int]] = [[] for _ in values]
    for _ in range(1000):
        drawn = [v + e * draw.standard_normal() for v, e in zip(values, errors, strict=True)]
        for i, mine in enumerate(drawn):
            seen[i].append(1 + sum(other < mine for other in drawn))
    low, high = ranks.rank_intervals(values, errors)
    for i, places in enumerate(seen):
        assert (low[i], high[i]) == (sorted(places)[25], sorted(places)[974])


def test_a_score_without_a_standard_error_stands_still_and_has_no_interval() -> None:
    low, high = ranks.rank_intervals([1.0, 1.1, 5.0], [math.nan, 4.0, 0.001])
    assert math.isnan(low[0])
    assert math.isnan(high[0])
    assert (low[1], high[1]) == (1, 3)
    assert (low[2], high[2]) == (2, 3)
    assert all(np.isnan(x).all() for x in ranks.rank_intervals([1.0, 2.0], [math.nan, math.nan]))


def test_the_lowest_of_many_have_the_intervals_they_have_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    values, errors = np.sort(draw.gamma(2.0, size=3000)), np.full(3000, 0.02)
    whole = ranks.rank_intervals(values, errors)
    asked = ranks.rank_intervals(values, errors, lowest=10)
    for all_, some in zip(whole, asked, strict=True):
        assert np.array_equal(all_[:10], some[:10])
        assert np.isnan(some[10:]).all()
    monkeypatch.setattr(ranks, "ROOM", 1_000_000)  # now those far above stay out, and other numbers are drawn
    few = ranks.rank_intervals(values, errors, lowest=10)
    for all_, some in zip(whole, few, strict=True):
        assert np.abs(all_[:10] - some[:10]).max() <= 4
        assert np.isnan(some[10:]).all()


# the survey


def test_a_survey_is_a_mapping_of_scores(survey: Survey) -> None:
    assert isinstance(survey, Mapping)
    assert list(survey) == list(survey.measures) == list(survey.keys())
    assert len(survey) == 8
    table = survey["leave-one-out"]
    assert isinstance(table, Scores)
    assert table.unit == "nats"
    assert table["block.3.mlp"] == survey.table("leave-one-out").filter(site="block.3.mlp")["value"][0]
    assert table.grids["pairs"].values.shape == (2, 3)
    assert survey["head-size"].values["block.0.attention.head"].shape == (9,)
    assert "cosine" not in survey
    assert survey.get("cosine") is None
    with pytest.raises(KeyError, match="did you mean leave-one-out"):
        survey["leave-one-ou"]
    assert survey["of-text"].values == {}
    assert "has no tokens" in survey.undefined["of-text"]
    assert survey.kinds == ("block", "attention", "mlp", "head", "neuron")
    assert "8 measures" in repr(survey)


def test_tables_are_tidy(survey: Survey) -> None:
    whole = survey.table()
    assert set(files.SCHEMA) == set(whole.columns)
    assert survey.table("leave-one-out", "mlp")["site"].to_list() == [f"block.{b}.mlp" for b in range(12)]
    both = survey.table("leave-one-out", ["mlp", "attention"])
    assert set(both["kind"].to_list()) == {"mlp", "attention"}
    gone = survey.table("measure-2").filter(site="block.4.mlp")
    assert gone["why"].to_list() == ["its inputs are not linear maps"]
    with pytest.raises(InputError, match="did you mean leave-one-out"):
        survey.table("leave-one-oot")
    with pytest.raises(InputError, match="did you mean mlp"):
        survey.table(kind="mpl")


def test_the_least_score_ranks_first_and_ties_rank_in_depth_order(tmp_path: Path) -> None:
    survey = small(tmp_path, {"m": [3.0, 1.0, 2.0, 1.0, math.nan, 0.5] + [9.0] * 6})
    ranked = survey.rank("m")
    assert ranked.columns == ["site", "unit", "value", "stderr", "rank", "rank_low", "rank_high"]
    assert ranked["rank"].to_list() == list(range(1, 12))
    numbers = [int(site.split(".")[1]) for site in ranked["site"].to_list()]
    assert numbers == [5, 1, 3, 2, 0, 6, 7, 8, 9, 10, 11]
    assert ranked["rank_low"].to_list() == [None] * 11


def test_ranks_are_within_a_kind_or_over_all_sites(survey: Survey) -> None:
    ranked = survey.rank("leave-one-out", "mlp")
    scores = survey["leave-one-out"]
    wanted = sorted((s for s in scores.values if s.endswith(".mlp")), key=lambda s: scores[s])
    assert ranked["site"].to_list() == wanted
    low, high = (ranked[c].to_numpy() for c in ("rank_low", "rank_high"))
    assert (low <= ranked["rank"].to_numpy()).all()
    assert (ranked["rank"].to_numpy() <= high).all()
    assert len(survey.rank("leave-one-out")) == 36
    assert survey.rank("leave-one-out")["site"].to_list() == scores.ranked()
    assert survey.rank("leave-one-out", lowest=3).equals(survey.rank("leave-one-out").head(3))
    assert len(survey.rank("head-size")) == 12 * 9
    assert len(survey.rank("head-size", "mlp")) == 0
    assert len(survey.rank("of-text")) == 0


def test_well_apart_scores_have_sure_ranks_and_noisy_ones_have_not(tmp_path: Path) -> None:
    values = {"sure": [1, 2, 3, 4], "vague": [1, 2, 3, 4]}
    survey = small(tmp_path, values, errors={"sure": [0.01] * 4, "vague": [9] * 4})
    sure, vague = survey.rank("sure"), survey.rank("vague")
    assert sure["rank_low"].to_list() == sure["rank_high"].to_list() == [1, 2, 3, 4]
    assert vague["rank_low"].to_list() == [1] * 4
    assert vague["rank_high"].to_list() == [4] * 4
    assert vague.equals(survey.rank("vague"))  # seeded


def test_runs_of_blocks_are_not_ranked_among_blocks(tmp_path: Path) -> None:
    rows = [files.row("angular", f"block.{b}", "block", 0.5 + b) for b in range(4)]
    rows += [files.row("angular", "block.0", "block", 0.1 * n, span=n) for n in (2, 3)]
    survey = Survey.open(files.write(tmp_path / "spans", rows))
    assert survey.rank("angular")["value"].to_list() == [0.5, 1.5, 2.5, 3.5]
    assert len(survey.table()) == 6
    assert survey["angular"].spans["block.0"].tolist() == [0.5, 0.2, pytest.approx(0.3)]
    (shown,) = listing.lowest(survey)
    assert shown.notes == ("  it also scores runs of 2 to 3 blocks",)


def test_agreement_is_spearmans_over_the_sites_both_score(survey: Survey) -> None:
    table = survey.compare()
    assert table.columns == ["kind", "measure", "other", "spearman", "low", "high", "n"]
    for kind, a, b, value, low, high, n in table.iter_rows():
        left, right = survey[a], survey[b]
        suffix = "" if kind == "block" else f".{kind}"
        both = [s for s in (f"block.{i}{suffix}" for i in range(12)) if s in left and s in right]
        oracle = scipy.stats.spearmanr([left[s] for s in both], [right[s] for s in both]).statistic
        assert value == pytest.approx(oracle, abs=1e-12)
        assert n == len(both)
        assert low < value < high or value == high == 1
    assert set(table.filter(measure="leave-one-out", other="measure-2")["n"].to_list()) == {12, 10}
    assert survey.compare("mlp").equals(table.filter(kind="mlp"))
    pairs = [frozenset(p) for p in table.filter(kind="mlp").select("measure", "other").iter_rows()]
    assert sorted(map(sorted, pairs)) == sorted(map(sorted, {frozenset(p) for p in pairs}))
    scoring = [m for m in survey if "block.0.mlp" in survey[m]]
    assert len(pairs) == len(list(itertools.combinations(scoring, 2)))


def test_units_are_compared_one_by_one(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    a, b = draw.normal(size=(2, 6, 4))
    rows = [
        files.row(m, f"block.{i}.attention.head", "head", float(v), unit=u)
        for m, table in (("a", a), ("b", b))
        for i, values in enumerate(table)
        for u, v in enumerate(values)
    ]
    (row,) = Survey.open(files.write(tmp_path / "heads", rows)).compare().iter_rows(named=True)
    assert row["n"] == 24
    assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-12)


def test_parts_that_score_alike_are_stable(tmp_path: Path) -> None:
    values = [0.4, 0.1, 0.7, 0.2, 0.9]
    turned = values[::-1]
    parts = [("m", f"block.{b}.mlp", 0, v, "text", p) for p in range(2) for b, v in enumerate(values)]
    seeds = enumerate((values, [2 * v for v in values], turned))
    parts += [("m", f"block.{b}.mlp", 0, v, "seed", p) for p, vs in seeds for b, v in enumerate(vs)]
    table = small(tmp_path, {"m": values}, parts=parts).stability()
    text, seed = table.filter(variation="text"), table.filter(variation="seed")
    assert text.rows() == [("m", "mlp", "text", 1.0, 2, 5)]
    apart = scipy.stats.spearmanr(values, turned).statistic
    assert seed["spearman"].to_list() == [pytest.approx((1 + apart + apart) / 3)]
    assert seed["parts"].to_list() == [3]


def test_without_parts_there_is_no_stability(tmp_path: Path) -> None:
    table = small(tmp_path, {"m": [1, 2, 3]}).stability()
    assert len(table) == 0
    assert table.columns == ["measure", "kind", "variation", "spearman", "parts", "n"]


def test_stability_of_every_kind(survey: Survey) -> None:
    table = survey.stability()
    assert set(table["kind"].to_list()) == {"block", "attention", "mlp"}
    assert set(table["variation"].to_list()) == {"text", "seed"}
    assert table["parts"].to_list() == [3 if v == "text" else 2 for v in table["variation"].to_list()]
    assert ((table["spearman"] > 0.5) & (table["spearman"] <= 1)).all()


def test_grids_come_back_as_they_were(survey: Survey) -> None:
    grid = survey.grid("leave-one-out", "pairs")
    assert grid.rows == ("row 0", "row 1")
    assert grid.columns == ("column 0", "column 1", "column 2")
    assert grid.values.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert survey.grids == (("leave-one-out", "pairs"),)
    with pytest.raises(InputError, match="did you mean pairs"):
        survey.grid("leave-one-out", "pair")
    with pytest.raises(InputError, match="none is known"):
        survey.grid("measure-1", "pairs")


def test_what_is_no_survey_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run lamina survey first"):
        Survey.open(tmp_path)
    path = tmp_path / "survey.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"survey\.parquet: not a readable survey"):
        Survey.open(tmp_path)
    folder = files.many(tmp_path / "old")
    import polars as pl

    old = folder / "survey.parquet"
    pl.read_parquet(old).drop("span", "why").write_parquet(old)
    with pytest.raises(InputError, match=r"no column span, why \(survey again\)"):
        Survey.open(folder)


def test_kinds_that_are_ranked_together() -> None:
    kinds = ["block", "attention", "mlp", "head", "neuron"]
    assert groups(kinds) == [["block"], ["attention", "mlp"], ["head"], ["neuron"]]
    assert groups(["moe"]) == [["moe"]]


# what is shown


def test_the_notebook_shows_a_table_and_the_heat_map(survey: Survey) -> None:
    shown = survey._repr_html_()
    assert shown.count("<table>") == 1
    assert shown.count("<svg") == 1
    assert "leave-one-out" in shown
    assert "of-text: not defined for this model: the model has no tokens" in shown


def test_names_are_escaped_in_a_notebook(tmp_path: Path) -> None:
    survey = small(tmp_path, {"<b>m</b>": [1, 2, 3]})
    assert "<b>" not in survey._repr_html_()
    assert "<b>" not in survey.heatmap()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    found = capsys.readouterr().out.splitlines()
    assert max(map(len, found)) <= 120
    return found


def run_of(folder: Path) -> Any:
    return SimpleNamespace(folder=folder, path=lambda name: folder / name)


def test_few_measures_are_printed_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = files.many(tmp_path / "r", measures=6)
    terminal.print_survey(run_of(folder))
    shown = lines(capsys)
    survey = Survey.open(folder)
    place = shown.index("leave-one-out, nats: 10 lowest of 24 (attention, mlp)")
    assert shown[place + 1].split() == ["site", "score", "±", "rank,", "95", "%"]
    best = survey.rank("leave-one-out", ["attention", "mlp"]).row(0, named=True)
    site, _, _, places = shown[place + 2].split()
    low, high = best["rank_low"], best["rank_high"]
    assert (site, places) == (best["site"], f"{low}–{high}" if low < high else str(low))
    head = survey.rank("head-size").row(0, named=True)
    assert any(line.startswith(f"{head['site']}[{head['unit']}] ") for line in shown)
    assert "  not scored: block.4.mlp, block.9.mlp: its inputs are not linear maps" in shown
    gone = "of-text: not defined for this model: the model has no tokens, and this measure reads what they are"
    assert gone in shown


@pytest.mark.parametrize("measures", [8, 40])
def test_many_measures_are_printed_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measures: int
) -> None:
    folder = files.many(tmp_path / "r", measures=measures)
    terminal.print_survey(run_of(folder))
    shown = lines(capsys)
    assert shown[0].split() == ["measure", "lowest", "three", "scores", "passes"]
    (row,) = [line for line in shown if line.startswith("leave-one-out ")]
    least = Survey.open(folder).rank("leave-one-out", ["attention", "mlp"])["site"].to_list()[:3]
    assert ", ".join(least) in row
    assert "block, attention, mlp" in row


@pytest.mark.parametrize("measures", [8, 40])
def test_comparisons_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], measures: int) -> None:
    survey = Survey.open(files.many(tmp_path / "r", measures=measures))
    terminal.print_compare(survey)
    shown = lines(capsys)
    text = "\n".join(shown)
    assert "Ranks on parts of the text" in text
    assert "Ranks with other seeds" in text
    value = survey.compare("mlp").filter(measure="leave-one-out", other="measure-1")["spearman"][0]
    if measures == 8:
        (row,) = [r for r in shown[shown.index("") :] if r.startswith("2 measure-1 ")][-1:]
        assert row.split()[2:4] == [f"{value:.2f}", "·"]
    else:
        place = shown.index("mlp: how alike measures rank")
        row = next(r for r in shown[place:] if r.split()[:2] == ["leave-one-out", "measure-1"])
        assert f" {value:.2f} " in row
        assert sum("pairs between" in r for r in shown[place:]) == 1


def test_one_measure_has_nothing_to_be_compared_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_compare(small(tmp_path, {"m": [1, 2, 3]}))
    assert lines(capsys) == ["no two measures score the same sites", ""]


def test_long_reasons_are_wrapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [files.row("m", "", None, math.nan, why="because [bold]of this[/bold] " * 20)]
    terminal.print_survey(run_of(files.write(tmp_path / "r", rows)))
    assert "[bold]of" in "".join(lines(capsys)[:4])
