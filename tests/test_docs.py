"""The documentation: its snippets run, on a tiny model; its links resolve; the page of the command line is complete."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lamina import cli
from lamina.core import registry
from lamina.core.documents import Data
from lamina.lab.texts import Tokens, prepare
from lamina.testing import check_measure, tiny

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
MODEL = "smollm2-135m"
"""The model that the pages name; here, a folder of that name with a tiny one."""
BY_RUNS = frozenset({"docs/images/report.png", "benchmarks/RESULTS.md"})
"""Written by real runs, so that a page may link to them before they are there."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def snippets(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `lamina …` line of a page's shell blocks."""
    lines = [line for body in snippets(page, "sh") for line in body.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("lamina ")]


def byte_tokenizer() -> Any:
    """Byte-level BPE with two merges, so that a GGUF file can hold it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{c: n + 1 for n, c in enumerate(letters)}}
    vocabulary |= {"th": len(vocabulary), "the": len(vocabulary) + 1}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder where the name of the pages' model means a tiny model, ten blocks deep, and texts are short."""
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=10, **ids).save_pretrained(tmp_path / MODEL)  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / MODEL)
    monkeypatch.setattr("lamina.lab.load.shelf", dict)
    monkeypatch.setattr("lamina.lab.texts.prepare", short)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def short(data: Data, tokenizer: Any, *, seed: int = 0) -> Tokens:
    """Four sequences of 64 tokens for each split."""
    return prepare(replace(data, sequences=4, heldout_sequences=4, length=64), tokenizer, seed=seed)


@pytest.fixture
def quick(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same without the reload check, which starts a process: the tutorial's commands have it."""
    monkeypatch.setattr("lamina.evaluators.reload.contract", lambda *_: ())
    return workplace


def run_commands(page: Path) -> None:
    for arguments in commands(page):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0, arguments


def run_python(page: Path, *, without: str = "@measure") -> int:
    """Run a page's Python blocks one after the other in one namespace; says how many there were."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    found = [body for body in snippets(page, "python") if without not in body]
    for number, body in enumerate(found):
        exec(compile(body, f"{page.name}, block {number}", "exec"), namespace)
    return len(found)


def test_readme_commands(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_commands(README)
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "men2024shortgpt" in printed
    wanted = re.findall(r"^\| `([\w./]+)`", README.read_text(encoding="utf-8"), re.MULTILINE)
    made = {p.relative_to(quick / "run").as_posix() for p in (quick / "run").iterdir()}
    assert {w.rstrip("/") for w in wanted} - {"model.gguf", "log.txt"} <= made, (wanted, made)
    assert (quick / "small.gguf").is_file()


def test_readme_python(quick: Path) -> None:
    assert run_python(README) == 1
    assert (quick / "run-py" / "report.html").is_file()


def test_tutorial_commands(workplace: Path) -> None:
    run_commands(ROOT / "docs" / "tutorial.md")
    for name in ("plan.yaml", "receipts.json", "evidence.json", "report.html", "model/model.safetensors"):
        assert (workplace / "run" / name).is_file(), name


def test_tutorial_python(quick: Path) -> None:
    assert run_python(ROOT / "docs" / "tutorial.md") == 2
    assert (quick / "run2" / "evidence.json").is_file()


def test_rewrites_page(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "rewrites.md"
    assert run_python(page) == 1
    assert "narrow 43488 -> 43200" in capsys.readouterr().out
    assert named_in(page) == set(registry.REWRITES)


def test_plans_page(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "plans.md"
    run_commands(page)
    assert (quick / "mixed" / "report.html").is_file()
    assert (quick / "mixed" / "frontier.svg").is_file()
    assert "why each step" in capsys.readouterr().out
    told = {name for name in named_in(page) if not name.startswith("--")}
    assert told <= set(registry.rows())


def named_in(page: Path) -> set[str]:
    """The names in code in the first cells of a page's tables."""
    rows = re.findall(r"^\| (`.*?) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for row in rows for name in row.split("`")[1::2]}


@pytest.mark.slow
def test_survey_page(workplace: Path) -> None:
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    ViTModel(ViTConfig(image_size=16, patch_size=4, **small)).save_pretrained(workplace / "dinov2-small")
    save_file({"pixel_values": torch.randn(5, 3, 16, 16)}, workplace / "pictures.safetensors")
    shutil.copytree(workplace / MODEL, workplace / "big-model")
    page = ROOT / "docs" / "survey.md"
    scratch = workplace / "scratch"
    scratch.mkdir()
    for arguments in commands(page):
        asked = [str(scratch) if a == "/var/tmp" else a for a in arguments]
        out = ["--out", f"run-{len(list(workplace.iterdir()))}"] if asked[1] != MODEL else []
        with pytest.raises(SystemExit) as end:
            cli.main([*asked, *out])
        assert end.value.code == 0, arguments
    assert list(scratch.iterdir()) == []
    assert run_python(page) == 1
    assert {"heat.svg", "truth.svg"} <= {p.name for p in workplace.iterdir()}


def test_adding_a_method_python() -> None:
    assert run_python(ROOT / "docs" / "adding-a-method.md") == 1


@pytest.fixture
def paper(tmp_path: Path) -> Iterator[ModuleType]:
    """The README's paper as a module; the registry is as it was afterwards."""
    (text,) = [body for body in snippets(README, "python") if "@measure" in body]
    path = tmp_path / "weight_subcloning.py"
    path.write_text(text, encoding="utf-8")
    registry.discover()
    classes, rows = dict(registry.MEASURES._classes), dict(registry._ROWS)
    spec = importlib.util.spec_from_file_location("weight_subcloning", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["weight_subcloning"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["weight_subcloning"]
        registry.MEASURES._classes.clear()
        registry.MEASURES._classes.update(classes)
        registry._ROWS.clear()
        registry._ROWS.update(rows)


def test_readme_paper_keeps_the_conformance_suite(paper: ModuleType) -> None:
    check_measure(paper.AddedShare)
    assert registry.row("subcloning").measure == "added-share"
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    dead = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        place = (page.parent / target.partition("#")[0]).resolve()
        if not place.exists() and place.relative_to(ROOT).as_posix() not in BY_RUNS:
            dead.append(target)
    assert not dead


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:", target)
    }
    alone = [p for p in PAGES if p != README and p.parent.name != "decisions" and p.resolve() not in linked]
    assert not alone


def options() -> dict[str, set[str]]:
    """Command → its long options."""
    from typer.main import get_command

    group: Any = get_command(cli.app)
    return {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")} - {"--help"}
        for name, command in group.commands.items()
    }


def test_the_page_of_the_command_line_is_complete() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    known = options()
    assert [n for n in known if f"`lamina {n}" not in text] == []
    every = set().union(*known.values())
    told = set(re.findall(r"--[a-z][a-z-]+", text))
    assert every - told == set()
    assert told - every == set()


def test_options_on_other_pages_exist() -> None:
    every = set().union(*options().values()) | {"--index-url", "--no-deps"}
    for page in PAGES:
        told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
        assert told - every == set(), page.name
