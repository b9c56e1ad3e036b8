"""The documentation: its snippets run, on a tiny model; its links resolve; the page of the command line is complete."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from snippets import Block, Runner, blocks, complaints
from tiny_run import make_quick, make_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lamina import cli
from lamina.core import registry
from lamina.core.documents import Data
from lamina.evaluators.tasks._item import _TASKS, tasks
from lamina.lab.texts import Tokens, prepare
from lamina.testing import check_measure, tiny

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
MODEL = "smollm2-135m"
"""The model that the pages name; here, a folder of that name with a tiny one."""
BY_RUNS = frozenset({"docs/images/report.png", "benchmarks/RESULTS.md"})
"""Written by real runs, so that a page may link to them before they are there."""
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SNIPPETS = [page for page in PAGES if any(block.runs for block in blocks(page))]
QUICK = [page for page in SNIPPETS if any(block.runs and not block.slow for block in blocks(page))]
FEWER = {"--steps 20": "--steps 2", "--decode 8 --rounds 3": "--decode 4 --rounds 2 --length 16 --engine transformers"}
"""What takes long on tiny models too, and is as well said in fewer steps."""
SLOW = [page for page in SNIPPETS if any(block.slow for block in blocks(page))]


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
    """Three sequences of 32 tokens for each split."""
    return prepare(replace(data, sequences=3, heldout_sequences=3, length=32), tokenizer, seed=seed)


@pytest.fixture
def registered() -> Iterator[None]:
    """Methods that snippets register are gone again afterwards."""
    registry.discover()
    tasks()
    entered = (registry.MEASURES._classes, registry._ROWS, _TASKS)
    before, modules = [dict(names) for names in entered], set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - modules:
            if getattr(sys.modules[name], "__snippet__", False):
                del sys.modules[name]
        for names, old in zip(entered, before, strict=True):
            names.clear()
            names.update(old)


def run_page(page: Path, *, slow: bool) -> list[Block]:
    """Run a page's snippets in order in the working folder, which must hold what they name; says which were run."""

    def command(arguments: Sequence[str]) -> None:
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        assert end.value.code == 0, arguments

    here = str(Path.cwd())
    runner = Runner(command=command, replace={"/var/tmp": f"{here}/scratch", "/shared": here, **FEWER})
    for block in blocks(page):
        if slow or not block.slow:
            runner.run(block)
    return runner.ran


@pytest.fixture
def furnished(workplace: Path) -> Path:
    """The workplace with the other things that pages name: texts, a model of images, folders."""
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    ViTModel(ViTConfig(image_size=16, patch_size=4, **small)).save_pretrained(workplace / "dinov2-small")
    save_file({"pixel_values": torch.randn(5, 3, 16, 16)}, workplace / "pictures.safetensors")
    shutil.copytree(workplace / MODEL, workplace / "big-model")
    (workplace / "scratch").mkdir()
    (workplace / "notes").mkdir()
    make_text(workplace / "notes" / "one.txt", 1)
    letters = [json.dumps({"body": " ".join(["the cold river", str(n)] * 20)}) for n in range(8)]
    (workplace / "letters.jsonl").write_text("\n".join(letters) + "\n", encoding="utf-8")
    return workplace


