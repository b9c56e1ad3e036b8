"""Menus, frontiers and reasons of a run: priced once, kept in the folder, read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run

from lamina.core.documents import Budget, Plan
from lamina.core.menu import Menu, Solved
from lamina.lab.pricing import Pricing


@pytest.fixture
def priced(lamina: Any, bench: Path, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    words = ["survey", str(bench / "model"), "--out", str(run), "--measures", "cosine", "--text"]
    code, _, err = lamina(*words, str(bench / "calibration.txt"), "--sequences", "8", "--length", "16")
    assert code == 0, err
    code, _, err = lamina("plan", str(run), "--recipe", "mixed", "--bytes", "60%")
    assert code == 0, err
    return run


def test_a_second_plan_takes_the_menu_as_it_is(lamina: Any, priced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    menu = Menu.load(priced / "menu.json")
    assert {o.groups[0] for o in menu.options} == {f"block.{n}.{x}" for n in range(4) for x in ("attention", "mlp")}
    assert menu.passes > 0
    monkeypatch.setattr(Pricing, "price", lambda *_: pytest.fail("priced again"))
    code, out, err = lamina("plan", str(priced), "--bytes", "50%", "--kv", "0.6x@1k", "--frontier", "--explain")
    assert code == 0, err
    plan = Plan.load(priced / "plan.yaml")
    assert plan.expects["bytes"] <= 0.5 * menu.whole["bytes"] + 1
    assert plan.expects["kv_bytes"] <= 0.6 * menu.whole["kv_bytes"]
    solved = Solved.load(priced / "solved.json")
    assert len(solved.rises) >= 1
    assert plan.expects["loss"] == pytest.approx(sum(s.why["damage"] for s in plan.steps), abs=1e-5)
    assert "the cheapest plans for ever smaller budgets of bytes" in out
    assert "knee" in out
    assert "why each step" in out
    assert all(place in out for place, _ in solved.taken)
    assert (priced / "frontier.svg").read_text(encoding="utf-8").startswith("<svg")


def test_what_was_priced_on_another_text_is_priced_anew(lamina: Any, priced: Path) -> None:
    menu = Menu.load(priced / "menu.json")
    Menu(options=menu.options[:1], of="another").save(priced / "menu.json")
    code, _, err = lamina("plan", str(priced), "--bytes", "70%")
    assert code == 0, err
    assert len(Menu.load(priced / "menu.json").options) == len(menu.options)


def test_a_planner_without_a_menu_has_no_frontier(lamina: Any, bench: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["survey", str(bench / "model"), "--out", str(run), "--measures", "cosine", "--text"]
    assert lamina(*words, str(bench / "calibration.txt"), "--sequences", "4", "--length", "16")[0] == 0
    told = lamina("plan", str(run), "--recipe", "shortgpt", "--blocks", "1", "--frontier")
    tiny_run.refused(told, "no frontier", "--recipe", "mixed")
    told = lamina("plan", str(run), "--recipe", "shortgpt", "--keep", "75%", "--kv", "0.5x")
    tiny_run.refused(told, "several resources", "mixed")
    assert Budget(keep=0.5).limits[0].resource == "parameters"
