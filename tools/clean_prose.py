"""reStructuredText, HTML, R data and plain text as paragraphs of prose, for `build_prose.py`."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser

PROSE_DIRECTIVES = ("note", "warning", "tip", "important", "topic", "admonition", "seealso", "impl-detail")
UNDERLINE = re.compile(r"^([=\-~^\"'`#*+.:_])\1{2,}\s*$")


def rst(text: str) -> list[str]:
    """The paragraphs and titles of a reStructuredText source; code, tables and directives are left out."""
    out: list[str] = []
    for block in _rst_blocks(text.expandtabs(8).splitlines()):
        line = re.sub(r"\s+", " ", " ".join(block)).strip()
        out.append(_inline(re.sub(r"^([-*+]|#\.|\(?\w{1,3}[.)])\s+", "", line)))
    return out


def _rst_blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines without a blank one between, literal blocks and markup skipped."""
    i, block = 0, list[str]()
    while i < len(lines):
        line = lines[i]
        indent = len(line) - len(line.lstrip())
        bare = line.strip()
        if bare.startswith(".."):
            name = re.match(r"\.\. ([\w-]+)::", bare)
            if not (name and name[1] in PROSE_DIRECTIVES):
                i = _skip(lines, i + 1, indent)
                continue
            bare = ""
        if not bare or UNDERLINE.match(bare) or bare.startswith(("+--", "|", ">>>", "==== ", "=== ")):
            if block:
                yield block
            block = []
            if bare.startswith(">>>"):
                i = _skip(lines, i + 1, indent - 1)
                continue
        elif not re.fullmatch(r":[\w -]+:(\s.*)?", bare):
            if block and re.match(r"([-*+]|#\.|\d+[.)])\s", bare):
                yield block
                block = []
            block.append(bare.removesuffix("::") + ":" if bare.endswith("::") else bare)
            if bare.endswith("::"):
                yield [part for part in block if part != ":"]
                block = []
                i = _skip(lines, i + 1, indent)
                continue
        i += 1
    if block:
        yield block


def _skip(lines: list[str], i: int, indent: int) -> int:
    """The first line at or after `i` that is not blank and not deeper than `indent`."""
    while i < len(lines) and (not lines[i].strip() or len(lines[i]) - len(lines[i].lstrip()) > indent):
        i += 1
    return i


def _inline(line: str) -> str:
    """A line without inline markup: roles, links, literals, emphasis."""
    line = re.sub(r":pep:`(\d+)`", r"PEP \1", line)
    line = re.sub(r":(?:issue|bpo):`(\d+)`", r"bpo-\1", line)
    line = re.sub(r":[\w:+-]+:`!?([^`<]*?)\s*<[^`>]*>`", r"\1", line)
    line = re.sub(r":[\w:+-]+:`~[\w.]*?(\w+)`", r"\1", line)
    line = re.sub(r":[\w:+-]+:`!?([^`]*)`", r"\1", line)
    line = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", line)
    line = re.sub(r"\s?\[[#\w]+\]_+", "", line)
    line = re.sub(r"``(.+?)``", r"\1", line)
    line = re.sub(r"`([^`]+)`_{0,2}", r"\1", line)
    line = re.sub(r"\*\*(\S.*?)\*\*", r"\1", line)
    line = re.sub(r"(?<!\w)\*(\S[^*]*)\*", r"\1", line)
    return re.sub(r"\\(\S)", r"\1", line).replace("---", "-").replace("\\ ", "")


class _Html(HTMLParser):
    SKIP = frozenset({"script", "style", "pre", "table", "nav", "head", "svg", "button", "form", "select"})
    BREAK = frozenset({"p", "li", "h1", "h2", "h3", "h4", "dt", "dd", "div", "blockquote", "ul", "ol", "center"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = [""]
        self.skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        shown = dict(attrs).get("class") or ""
        menu = tag == "div" and re.search(r"\b(nosearch|menu|searchmenu|tagline|toc|codeblock|imgcontainer)\b", shown)
        if self.skipping:
            if tag == self.skipping[0]:
                self.skipping.append(tag)
        elif tag in self.SKIP or menu:
            self.skipping.append(tag)
        if tag in self.BREAK:
            self.parts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self.skipping and tag == self.skipping[0]:
            self.skipping.pop()
        if tag in self.BREAK or tag in self.SKIP:
            self.parts.append("")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts[-1] += data


def html(text: str) -> list[str]:
    """The paragraphs and headings of an HTML page; code, tables, menus and forms are left out."""
    inner = re.search(r"<main>(.*?)</main>", text, re.S)
    parser = _Html()
    parser.feed(inner[1] if inner else text)
    return [" ".join(part.split()) for part in parser.parts]


def plain(text: str, *, verse: bool = False) -> list[str]:
    """Paragraphs of plain text, parted by blank lines; verse keeps its lines."""
    if verse:
        text = re.sub(r"[ \t]+", " ", text)
        return ["\n".join(line.strip() for line in p.splitlines()) for p in re.split(r"\n\s*\n", text)]
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]


def r_strings(data: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database (`.rdb`: length, zlib stream, serialised in XDR)."""
    while data:
        stream = zlib.decompressobj()
        body = stream.decompress(data[4:]) + stream.flush()
        data = stream.unused_data
        at = 14 if body[2:6] == b"\0\0\0\2" else 18 + struct.unpack(">i", body[14:18])[0]
        kind, count = struct.unpack(">ii", body[at : at + 8])
        if kind & 0xFF == 16:
            yield list(_r_vector(body, at + 8, count))


def _r_vector(body: bytes, at: int, count: int) -> Iterator[str]:
    for _ in range(count):
        _, size = struct.unpack(">ii", body[at : at + 8])
        yield body[at + 8 : at + 8 + max(size, 0)].decode()
        at += 8 + max(size, 0)
