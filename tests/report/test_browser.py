"""The page in a browser: choosing by mouse and keyboard, the slider, the plan that comes out, colours, print, size."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import polars as pl
import pytest
import tiny_run
from browser import Opened

from lamina.core.documents import Plan, Receipts
from lamina.core.menu import Menu, Times
from lamina.report import write
from lamina.report.numbers import count

pytestmark = pytest.mark.slow
READY = "html[data-ready]"
SHA = "sha256:" + "ab" * 32


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser.chromium() as made:
        yield made


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's run with a menu, and its page."""
    from lamina.cli import main

    bench = tiny_run.make_bench(tmp_path_factory.mktemp("bench"))
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.make_quick(patch)
        with pytest.raises(SystemExit) as end:
            main(tiny_run.thin_command(bench, bench / "run", "--bytes", "70%", "--recipe", "mixed"))
    assert end.value.code == 0
    return bench / "run"


@pytest.fixture
def known_methods() -> None:
    """The whole registry, unlike in the other tests of this folder."""


@pytest.fixture
def opened(chrome: Any, mixed: Path) -> Iterator[Opened]:
    with Opened(chrome, mixed / "report.html", accept_downloads=True) as made:
        made.page.wait_for_selector(READY)
        yield made
        assert made.said == []
        assert [a for a in made.asked if not a.startswith(("file:", "blob:"))] == []


def cell(opened: Opened, words: str) -> Any:
    return opened.page.locator(f'[role=gridcell][aria-label^="{words}:"]')


def damage(opened: Opened) -> float:
    told = opened.page.locator("#ex-totals tr td.strong").first.inner_text()
    return float(told.split("\N{NO-BREAK SPACE}")[0].replace("\N{MINUS SIGN}", "-"))


def yaml_of(opened: Opened) -> str:
    """The plan file that the page shows."""
    opened.page.evaluate("document.getElementById('ex-yaml').open = true")
    opened.until(lambda: bool(opened.page.locator("#ex-yaml-text").text_content()))
    return opened.page.locator("#ex-yaml-text").text_content()


def test_it_opens_on_the_run_s_plan(opened: Opened, mixed: Path) -> None:
    plan = Plan.load(mixed / "plan.yaml")
    loss = sum(s.why["damage"] for s in plan.steps)
    assert damage(opened) == pytest.approx(loss, rel=0.01)
    touched = opened.page.locator("[role=gridcell].change, [role=gridcell].drop").count()
    assert touched == len({".".join(s.sites[0].split(".")[:3]) for s in plan.steps})
    assert opened.page.locator("[role=gridcell].differs").count() == 0
    assert opened.page.locator("#ex-reset").is_disabled()


def test_a_click_drops_and_a_second_one_keeps(opened: Opened, mixed: Path) -> None:
    opened.page.click("#ex-none")
    assert damage(opened) == 0
    one = cell(opened, "block 2 mlp")
    one.click()
    drop = next(o for o in Menu.load(mixed / "menu.json").options if o.groups == ("block.2.mlp",) and o.name == "drop")
    assert "dropped" in one.get_attribute("aria-label")
    assert damage(opened) > 0
    row = opened.page.locator("#ex-totals tr", has_text="parameters").inner_text()
    assert count(56_352 - drop.saves["parameters"]) in row
    one.click()
    assert "kept" in one.get_attribute("aria-label")
    assert damage(opened) == 0
    opened.page.click("#ex-undo")
    assert "dropped" in one.get_attribute("aria-label")


def test_any_option_can_be_taken(opened: Opened) -> None:
    cell(opened, "block 1 mlp").click()
    assert opened.text("ex-site-name") == "block 1 mlp"
    opened.page.locator("#ex-options label", has_text="narrow to").first.locator("input").check()
    assert "narrow to" in cell(opened, "block 1 mlp").get_attribute("aria-label")
    assert opened.page.locator("[role=gridcell].differs").count() >= 1
    assert "narrow to" in " ".join(opened.page.locator("#ex-options label:has(input:checked)").all_inner_texts())


