"""A run folder over its life: done once, changed, edited by hand, taken verb by verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

from lamina.core import registry
from lamina.core.documents import EvidenceFile, Plan, Receipts
from lamina.core.errors import ReloadError
from lamina.core.files import fingerprint

pytestmark = pytest.mark.usefixtures("quick")
TIMED = ("log.txt", "evidence.json", "report.html", ".state")


def dropped(run: Path) -> set[str]:
    found = Receipts.load(run / "receipts.json").receipts
    return {site for receipt in found if receipt.rewrite == "drop" for site in receipt.sites}


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every pass of a lab, of the anatomy or of a healer fails the test."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass was run")

    monkeypatch.setattr("lamina.lab.lab.Lab.forward", fail)
    monkeypatch.setattr("lamina.anatomy.anatomy.call", fail)
    monkeypatch.setattr("lamina.pipeline.verbs.rewritten", fail)


@pytest.fixture(scope="module")
def finished(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; copy it before changing it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.make_quick(patch)
        from lamina.cli import main

        with pytest.raises(SystemExit) as end:
            main(tiny_run.thin_command(bench, run, "--sublayers", "2", "--recipe", "llm-drop-joint"))
    assert end.value.code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run"))


# ---------------------------------------------------------------- once


@pytest.mark.parametrize("more", [(), ("--heal", "2", "--gguf")])
def test_a_finished_run_is_not_run_again(
    lamina: Any, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str]
) -> None:
    run = tmp_path / "run"
    command = tiny_run.thin_command(bench, run, "--keep", "80%", *more)
    assert lamina(*command)[0] == 0
    before = tiny_run.contents(run, "log.txt")
    no_work(monkeypatch)
    code, out, err = lamina(*command)
    assert (code, err) == (0, "")
    verbs = ["survey", "plan", "apply", *(["heal"] if more else []), "prove", *(["export"] if more else [])]
    assert [line for line in out.splitlines() if line.endswith("done already")] == [f"{v}: done already" for v in verbs]
    assert tiny_run.contents(run, "log.txt") == before
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert all(f"{v}: done already" in log for v in verbs)


def test_verb_by_verb_is_the_same_as_thin(lamina: Any, bench: Path, tmp_path: Path) -> None:
    from lamina.core.documents import Budget, Data, Heal, Recipe
    from lamina.pipeline import Run, apply, heal, plan, prove, survey

    short = Data(
        calibration=str(bench / "calibration.txt"), heldout=str(bench / "heldout.txt"), length=32, sequences=8,
        heldout_sequences=8,
    )  # fmt: skip
    asked = Recipe(model=str(bench / "model"), budget=Budget(keep=0.7), heal=Heal(steps=3), data=short, dtype="float32")
    command = tiny_run.thin_command(bench, tmp_path / "whole", "--keep", "70%", "--heal", "3")
    assert lamina(*command)[0] == 0
    Run.start(tmp_path / "parts", asked).begin()
    for verb in (survey, plan, apply, heal, prove):
        verb(Run.open(tmp_path / "parts"))
    whole, parts = (tiny_run.contents(tmp_path / name, *TIMED) for name in ("whole", "parts"))
    assert parts == whole


def test_the_commands_one_by_one(lamina: Any, bench: Path, tmp_path: Path) -> None:
    """survey, plan, apply, heal, prove, export and report, and `thin` with the same words, choose and do the same."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    text = ("--text", bench / "calibration.txt", "--length", 32, "--sequences", 8, "--dtype", "float32")
    code, out, _ = lamina("survey", bench / "model", "--out", run, *text)
    assert code == 0
    assert "block-influence" in out
    assert "lowest" in out
    code, out, _ = lamina("plan", run, "--sublayers", 2, "--recipe", "llm-drop-attention")
    assert code == 0
    assert "block." in out
    assert f"lamina apply {run}" in out
    for words in (["apply", run], ["heal", run, "--steps", 2], ["prove", run], ["report", run]):
        code, out, err = lamina(*words)
        assert (code, err) == (0, ""), words
    assert (run / "report.html").is_file()
    more = ("--sublayers", 2, "--recipe", "llm-drop-attention", "--heal", 2)
    assert lamina("thin", bench / "model", "--out", whole, *text, *more)[0] == 0
    for name in (
        "plan.yaml",
        "receipts.json",
        "survey.parquet",
        "recipe.yaml",
        "model/model.safetensors",
        "model/config.json",
    ):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_survey_by_chosen_measures_is_kept_by_the_plan(lamina: Any, bench: Path, tmp_path: Path) -> None:
    from lamina.pipeline.table import read_survey

    run = tmp_path / "run"
    text = ("--text", bench / "calibration.txt", "--length", 32, "--sequences", 4, "--dtype", "float32")
    assert lamina("survey", bench / "model", "--out", run, *text, "--measures", "cosine,leave-one-out")[0] == 0
    before = (run / "survey.parquet").read_bytes()
    code, out, _ = lamina("plan", run, "--blocks", 1, "--recipe", "leave-one-out-block")
    assert code == 0
    assert "survey: done already" in out
    assert (run / "survey.parquet").read_bytes() == before
    assert lamina("plan", run, "--blocks", 1, "--recipe", "shortgpt")[0] == 0  # not in it: surveyed anew
    assert "block-influence" in read_survey(run / "survey.parquet")


