"""What `mkdocs build` does beside: marks of snippets go, links out of docs/ find their pages, notebooks become pages.

A hook of mkdocs.yml. A page below docs/ may link to any Markdown file of the repository; such files are taken in under
`repository/`, and links to files that are none become plain code. Of a notebook, outputs are shown where
`build/notebooks/` holds an executed copy with the same cells (`python tools/run_notebook.py` makes one).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
"""The site has a front page of its own."""
EXECUTED = ROOT / "build" / "notebooks"
MARKS = re.compile(r"^(```\w+)[ \t]+(.*)$", re.MULTILINE)
TITLE = re.compile(r'title="[^"]*"')
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def unmarked(text: str) -> str:
    """Without the marks behind a fence's language (`slow`, `norun="…"`); a title stays."""

    def kept(found: re.Match[str]) -> str:
        title = TITLE.search(found[2])
        return f"{found[1]} {title[0]}" if title else found[1]

    return MARKS.sub(kept, text)


def place(file: Path) -> str:
    """Where a file of the repository stands in the site's sources."""
    inside = file.is_relative_to(DOCS)
    return file.relative_to(DOCS).as_posix() if inside else f"repository/{file.relative_to(ROOT).as_posix()}"


def outward(text: str, page: Path) -> Iterable[tuple[str, Path]]:
    """The links of a page that leave docs/: each as it is written, and the file."""
    for _, target in LINK.findall(FENCE.sub("", text)):
        if not re.match(r"[a-z]+:|#|/", target):
            file = (page.parent / target.partition("#")[0]).resolve()
            if not file.is_relative_to(DOCS) and file.is_relative_to(ROOT):
                yield target, file


def taken(pages: Iterable[Path]) -> list[Path]:
    """The Markdown files outside docs/ that these pages link to, and that those link to."""
    found: list[Path] = []
    todo = list(pages)
    while todo:
        page = todo.pop()
        for _, file in outward(page.read_text(encoding="utf-8"), page):
            if file.suffix == ".md" and file.is_file() and file not in found and file != README:
                found.append(file)
                todo.append(file)
    return sorted(found)


def relinked(text: str, page: Path, known: Iterable[Path]) -> str:
    """The text with links to files where the site has them; what it doesn't have is told without a link."""
    known = set(known)

    def moved(found: re.Match[str]) -> str:
        words, target = found.groups()
        if re.match(r"[a-z]+:|#|/", target):
            return found[0]
        file = (page.parent / target.partition("#")[0]).resolve()
        file = DOCS / "index.md" if file == README else file
        if not file.is_relative_to(ROOT) or not (file.is_relative_to(DOCS) or file in known):
            return words.strip("![]") if file.is_dir() else f"{words.strip('![]')} (`{os.path.relpath(file, ROOT)}`)"
        way = os.path.relpath(place(file), Path(place(page)).parent)
        return f"{words}({way}{''.join(target.partition('#')[1:])})"

    fenced = [*FENCE.findall(text), ""]
    return "".join(LINK.sub(moved, plain) + fence for plain, fence in zip(FENCE.split(text), fenced, strict=True))


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: text, cells, and what they gave where an executed copy of the same cells is there."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    copy = EXECUTED / path.name
    if copy.is_file():
        ran = json.loads(copy.read_text(encoding="utf-8"))["cells"]
        if [_source(c) for c in ran] == [_source(c) for c in cells]:
            cells = ran
    parts = []
    for cell in cells:
        if cell["cell_type"] == "markdown":
            parts.append(_source(cell))
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{_source(cell)}\n```")
            parts += [shown for output in cell["outputs"] if (shown := _output(output))]
    return "\n\n".join(parts) + "\n"


def _source(cell: dict[str, Any]) -> str:
    return _joined(cell["source"]).rstrip()


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def _output(output: dict[str, Any]) -> str:
    """One output, HTML before SVG before text; an indented line or a blank one would end the HTML."""
    data = output.get("data", {})
    for kind in ("text/html", "image/svg+xml"):
        if kind in data:
            inside = " ".join(line.strip() for line in _joined(data[kind]).splitlines())
            return f'<div class="output" markdown="0">{inside}</div>'
    text = ESCAPES.sub("", _joined(output.get("text", data.get("text/plain", "")))).rstrip()
    return f"```text\n{text}\n```" if text else ""


def on_config(config: Any) -> Any:
    """The decisions in the navigation, whatever their number."""
    entries = next(part["Decisions"] for tab in config.nav for part in next(iter(tab.values())) if "Decisions" in part)
    entries += sorted(f"decisions/{p.name}" for p in (DOCS / "decisions").glob("[0-9]*.md"))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Take in what pages link to outside docs/, and each notebook as a page."""
    from mkdocs.structure.files import File, InclusionLevel

    pages = [Path(f.abs_src_path) for f in files if f.src_uri.endswith(".md") and f.abs_src_path]
    for file in taken(pages):
        text = file.read_text(encoding="utf-8")
        files.append(File.generated(config, place(file), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        files.remove(file)
        page = file.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, page, content=notebook_page(Path(file.abs_src_path))))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page's text as the site needs it."""
    known = [ROOT / f.src_uri.removeprefix("repository/") for f in files if f.src_uri.startswith("repository/")]
    uri = page.file.src_uri
    source = ROOT / uri.removeprefix("repository/") if uri.startswith("repository/") else DOCS / uri
    return unmarked(relinked(markdown.replace(".ipynb)", ".md)"), source, known))
