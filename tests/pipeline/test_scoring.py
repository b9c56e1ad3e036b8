"""How a survey is made: parts of the text, what is kept of them, what goes wrong; the scores don't depend on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny_kinds
import torch
from safetensors.torch import save_file

import lamina
from lamina.core.documents import Recipe
from lamina.core.errors import InputError, LaminaError
from lamina.core.scores import Scores
from lamina.lab import passes
from lamina.lab.lab import Lab
from lamina.pipeline import Run, verbs
from lamina.pipeline.scoring import How, shards
from lamina.pipeline.table import PARTS, read_survey
from lamina.testing.models import padded, text, tiny

NAMES = ("cosine", "angular", "damage", "leave-one-out", "lim")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    tiny("llama").save_pretrained(folder / "model")
    save_file({"input_ids": text(12, 24)}, folder / "ids.safetensors")
    return folder


def run_in(folder: Path, bench: Path, model: str | None = None, **data: Any) -> Run:
    ids = str(bench / "ids.safetensors")
    told = {"calibration": ids, "heldout": ids, "length": 8, "sequences": 8, "heldout_sequences": 2, **data}
    asked = {"name": "default", "model": model or str(bench / "model"), "budget": {"keep": 1.0}, "data": told}
    return Run.start(folder, Recipe.from_data({**asked, "dtype": "float32"}))


def survey(folder: Path, bench: Path, how: How | None = None, names: Any = NAMES, **data: Any) -> dict[str, Scores]:
    verbs.survey(run_in(folder, bench, **data), list(names), how)
    return read_survey(folder / "survey.parquet")


def expect_equal(got: dict[str, Scores], want: dict[str, Scores], relative: float = 1e-10) -> None:
    assert set(got) == set(want)
    for name, table in want.items():
        for site, value in table.values.items():
            np.testing.assert_allclose(
                got[name].values[site], value, rtol=relative, atol=1e-14, err_msg=f"{name} {site}"
            )
            np.testing.assert_allclose(got[name].stderr[site], table.stderr[site], rtol=1e-6, atol=1e-12)


@pytest.fixture(scope="module")
def whole(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scores]:
    return survey(tmp_path_factory.mktemp("whole") / "run", bench)


@pytest.mark.parametrize("count", [2, 3, 8, 50])
def test_shards_change_no_score(count: int, bench: Path, whole: dict[str, Scores], tmp_path: Path) -> None:
    expect_equal(survey(tmp_path / "run", bench, How(shards=count)), whole)
    assert not list((tmp_path / "run" / ".state" / "survey").glob("parts"))


def test_a_survey_that_was_cut_off_goes_on_behind_what_is_kept(
    bench: Path, whole: dict[str, Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    usual = passes.tallied

    def counting(lab: Lab, *more: Any) -> Any:
        calls.append(lab.offset)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return usual(lab, *more)

    monkeypatch.setattr(passes, "tallied", counting)
    with pytest.raises(KeyboardInterrupt):
        survey(tmp_path / "run", bench, How(shards=4))
    assert not (tmp_path / "run" / "survey.parquet").exists()
    expect_equal(survey(tmp_path / "run", bench, How(shards=4)), whole)
    assert calls == [0, 2, 4, 4, 6]


def test_a_measure_more_costs_that_measure_alone(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = survey(tmp_path / "run", bench, names=["cosine", "leave-one-out"])
    asked: list[list[str]] = []
    usual = passes.tallied
    monkeypatch.setattr(passes, "tallied", lambda lab, m, *more: (asked.append(list(m)), usual(lab, m, *more))[1])
    both = survey(tmp_path / "run", bench, names=["cosine", "leave-one-out", "angular"])
    assert asked == [["angular"]]
    expect_equal({n: both[n] for n in first}, first)
    other = survey(tmp_path / "run", bench, names=["angular"])
    assert asked == [["angular"]]
    assert list(other) == ["angular"]


def test_a_shard_that_is_lost_is_an_error_that_names_it(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lamina.pipeline import cluster

    monkeypatch.setattr(cluster, "tallied_on_ray", lambda run, labs, todo, options, at: iter(()))
    with pytest.raises(LaminaError, match=r"shard 1 of 3 is lost.*the others are kept"):
        survey(tmp_path / "run", bench, How(shards=3, ray="auto"))
    assert not (tmp_path / "run" / "survey.parquet").exists()


def test_comparing_scores_every_part_and_one_more_seed(bench: Path, tmp_path: Path) -> None:
    found = survey(tmp_path / "run", bench, How(shards=4, compare=True))
    parts = pl.read_parquet(tmp_path / "run" / PARTS)
    texts = parts.filter(variation="text")
    assert sorted(texts["part"].unique()) == [0, 1, 2, 3]
    assert set(texts["measure"]) == set(NAMES)
    means = texts.filter(measure="cosine").group_by("site").agg(pl.col("value").mean())
    for site, value in means.iter_rows():
        assert value == pytest.approx(found["cosine"][site], rel=1e-9)
    seeds = parts.filter(variation="seed")
    assert set(seeds["measure"]) >= {"damage"}
    assert "cosine" not in set(seeds["measure"])
    by_part = [dict(seeds.filter(measure="damage", part=p).select("site", "value").iter_rows()) for p in (0, 1)]
    assert by_part[0] == {s: found["damage"][s] for s in by_part[0]}
    assert by_part[0] != by_part[1]


def test_two_surveys_at_once_in_one_folder(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = passes.tallied

    def meanwhile(lab: Lab, *more: Any) -> Any:
        with pytest.raises(InputError, match=r"another lamina is at work in this folder.*another --out"):
            survey(tmp_path / "run", bench, names=["angular"])
        return usual(lab, *more)

    monkeypatch.setattr(passes, "tallied", meanwhile)
    assert list(survey(tmp_path / "run", bench, names=["cosine"])) == ["cosine"]


@pytest.mark.parametrize("rows", [1, 3])
def test_few_sequences(rows: int, bench: Path, tmp_path: Path) -> None:
    found = survey(tmp_path / "run", bench, sequences=rows, names=("cosine", "angular", "damage"))
    errors = np.concatenate(list(found["cosine"].stderr.values()))
    assert np.isnan(errors).all() if rows == 1 else (errors > 0).all()


def test_a_sequence_of_one_token_is_refused(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sequences of one token predict nothing"):
        survey(tmp_path / "run", bench, length=1)


def test_uneven_batches_and_padding(bench: Path, tmp_path: Path) -> None:
    """Shards of a text of unequal rows: parts are those of the whole."""
    rows = [text(1, n, seed=n)[0] for n in (10, 4, 7, 12, 3)]
    model = tiny("llama")
    lab = Lab(model, padded(rows, 3, side="left"))
    measure = lamina.core.registry.MEASURES.make("cosine")
    one = passes.tallied(lab, {"c": measure})["c"].scores()
    several = [passes.tallied(part, {"c": measure})["c"] for part in shards(lab, 3)]
    merged = passes.merged(several).scores()
    for site, value in one.values.items():
        assert merged.values[site] == pytest.approx(value, rel=1e-5)
    assert [p.offset for p in shards(lab, 3)] == [0, 1, 3]


def test_weights_that_are_none_are_one_line(bench: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(LaminaError, match=r"block\.2: .*NaN or Inf"):
        verbs.survey(run_in(tmp_path / "run", bench, str(tmp_path / "broken")), ["cosine"])
    assert not (tmp_path / "run" / "survey.parquet").exists()


def test_a_token_that_makes_infinities_is_named_with_its_batch(bench: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    run = run_in(tmp_path / "run", bench)
    odd = int(run.tokens.calibration[6, 3])
    with torch.no_grad():
        model.model.embed_tokens.weight[odd] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(LaminaError, match=r"block\.\d: .*NaN or Inf"):
        verbs.survey(run_in(tmp_path / "other", bench, str(tmp_path / "broken")), ["cosine"])


def test_a_bfloat16_model(bench: Path, tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", bench)
    run.change(dtype="bfloat16")
    verbs.survey(run, ["cosine", "damage", "leave-one-out"])
    found = read_survey(tmp_path / "run" / "survey.parquet")
    assert all(math.isfinite(v[0]) for t in found.values() for v in t.values.values())


def test_a_model_of_any_kind_and_its_inputs_by_name(tmp_path: Path) -> None:
    """An image tower, its pictures in a safetensors file; what is not defined for it says why in the table."""
    model, _ = tiny_kinds.vit()
    model.save_pretrained(tmp_path / "vit")
    save_file({"pixel_values": torch.randn(6, 3, 16, 16)}, tmp_path / "pictures.safetensors")
    found = lamina.survey(
        str(tmp_path / "vit"),
        out=tmp_path / "run",
        measures=["cosine", "damage", "leave-one-out", "logit-lens"],
        dtype="float32",
        data={"calibration": str(tmp_path / "pictures.safetensors"), "sequences": 5},
    )
    assert set(found["cosine"].values) == {f"block.{n}{s}" for n in range(3) for s in ("", ".attention", ".mlp")}
    assert all(v[0] > 0 for v in found["leave-one-out"].values.values())
    table = pl.read_parquet(tmp_path / "run" / "survey.parquet")
    lens = table.filter(measure="logit-lens")
    assert lens["site"].to_list() == [""]
    assert "head" in lens["why"][0]
    assert table["tokens"].unique().to_list() == [5]


def test_inputs_that_do_not_fit_together(tmp_path: Path) -> None:
    model, _ = tiny_kinds.vit()
    model.save_pretrained(tmp_path / "vit")
    save_file({"pixel_values": torch.zeros(2, 3, 4, 4), "other": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="one row per sequence"):
        lamina.survey(
            str(tmp_path / "vit"), out=tmp_path / "run", data={"calibration": str(tmp_path / "odd.safetensors")}
        )


def test_no_shards() -> None:
    with pytest.raises(InputError, match="at least one shard, not 0"):
        How(shards=0)
