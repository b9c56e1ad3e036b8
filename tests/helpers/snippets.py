"""The snippets of the documentation: found, told apart by the marks behind their language, and run in order.

A fence says behind its language, before anything else is looked at:

    ```sh                    run by the default tests, each of its lines a command of lamina
    ```python                run as one program with the page's other blocks
    ```sh slow               run by the slow tests, behind all blocks before it
    ```python norun="why"    not run, for this reason
    ```yaml title="my.yaml"  written to a file before what follows is run; a Python file is imported
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

LANGUAGES = frozenset({"sh", "python"})
"""What is run."""
OTHER = frozenset({"yaml", "json", "text", "markdown", "toml", "bibtex"})
"""What may stand in a fence and is not run."""
FENCE = re.compile(
    r"^(?P<indent>[ ]*)```(?P<head>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r'\s*(?:(?P<word>slow)|(?P<key>norun|title)="(?P<value>[^"]*)")(?=\s|$)')
LOOSE = re.compile(r"^(?: {4,}|\t)(lamina [a-z]|import \w|from \w+ import )", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page; `line` is that of its fence."""

    page: Path
    line: int
    language: str
    body: str
    marks: dict[str, str] = field(default_factory=dict)
    wrong: str = ""
    """What is wrong with its marks."""

    @property
    def runs(self) -> bool:
        """Whether it is to be run at all."""
        return self.language in LANGUAGES and "norun" not in self.marks

    @property
    def slow(self) -> bool:
        """Whether the slow tests alone run it."""
        return "slow" in self.marks

    @property
    def lines(self) -> list[str]:
        """The commands of a shell block; a line that ends with a backslash goes on in the next."""
        whole = self.body.replace("\\\n", " ").splitlines()
        return [line for line in whole if line.strip() and not line.lstrip().startswith("#")]


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8") if text is None else text
    found = []
    for fence in FENCE.finditer(text):
        language, _, rest = fence["head"].strip().partition(" ")
        marks, wrong = marks_of(rest)
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page=page, line=line, language=language, body=fence["body"], marks=marks, wrong=wrong))
    return found


def marks_of(text: str) -> tuple[dict[str, str], str]:
    """The marks behind a fence's language, and what of them is none."""
    marks = {}
    while found := MARK.match(text):
        marks[found["word"] or found["key"]] = (found["value"] or "").strip()
        text = text[found.end() :]
    return marks, text.strip()


def complaints(page: Path, text: str | None = None) -> list[str]:
    """What keeps a page's snippets from being run, or from saying why they are not."""
    text = page.read_text(encoding="utf-8") if text is None else text
    told = []
    for block in blocks(page, text):
        where = f"{page.name}:{block.line}"
        if block.wrong:
            told.append(f"{where}: {block.wrong!r} is no mark of a snippet")
        if block.language not in LANGUAGES | OTHER:
            told.append(f"{where}: fences are of {', '.join(sorted(LANGUAGES | OTHER))}, not of {block.language!r}")
        if "norun" in block.marks and len(block.marks["norun"]) < 10:
            told.append(f"{where}: not run, and no reason is given")
        if block.runs and block.language == "sh":
            told += [f"{where}: {x!r} is no command of lamina" for x in block.lines if not x.startswith("lamina ")]
    loose = FENCE.sub("", text)
    told += [
        f"{page.name}: {x[0].strip()!r} stands in an indented block, where nothing runs it"
        for x in LOOSE.finditer(loose)
    ]
    return told


@dataclass
class Runner:
    """Runs blocks one after the other in the working folder; `ran` tells which."""

    command: Callable[[Sequence[str]], None]
    """Runs one command line, its arguments given."""
    replace: dict[str, str] = field(default_factory=dict)
    """Words of the page → what stands for them here."""
    module: Any = field(default_factory=lambda: ModuleType("snippet"))
    """Where a page's Python blocks run, one after the other."""
    ran: list[Block] = field(default_factory=list)

    def run(self, block: Block) -> None:
        """Run one block, or write its file."""
        body = block.body
        for old, new in self.replace.items():
            body = body.replace(old, new)
        title = block.marks.get("title")
        if title:
            path = Path(title).name if block.language == "python" else title
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(body, encoding="utf-8")
        if not block.runs:
            return
        if block.language == "sh":
            for line in Block(**{**vars(block), "body": body}).lines:
                self.command(shlex.split(line, comments=True)[1:])
        elif title:
            imported(title, Path(title).name)
        else:
            self.module.__snippet__ = True
            sys.modules["snippet"] = self.module  # dataclasses look for their module
            exec(compile(body, f"{block.page.name}, line {block.line}", "exec"), vars(self.module))
        self.ran.append(block)


def imported(title: str, file: str) -> None:
    """Import a file of the working folder under the name that its title says."""
    name = ".".join(Path(title.removeprefix("src/")).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    module.__snippet__ = True
    sys.modules[name] = module
    spec.loader.exec_module(module)
