"""The page: what it says, what it leaves out, and that nothing gets in or out of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lamina.core.documents import Budget, EvidenceFile, ModelRef, Plan, Receipts, Recipe, Step
from lamina.core.errors import InputError
from lamina.report import write
from lamina.report.page import MISSING


class Reader(HTMLParser):
    """All start tags, and the text outside style and script."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.unbalanced: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_verdict_has_numbers_and_intervals(run_folder: Path) -> None:
    text = read(write(run_folder)).text
    assert "25.7 % of parameters gone; perplexity 20.2 → 31.0 (×1.53, 95 % 1.48–1.59)" in text
    assert "prefill ×1.31 (1.28–1.34), decode ×1.22 (1.17–1.27)" in text
    assert "Asked: keep 75 % of the parameters." in text
    assert "No speed-up" not in text
    assert "134.5 M" in text
    assert "269 MB" in text
    assert "predicted +0.391 nats per token and +0.427 was measured" in text


def test_well_formed_and_complete(run_folder: Path) -> None:
    page = read(write(run_folder))
    assert page.unbalanced == []
    assert page.open == []
    sections = ("Blocks and scores", "Cost before and after", "Evidence", "The plan", "Reload contract", "Methods")
    for words in (*sections, "Run it again"):
        assert words in page.text
    for line in MISSING.values():
        assert line not in page.text
    assert all("aria-label" in a or a.get("aria-hidden") == "true" for tag, a in page.tags if tag == "svg")


def test_no_speed_up_is_said(make_run: Callable[..., Path]) -> None:
    text = read(write(make_run(slow=True))).text
    assert "No speed-up was shown: prefill ×0.99 (95 % 0.95–1.04)" in text
    assert "decode ×0.94 (95 % 0.91–0.97), slower than dense" in text


def test_one_slow_speed_is_named(run_folder: Path) -> None:
    path = run_folder / "evidence.json"
    file = EvidenceFile.load(path)
    kept = tuple(e for e in file.evidence if not (e.name == "decode" and e.of == "ratio"))
    slow = next(e for e in file.evidence if e.name == "decode" and e.of == "ratio")
    worse = type(slow)(name="decode", of="ratio", value=1.02, low=0.99, high=1.06, n=5)
    EvidenceFile(evidence=(*kept, worse)).save(path)
    text = read(write(run_folder)).text
    assert "No speed-up was shown for one of the two: decode ×1.02 (95 % 0.99–1.06)" in text


def test_every_dropped_site_is_marked(run_folder: Path) -> None:
    page = read(write(run_folder))
    plan = Plan.load(run_folder / "plan.yaml")
    cells = {a["data-site"]: a["class"] for tag, a in page.tags if tag == "g" and "data-site" in a}
    dropped = {site for site, class_ in cells.items() if "dropped" in class_ and site.count(".") == 2}
    assert dropped == set(plan.sites())
    assert "dropped" in cells[plan.steps[0].sites[0].rsplit(".", 1)[0]]  # a block of which nothing is left
    assert "protected" in cells["block.0.attention"]
    assert "protected" in cells["block.29.mlp"]


@pytest.mark.parametrize("depth", [12, 80])
def test_other_depths(make_run: Callable[..., Path], depth: int) -> None:
    page = read(write(make_run(depth=depth, healed=True)))
    cells = {a["data-site"] for tag, a in page.tags if tag == "g" and "data-site" in a}
    assert {f"block.{b}.{kind}" for b in range(depth) for kind in ("attention", "mlp")} <= cells
    assert "Loss while healing" in page.text
    assert "rank" in page.text


def policy_of(page: Reader) -> str:
    return next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")


def test_nothing_is_fetched(run_folder: Path) -> None:
    path = write(run_folder)
    html = path.read_text(encoding="utf-8")
    page = read(path)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "image", "use")
        assert "src" not in attributes
        assert not any(key.startswith("on") for key in attributes)
        if "href" in attributes:
            assert tag == "a"
            assert attributes["href"].startswith("https://arxiv.org/abs/")
    assert "@import" not in html
    assert "url(" not in html
    assert "@font-face" not in html
    assert "default-src 'none'" in policy_of(page)


def test_only_the_page_s_own_script_may_run(run_folder: Path) -> None:
    page = read(write(run_folder))
    kinds = [a.get("type", "") for tag, a in page.tags if tag == "script"]
    assert kinds == ["application/json", ""]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy_of(page)
    assert not re.search(
        r"fetch\(|XMLHttpRequest|WebSocket|EventSource|import\(|eval\(|https?://(?!www.w3.org)", page.scripts[1]
    )