# ---------------------------------------------------------------- changed


def test_another_budget_plans_and_applies_anew(lamina: Any, run: Path) -> None:
    before = Plan.load(run / "plan.yaml")
    code, out, _ = lamina("plan", run, "--sublayers", 3)
    assert code == 0
    assert "survey: done already" in out
    assert Plan.load(run / "plan.yaml").budget.drop == 3
    assert set(Plan.load(run / "plan.yaml").sites()) > set(before.sites())
    tiny_run.refused(lamina("prove", run), "the plan was changed after it was applied", "lamina apply")
    assert lamina("apply", run)[0] == 0
    assert sum(1 if "." in site.removeprefix("block.") else 2 for site in dropped(run)) == 3
    assert Receipts.load(run / "receipts.json").plan == fingerprint(run / "plan.yaml")
    for stale in ("evidence.json", "report.html"):
        assert not (run / stale).exists(), "it describes the former model"
    assert lamina("prove", run)[0] == 0
    assert EvidenceFile.load(run / "evidence.json").get("expected_loss", "difference") is not None


def test_a_plan_edited_by_hand_is_kept_and_applied(lamina: Any, run: Path) -> None:
    data = yaml.safe_load((run / "plan.yaml").read_text(encoding="utf-8"))
    data["steps"] = [{"rewrite": "drop", "sites": ["block.2"]}]
    (run / "plan.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    edited = (run / "plan.yaml").read_bytes()
    code, out, _ = lamina("plan", run)
    assert code == 0
    assert "edited by hand" in out
    code, out, err = lamina("apply", run)
    assert (code, err) == (0, "")
    assert (run / "plan.yaml").read_bytes() == edited
    assert dropped(run) == {"block.2"}
    code, out, err = lamina("prove", run)
    assert (code, err) == (0, "")
    assert "expected loss" not in out, "the expectation was the planner's, for another plan"
    assert lamina("report", run)[0] == 0


def test_a_plan_without_reasons_and_expectations_is_enough(lamina: Any, run: Path) -> None:
    found = Plan.load(run / "plan.yaml").to_data()
    for key in ("expects", "recipe"):
        found.pop(key, None)
    found["steps"] = [{"rewrite": "drop", "sites": ["block.0.attention", "block.1"]}]
    (run / "plan.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    for verb in ("apply", "prove", "report"):
        code, _, err = lamina(verb, run)
        assert (code, err) == (0, "")
    assert dropped(run) == {"block.0.attention", "block.1"}


def test_another_recipe_in_the_folder_is_refused(lamina: Any, bench: Path, run: Path) -> None:
    before = tiny_run.contents(run)
    for more in (("--keep", "70%"), ("--sublayers", "2", "--recipe", "llm-drop-joint", "--seed", "1")):
        result = lamina(*tiny_run.thin_command(bench, run, *more))
        tiny_run.refused(result, "another recipe", "--out", f"lamina plan {run}")
    assert tiny_run.contents(run) == before


def test_a_recipe_that_came_to_nothing_does_not_stand_in_the_way(lamina: Any, bench: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for wrong in (("--keep", "70%", "--protect", "block.99"), ("--keep", "1%")):
        tiny_run.refused(lamina(*tiny_run.thin_command(bench, run, *wrong)))
        assert not (run / "plan.yaml").exists()
    assert lamina(*tiny_run.thin_command(bench, run, "--keep", "80%"))[0] == 0
    assert Plan.load(run / "plan.yaml").budget.keep == 0.8


def test_healing_begins_with_the_thinned_model_whatever_was_healed_before(
    lamina: Any, run: Path, tmp_path: Path
) -> None:
    import shutil

    other = Path(shutil.copytree(run, tmp_path / "other"))
    for steps in (3, 5):
        assert lamina("heal", run, "--steps", steps)[0] == 0
    assert lamina("heal", other, "--steps", 5)[0] == 0
    mine, due = (tiny_run.contents(f, *TIMED) for f in (run, other))
    assert mine == due
    assert Receipts.load(run / "receipts.json").healed["steps"] == 5
    assert "Healed: healer lora, steps 5" in (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "history" not in (run / "model" / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- published or not


def broken(*_: Any, **__: Any) -> None:
    raise ReloadError("the logits differ by 0.5 (at most 1e-06)", where="draft")


def test_a_contract_that_fails_publishes_nothing(
    lamina: Any, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    command = tiny_run.thin_command(bench, run, "--sublayers", "1")
    with monkeypatch.context() as patch:
        patch.setattr("lamina.evaluators.reload.contract", broken)
        tiny_run.refused(lamina(*command), "the logits differ by 0.5")
    assert (run / "plan.yaml").is_file()
    assert not {"model", "receipts.json", "evidence.json", "report.html"} & {p.name for p in run.iterdir()}
    assert tiny_run.left_behind(run) == []
    assert lamina(*command)[0] == 0


@pytest.mark.parametrize("verb", ["apply", "heal"])
def test_a_contract_that_fails_later_leaves_the_published_model(
    lamina: Any, run: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    if verb == "apply":
        assert lamina("plan", run, "--sublayers", 3)[0] == 0
    before = tiny_run.contents(run, "log.txt", "recipe.yaml", ".state")
    monkeypatch.setattr("lamina.evaluators.reload.contract", broken)
    more = ["--steps", 2] if verb == "heal" else []
    tiny_run.refused(lamina(verb, run, *more), "the logits differ by 0.5")
    assert tiny_run.contents(run, "log.txt", "recipe.yaml", ".state") == before


def test_a_failed_healing_does_not_leave_a_healed_model_in_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from lamina.core.documents import Heal
    from lamina.pipeline import Run, heal

    taken = Run.open(run)
    before = {k: v.clone() for k, v in taken.thinned.state_dict().items()}
    taken.change(heal=Heal(steps=2))
    monkeypatch.setattr("lamina.evaluators.reload.contract", broken)
    with pytest.raises(ReloadError):
        heal(taken)
    assert all(torch.equal(v, before[k]) for k, v in taken.thinned.state_dict().items())


def test_a_published_model_that_was_changed_by_hand_is_made_anew(lamina: Any, run: Path) -> None:
    before = (run / "model" / "config.json").read_bytes()
    (run / "model" / "config.json").write_bytes(before.replace(b"4", b"3"))
    code, out, _ = lamina("apply", run)
    assert code == 0
    assert "done already" not in out
    assert (run / "model" / "config.json").read_bytes() == before


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("name", registry.rows())
def test_every_recipe_runs(lamina: Any, bench: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    kinds, planner = registry.row(name).kinds, registry.PLANNERS.method(registry.row(name).planner)
    counts = "check_budget_is_met_and_not_overshot" not in getattr(planner, "known_failures", {})
    bits = registry.row(name).planner == "layerwise-bits"
    budget = ("--blocks", "1") if kinds == (registry.Kind.BLOCK,) else ("--sublayers", "2")
    budget = budget if counts else ("--bytes", "60%") if bits else ("--keep", "80%")
    kept = () if registry.Kind.CHANNEL in planner.card.on else ("--protect", "block.0")
    code, _, err = lamina(*tiny_run.thin_command(bench, run, *budget, "--recipe", name, *kept))
    if registry.PLANNERS.card(registry.row(name).planner).on == (registry.Kind.EXPERT,):
        tiny_run.refused((code, "", err), "expert" if name == "mc-smoe" else "scores nothing of this model")
        return
    assert (code, err) == (0, "")
    assert dropped(run) or not counts
    assert not any(site.startswith("block.0") for site in dropped(run))
    found = EvidenceFile.load(run / "evidence.json")
    ratio = found.get("parameters", "ratio")
    assert ratio is not None
    assert ratio.value < 1 or bits
    steps = {step.rewrite for step in Plan.load(run / "plan.yaml").steps}
    assert ("refit" in steps) == registry.row(name).refit
    assert name in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("word", "fits"), [("--refit", True), ("--no-refit", False)])
def test_refit_can_be_asked_for_and_forbidden(lamina: Any, bench: Path, tmp_path: Path, word: str, fits: bool) -> None:
    recipe = "shortgpt" if fits else "default"
    assert lamina(*tiny_run.thin_command(bench, tmp_path / "run", "--blocks", "1", "--recipe", recipe, word))[0] == 0
    steps = [step.rewrite for step in Plan.load(tmp_path / "run" / "plan.yaml").steps]
    assert ("refit" in steps) is fits


def test_a_budget_that_asks_for_nothing_changes_nothing(lamina: Any, bench: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = tmp_path / "run"
    code, _, err = lamina(*tiny_run.thin_command(bench, run, "--keep", "100%"))
    assert (code, err) == (0, "")
    assert dropped(run) == set()
    mine, dense = (load_file(f / "model.safetensors") for f in (run / "model", bench / "model"))
    assert all(dense[k].equal(v) for k, v in mine.items())
    assert lamina("apply", run)[0] == 0