def test_the_keyboard_does_all_of_it(opened: Opened) -> None:
    page = opened.page
    assert page.locator("[role=gridcell][tabindex='0']").count() == 1
    page.locator("[role=gridcell][tabindex='0']").focus()
    page.click("#ex-none")
    page.locator("[role=gridcell][tabindex='0']").focus()
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused).startswith("block 0 attention")
    for key, place in (
        ("ArrowRight", "block 1 attention"),
        ("ArrowDown", "block 1 mlp"),
        ("ArrowUp", "block 1 attention"),
    ):
        page.keyboard.press(key)
        assert page.evaluate(focused).startswith(place)
    page.keyboard.press("Enter")
    assert "dropped" in page.evaluate(focused)
    page.keyboard.press("Space")
    assert "kept" in page.evaluate(focused)
    page.keyboard.press("n")
    first = page.evaluate(focused)
    page.keyboard.press("n")
    assert page.evaluate(focused) != first
    page.keyboard.press("p")
    assert page.evaluate(focused) == first
    page.keyboard.press("End")
    assert page.evaluate(focused).startswith("block 3 attention"), "the last of four blocks"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert "all of it dropped" in page.evaluate(focused)
    opened.until(lambda: "all of it dropped" in opened.text("ex-live"))
    assert "Predicted damage" in opened.text("ex-live")
    page.keyboard.press("Control+z")
    assert "kept" in page.evaluate(focused)


def test_the_slider_chooses_anew_within_the_budget(opened: Opened) -> None:
    page = opened.page
    cell(opened, "block 0 attention").click()
    before = cell(opened, "block 0 attention").get_attribute("aria-label")
    page.locator("#ex-hold").check()
    seen = []
    for share in (900, 600, 450):
        page.locator("#ex-keep").fill(str(share))
        opened.until(lambda told=f"at most {share / 10:.1f}": opened.text("ex-kept").startswith(told))
        kept = float(opened.text("ex-kept").split(": ")[1].split(" %")[0])
        assert kept <= share / 10 + 0.05
        assert "predicted to cost less" in opened.text("ex-bound") or "not proven the cheapest: at most" in opened.text(
            "ex-bound"
        )
        seen.append(damage(opened))
        assert cell(opened, "block 0 attention").get_attribute("aria-label").split(", ")[1] == before.split(", ")[1]
    assert seen == sorted(seen)
    assert page.locator("#ex-frontier .ex-now").get_attribute("cx") is not None