def test_user_text_is_escaped(make_run: Callable[..., Path]) -> None:
    bad = "<script>alert(1)</script>\"'&<!--"
    folder = make_run(name=bad)
    file = EvidenceFile.load(folder / "evidence.json")
    EvidenceFile(evidence=file.evidence, notes=(bad,)).save(folder / "evidence.json")
    plan = Plan.load(folder / "plan.yaml")
    odd = Step(rewrite=bad, sites=(f"block.3.{bad}",), options={bad: bad}, why={bad: 1.0})
    other = ModelRef(name=bad, fingerprint=plan.model.fingerprint)
    Plan(model=other, budget=Budget(keep=0.5, protect=(bad,)), recipe=bad, steps=(odd,)).save(folder / "plan.yaml")
    path = write(folder)
    page = read(path)
    assert path.read_text(encoding="utf-8").lower().count("<script") == 2
    assert "<!--" not in path.read_text(encoding="utf-8")
    assert page.unbalanced == []
    assert page.open == []
    assert bad in page.text
    assert bad in json.loads(page.scripts[0])["head"]["recipe"].encode().decode("unicode_escape")


def test_a_paper_may_not_run_script(make_run: Callable[..., Path]) -> None:
    html = write(make_run(healed=True)).read_text(encoding="utf-8")
    assert 'href="javascript' not in html
    assert "Low-Rank Updates" in html


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("survey.parquet", MISSING["survey"]),
        ("plan.yaml", MISSING["plan"]),
        ("receipts.json", MISSING["receipts"]),
        ("evidence.json", MISSING["evidence"]),
        ("recipe.yaml", ""),
    ],
)
def test_what_is_missing_is_said(run_folder: Path, name: str, line: str) -> None:
    (run_folder / name).unlink()
    page = read(write(run_folder))
    assert line in page.text
    assert page.unbalanced == []
    assert page.open == []


@pytest.mark.parametrize("name", ["survey.parquet", "plan.yaml", "receipts.json", "evidence.json", "recipe.yaml"])
def test_one_file_is_enough(run_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / name).write_bytes((run_folder / name).read_bytes())
    text = read(write(folder)).text
    lines = [line for key, line in MISSING.items() if not name.startswith(key)]
    assert all(line in text for line in lines)
    assert "nothing was published" in text


def test_empty_documents(tmp_path: Path) -> None:
    reference = ModelRef(name="m", fingerprint="sha256:0")
    budget = Budget(metric="blocks", drop=0)
    Recipe(model="m", budget=budget).save(tmp_path / "recipe.yaml")
    Plan(model=reference, budget=budget, steps=()).save(tmp_path / "plan.yaml")
    Receipts(model=reference, plan="sha256:0", receipts=()).save(tmp_path / "receipts.json")
    EvidenceFile(evidence=()).save(tmp_path / "evidence.json")
    text = read(write(tmp_path)).text
    assert "The plan changes nothing" in text
    assert "not measured yet" in text
    assert "is not known to this installation" in text


def test_same_folder_same_bytes(run_folder: Path) -> None:
    path = write(run_folder)
    assert path == run_folder / "report.html"
    first = path.read_bytes()
    assert write(run_folder).read_bytes() == first
    assert sorted(p.name for p in run_folder.iterdir() if p.name.startswith(".")) == []


def test_bad_folders(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a run folder"):
        write(tmp_path / "run" / "model")
    (run_folder / "survey.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        write(run_folder)
    assert not (run_folder / "report.html").exists()


def test_cites_and_warns_of_status(run_folder: Path) -> None:
    text = read(write(run_folder)).text
    assert "Jane Doe et al. (2024). What the Layers Do: Redundancy & Depth. arXiv:2406.15786." in text
    assert "experimental" in text
    assert "stable" in text
    assert "Deviates from the paper: labels are drawn from the model" in text
    assert text.count("@article{doe2024layers") == 1


def test_the_contract_is_judged_by_its_tolerance(run_folder: Path) -> None:
    file = EvidenceFile.load(run_folder / "evidence.json")
    made = [e for e in file.evidence if e.of == "contract"]
    worse = type(made[1])(name="reload_cache", of="contract", value=0.1, high=1e-3)
    bare = type(made[1])(name="reload_padding", of="contract", value=0.1)
    EvidenceFile(evidence=(made[0], worse, bare, made[3])).save(run_folder / "evidence.json")
    text = read(write(run_folder)).text
    assert re.search("Passed ?Logits after reload", text)
    assert re.search("Failed ?Cached decoding", text)
    assert re.search("Measured ?A left-padded", text)
    assert re.search("Passed ?generate", text)


@pytest.mark.parametrize("discover", ["", "registry.discover = lambda: None;"], ids=["all", "report-alone"])
def test_never_imports_torch(run_folder: Path, discover: str) -> None:
    code = (
        "import sys; from pathlib import Path; from lamina.core import registry;"
        + discover
        + "from lamina.report import write; write(Path(sys.argv[1]));"
        "print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lamina.report import write; print(sorted({'jinja2', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_of_bits_alone_is_told_by_its_bytes(run_folder: Path) -> None:
    path = run_folder / "receipts.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    whole = data["receipts"][0]["before"]["parameters"]
    for receipt in data["receipts"]:
        receipt["after"]["parameters"] = receipt["before"]["parameters"] = whole
    path.write_text(json.dumps(data), encoding="utf-8")
    text = read(write(run_folder)).text
    assert "of parameters gone" not in text
    assert re.search(r"\d % of the bytes gone; perplexity", text)