def after(page: Path, folder: Path, printed: str, *, slow: bool = False) -> None:
    """What a page's snippets must have left behind, or said."""
    name = page.relative_to(ROOT).as_posix()
    assert "Traceback" not in printed
    if name == "README.md":
        wanted = re.findall(r"^\| `([\w./]+)`", page.read_text(encoding="utf-8"), re.MULTILINE)
        made = {p.relative_to(folder / "run").as_posix() for p in (folder / "run").iterdir()}
        assert {w.rstrip("/") for w in wanted} - {"model.gguf", "log.txt"} <= made, (wanted, made)
        assert (folder / "small.gguf").is_file()
        assert (folder / "run-py" / "report.html").is_file()
        assert "perplexity" in printed
        assert "men2024shortgpt" in printed
        assert registry.row("subcloning").measure == "added-share"
        check_measure(registry.MEASURES.method("added-share"))
    elif name == "docs/tutorial.md":
        for file in ("plan.yaml", "receipts.json", "evidence.json", "report.html", "model/model.safetensors"):
            assert (folder / "run" / file).is_file(), file
        assert (folder / "run2" / "evidence.json").is_file() == slow
    elif name == "docs/rewrites.md":
        assert "narrow 43488 -> 43200" in printed
    elif name == "docs/survey.md":
        assert {"heat.svg", "truth.svg"} <= {p.name for p in folder.iterdir()}
        assert list((folder / "scratch").iterdir()) == []
    elif name == "docs/plans.md" and slow:
        assert (folder / "mixed" / "report.html").is_file()
        assert (folder / "mixed" / "frontier.svg").is_file()
        assert "why each step" in printed
    elif name == "docs/adding-a-method.md":
        assert registry.row("blocks-alike").measure == "blocks-alike"


@pytest.mark.parametrize("page", QUICK, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_snippets(
    page: Path, furnished: Path, registered: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_quick(monkeypatch)
    monkeypatch.setattr("lamina.exporters._gguf_run.available", lambda: False)
    ran = run_page(page, slow=False)
    assert ran == [b for b in blocks(page) if b.runs and not b.slow]
    after(page, furnished, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_slow_snippets(
    page: Path, furnished: Path, registered: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_quick(monkeypatch)
    assert run_page(page, slow=True) == [b for b in blocks(page) if b.runs]
    after(page, furnished, capsys.readouterr().out, slow=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_snippet_is_run_or_says_why_not(page: Path) -> None:
    assert complaints(page) == []


def fenced(head: str, body: str) -> str:
    return f"```{head}\n{body}\n```\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (fenced("sh", "pip install lamina"), "no command of lamina"),
        (fenced('sh norun=""', "make demo"), "no reason"),
        (fenced("sh norun", "lamina methods"), "no mark"),
        (fenced("python slwo", "1 + 1"), "no mark"),
        (fenced("bash", "lamina methods"), "not of 'bash'"),
        (fenced("", "lamina methods"), "not of ''"),
        ("Then:\n\n    lamina thin model --keep 75%\n", "indented"),
    ],
)
def test_a_snippet_that_nothing_runs_is_told(text: str, words: str) -> None:
    (found,) = complaints(Path("page.md"), text)
    assert words in found


def test_what_snippets_do_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, asked = tmp_path / "page.md", []
    page.write_text(
        fenced("sh", "lamina thin a \\\n  --keep 75%  # so\nlamina methods")
        + fenced("python slow", "x = 1")
        + fenced('python norun="it can only fail"', "raise ValueError")
        + fenced('yaml title="my.yaml"', "name: default")
        + fenced("python", "assert x == 1"),
        encoding="utf-8",
    )
    runner = Runner(command=asked.append)
    for block in blocks(page):
        runner.run(block)
    assert asked == [["thin", "a", "--keep", "75%"], ["methods"]]
    assert [b.line for b in runner.ran] == [1, 6, 15]
    assert Path("my.yaml").read_text() == "name: default\n"
    with pytest.raises(NameError):
        Runner(command=asked.append).run(blocks(page)[-1])


def test_the_page_of_rewrites_names_them_all() -> None:
    assert named_in(ROOT / "docs" / "rewrites.md") == set(registry.REWRITES)


def test_the_page_of_plans_names_recipes_that_exist() -> None:
    told = {name for name in named_in(ROOT / "docs" / "plans.md") if not name.startswith("--")}
    assert told <= set(registry.rows())


def named_in(page: Path) -> set[str]:
    """The names in code in the first cells of a page's tables."""
    rows = re.findall(r"^\| (`.*?) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for row in rows for name in row.split("`")[1::2]}


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
        text = page.read_text(encoding="utf-8")
        for block in blocks(page):
            text = text if block.runs or block.language != "sh" else text.replace(block.body, "")
        told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
        assert told - every == set(), page.name