def test_the_page_s_choice_is_applied_by_the_command(
    opened: Opened, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, run = opened.page, tmp_path / "run"
    shutil.copytree(mixed, run)
    page.locator("#ex-keep").fill("600")
    opened.until(lambda: opened.text("ex-kept").startswith("at most 60.0"))
    cell(opened, "block 1 attention").click()
    page.evaluate("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
    page.click("#ex-copy")
    copied = page.evaluate("window.copied")
    with page.expect_download() as loading:
        page.click("#ex-download")
    assert loading.value.suggested_filename == "plan.yaml"
    loading.value.save_as(run / "plan.yaml")
    assert (run / "plan.yaml").read_text(encoding="utf-8") == copied == yaml_of(opened)
    plan, menu = Plan.load(run / "plan.yaml"), Menu.load(run / "menu.json")
    known = {(s.rewrite, s.sites, json.dumps(s.options)) for o in menu.options for s in o.steps}
    assert {(s.rewrite, s.sites, json.dumps(s.options)) for s in plan.steps} <= known
    before = Receipts.load(run / "receipts.json")
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.make_quick(patch)
        code, _, err = tiny_run.caller(capsys)("apply", run)
    assert code == 0, err
    done = Receipts.load(run / "receipts.json")
    assert done.plan != before.plan
    assert {s.rewrite for s in plan.steps} == {r.rewrite for r in done.receipts}
    assert done.receipts[-1].after.parameters == plan.expects["parameters"]
    assert done.receipts[-1].after.kv_bytes == plan.expects["kv_bytes"]


def test_a_timed_work_is_shown_as_speed(chrome: Any, mixed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("menu.json", "survey.parquet", "recipe.yaml"):
        shutil.copy(mixed / name, run)
    places = dict.fromkeys({g for o in Menu.load(run / "menu.json").options for g in o.groups}, 0.001)
    table = Times(of=Menu.load(run / "menu.json").of, work="decode:1x32", total=0.010, sites=places)
    table.save(run / Times.name("latency@decode:1x32"))
    with Opened(chrome, write(run)) as opened:
        opened.page.wait_for_selector(READY)
        speed = opened.page.locator("#ex-totals tr", has_text="speed of decode:1x32").locator("td.strong")
        assert speed.inner_text() == "×1.00"
        cell(opened, "block 1 mlp").click()
        cell(opened, "block 2 mlp").click()
        assert speed.inner_text() == "×1.25"
        assert "options the latency of decode:1x32 is not known" in opened.text("explorer")
        assert opened.said == []


def test_both_colours_and_print(chrome: Any, mixed: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        with Opened(chrome, mixed / "report.html", color_scheme=scheme) as opened:
            page = opened.page
            page.wait_for_selector(READY)
            paper = "getComputedStyle(document.body).backgroundColor"
            seen[scheme] = page.evaluate(paper)
            page.click("#theme")
            assert page.evaluate(paper) != seen[scheme], "the button switches"
            page.emulate_media(media="print")
            assert (
                page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") == "#fff"
            )
            assert not page.locator("#ex-keep").is_visible()
            assert page.locator("#ex-totals").is_visible()
            assert page.pdf().startswith(b"%PDF")
            assert opened.said == []
    assert seen["light"] != seen["dark"]


def test_a_phone_s_width_does_not_scroll_sideways(chrome: Any, mixed: Path) -> None:
    with Opened(chrome, mixed / "report.html", viewport={"width": 390, "height": 800}) as opened:
        opened.page.wait_for_selector(READY)
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390


def large(folder: Path, depth: int = 126, heads: int = 128) -> Path:
    """A survey of 126 blocks with 128 heads each, by two measures, and the damage of all sublayers."""
    draw, rows = random.Random(0), []
    rest = {"span": 1, "stderr": None, "tokens": 1, "seed": 0, "fingerprint": SHA}

    def row(site: str, kind: str, block: int, unit: int, measure: str) -> None:
        cost = {"parameters": 6e8, "bytes": 12e8, "macs": 6e8, "kv_bytes": 4096 if kind == "attention" else 0}
        value = draw.lognormvariate(-3, 1)
        scale = "nats" if measure == "damage" else ""
        rows.append({"site": site, "kind": kind, "block": block, "unit": unit, "measure": measure, "value": value,
                     "scale": scale, **{k: int(v) for k, v in cost.items()}, **rest})  # fmt: skip

    for block in range(depth):
        for kind in ("attention", "mlp"):
            for measure in ("damage", "cosine"):
                row(f"block.{block}.{kind}", kind, block, 0, measure)
        for measure in ("energy", "taylor"):
            for head in range(heads):
                row(f"block.{block}.attention.head", "head", block, head, measure)
    folder.mkdir()
    pl.DataFrame(rows).write_parquet(folder / "survey.parquet")
    return write(folder)


def test_a_very_large_model_stays_light(chrome: Any, tmp_path: Path) -> None:
    path = large(tmp_path / "run")
    assert path.stat().st_size < 3_000_000
    count = "document.querySelectorAll('*').length"
    with Opened(chrome, path) as opened:
        page = opened.page
        page.wait_for_selector(READY)
        assert page.locator("[role=gridcell]").count() == 3 * 126
        inside = page.evaluate("document.querySelectorAll('#explorer *').length")
        assert inside < 1500
        assert page.evaluate(count) < 15_000
        before = page.evaluate(count)
        page.select_option("#ex-inside", "0")
        assert page.evaluate("document.getElementById('ex-units').width") >= 2 * 126
        page.locator("#ex-units").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert opened.text("ex-unit-words").startswith("block 1 attention, head 1: ")
        took = page.evaluate(
            "() => { const began = performance.now(); document.querySelectorAll('[data-n]')[200].click();"
            " document.body.offsetHeight; return performance.now() - began; }"
        )
        page.locator("#ex-keep").fill("500")
        opened.until(lambda: opened.text("ex-kept").startswith("at most 50.0"))
        assert page.evaluate(count) - before < 100, "neither 16128 heads nor a choice make many elements"
        paint = page.evaluate("performance.getEntriesByType('paint')[0].startTime")
        ready = page.evaluate("performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart")
        print(f"first paint {paint:.0f} ms, ready {ready} ms, a click {took:.1f} ms")
        assert opened.said == []


@pytest.mark.parametrize("lost", ["plan.yaml", "recipe.yaml", "survey.parquet", "evidence.json", "receipts.json"])
def test_partial_folders_raise_no_error(chrome: Any, make_run: Callable[..., Path], lost: str) -> None:
    folder = make_run(depth=12)
    (folder / lost).unlink()
    with Opened(chrome, write(folder)) as opened:
        opened.page.wait_for_selector("#theme:not([hidden])")
        if lost != "survey.parquet":
            opened.page.wait_for_selector(READY)
            opened.page.locator("[role=gridcell]").nth(5).click()
            assert yaml_of(opened).startswith("lamina: 1")
        assert opened.said == []
