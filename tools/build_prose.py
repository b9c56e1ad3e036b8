"""Rebuild the prose that lamina ships: `python tools/build_prose.py WORKDIR` (Debian, needs apt-get, dpkg-deb, pip).

Fetches the packages below into WORKDIR (those already there are reused), checks their sha256, takes the
documents out, strips markup, and writes `src/lamina/lab/prose/{calibration,heldout}.jsonl.xz`. Nothing is
installed. The same packages give the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import clean_prose as clean

TARGET = Path(__file__).parents[1] / "src" / "lamina" / "lab" / "prose"
PACKAGES = {  # version and sha256; all from Debian 12, but brotli, whose source is on PyPI
    "r-cran-janeaustenr": ("1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"),
    "python3.11-doc": ("3.11.2-6+deb12u9", "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be"),
    "python-sklearn-doc": ("1.2.1+dfsg-1", "4e244556326064e87e7563e3e544c2288d44b5719db2d7b3a85c9a84ae93488d"),
    "rust-doc": ("1.63.0+dfsg1-2", "96ef96fe6df87d939ca713bd7df3d15c2b778ccb892eca025c4ee504146f697b"),
    "sqlite3-doc": ("3.40.1-2+deb12u2", "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2"),
    "dict-devil": ("1.0-13.1", "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154"),
    "brotli": ("1.2.0", "e310f77e41941c13340a95976fe66a8a95b01e783d430eeaf7a2f87e0a57dd0a"),
}
PD, PSF, BSD, RUST = "public domain", "PSF-2.0", "BSD-3-Clause", "MIT OR Apache-2.0"
NOVEL, VERSE, CHAPTER = 120_000, 40_000, 10_000
"""The most characters that one novel, one play or poem and one page of a manual give."""
LEAST = 4_000
"""Shorter pages are left out."""


@dataclass(frozen=True)
class Document:
    """One document, cleaned, with where it comes from."""

    name: str
    source: str
    licence: str
    paragraphs: tuple[str, ...]
    split: str = ""

    @property
    def text(self) -> str:
        """Its paragraphs, parted by blank lines."""
        return "\n\n".join(self.paragraphs)


def main(work: Path) -> None:
    """Fetch, clean, split, write."""
    fetch(work)
    documents = unique(split(all_documents(work)))
    calibration = [d for d in documents if d.split == "calibration"]
    heldout = list(apart([d for d in documents if d.split == "heldout"], calibration))
    for name, rows in (("calibration", calibration), ("heldout", heldout)):
        write(TARGET / f"{name}.jsonl.xz", name, rows)
        print(f"{name}: {len(rows)} documents, {sum(len(d.text) for d in rows):,} characters")


def fetch(work: Path) -> None:
    """Bring the packages into `work` and unpack them into `work/x`; a wrong sha256 is an error."""
    work.mkdir(parents=True, exist_ok=True)
    for name, (version, digest) in PACKAGES.items():
        if not list(work.glob(f"{name}[_-]*")):
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", "."]
            pip += ["--no-build-isolation", f"{name}=={version}"]
            command = pip if name == "brotli" else ["apt-get", "download", f"{name}={version}"]
            subprocess.run(command, cwd=work, check=True)
        (path,) = work.glob(f"{name}[_-]*")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{path}: not the file that the corpus was made from (sha256 differs)")
        out = work / "x" / name
        if out.exists():
            continue
        out.mkdir(parents=True)
        if name == "brotli":
            with tarfile.open(path) as archive:
                archive.extractall(out, filter="data")
        else:
            subprocess.run(["dpkg-deb", "-x", str(path), str(out)], check=True)


def all_documents(work: Path) -> Iterator[Document]:
    """Every document of every package, cleaned and capped, in a fixed order."""
    yield from novels(work / "x")
    yield from classics(work / "x")
    for title, package, licence, folder, patterns in MANUALS:
        root = work / "x" / package / "usr/share/doc" / folder
        yield from pages(title, package, licence, [f for p in patterns for f in sorted(root.glob(p))], root)


MANUALS = (
    (
        *("Python documentation", "python3.11-doc", PSF, "python3.11/html/_sources"),
        ("howto/*.rst.txt", "tutorial/*.rst.txt", "faq/*.rst.txt", "whatsnew/*.rst.txt"),
    ),
    (
        *("scikit-learn user guide", "python-sklearn-doc", BSD, "python-sklearn-doc/html/_sources"),
        ("*.rst.txt", "modules/*.rst.txt"),
    ),
    ("The Rust Programming Language", "rust-doc", RUST, "rust-doc/html/book", ("*.html",)),
    ("SQLite documentation", "sqlite3-doc", PD, "sqlite3", ("*.html",)),
)
"""Title, package, licence, folder in /usr/share/doc and patterns of each manual."""

LEFT_OUT = re.compile(
    # lists, indices, references, legal texts, people
    r"contents|index|classes|whats_new|authors|about|presentations|testimonials|related|team|support|print|SUMMARY"
    r"|appendix-0|toc|changes|chronology|news|oldnews|sitemap|keyword|crossref|capi3ref|requirements|syntax|copyright"
    r"|releaselog|lang_|license|glossary|opcode|pragma|agreement|compile|rescode|c_interface|codeofethics|^docs$"
    r"|pressrelease|getthecode|dbpage|version3|amalgamation"
)
APART = frozenset(
    # pages that are left out of both splits, so that they can serve as an independent test
    f"Python documentation: {page}"
    for page in (
        *("howto/curses", "howto/functional", "tutorial/classes", "whatsnew/2.0", "whatsnew/2.2", "whatsnew/2.3"),
        *("whatsnew/2.5", "whatsnew/2.6", "whatsnew/3.2", "whatsnew/3.7", "whatsnew/3.9", "whatsnew/3.10"),
    )
)


def pages(title: str, package: str, licence: str, files: Iterable[Path], root: Path) -> Iterator[Document]:
    """The pages of a manual that hold at least `LEAST` characters of prose."""
    for file in files:
        name = f"{title}: {file.relative_to(root).as_posix().removesuffix('.txt').rsplit('.', 1)[0]}"
        if LEFT_OUT.search(file.stem.removesuffix(".rst")) or name in APART:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        paragraphs = capped(prose(clean.html(text) if file.suffix == ".html" else clean.rst(text)), CHAPTER)
        if sum(map(len, paragraphs)) >= LEAST:
            yield Document(name, package, licence, paragraphs)


AUSTEN = ("Emma", "Mansfield Park", "Northanger Abbey", "Persuasion", "Pride and Prejudice", "Sense and Sensibility")


def novels(root: Path) -> Iterator[Document]:
    """Jane Austen's six novels, from the first chapter on."""
    data = root / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for title, lines in zip(AUSTEN, clean.r_strings(data.read_bytes()), strict=True):
        paragraphs = prose(clean.plain("\n".join(lines)))
        yield Document(f"Jane Austen: {title}", "r-cran-janeaustenr", PD, capped(paragraphs, NOVEL))


def classics(root: Path) -> Iterator[Document]:
    """Carroll, Milton, Shakespeare and Bierce."""
    texts = next((root / "brotli").glob("brotli-*/tests/testdata"))
    for file, title, start, verse in (
        ("alice29.txt", "Lewis Carroll: Alice's Adventures in Wonderland", "CHAPTER I", False),
        ("plrabn12.txt", "John Milton: Paradise Lost", "Of Man's first disobedience", True),
        ("asyoulik.txt", "William Shakespeare: As You Like It", "ACT I", True),
    ):
        text = (texts / file).read_text(encoding="latin-1").replace("\r", "")
        text = text[text.index(start) :]
        paragraphs = clean.plain(text, verse=verse)
        cap = VERSE if verse else NOVEL
        yield Document(title, "brotli", PD, capped(paragraphs if verse else prose(paragraphs), cap))
    devil = gzip.decompress((root / "dict-devil/usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")
    paragraphs = prose(clean.plain(devil[devil.index("ABASEMENT, n.") :]))
    yield Document("Ambrose Bierce: The Devil's Dictionary", "dict-devil", PD, capped(paragraphs, NOVEL))


def prose(paragraphs: Iterable[str]) -> list[str]:
    """Only what reads as prose, and the titles that stand before it."""
    out, title = list[str](), ""
    for paragraph in paragraphs:
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        words = len(paragraph.split())
        if paragraph.startswith(("Filename:", "Listing", "See sphx", "sphx")):
            continue
        if words >= 8 and letters >= 0.86 * len(paragraph) and "   " not in paragraph:
            out += [title, paragraph] if title else [paragraph]
            title = ""
        elif 1 <= words < 8 and letters >= 0.8 * len(paragraph):
            title = paragraph
    return out


def capped(paragraphs: Iterable[str], limit: int) -> tuple[str, ...]:
    """The first paragraphs, up to `limit` characters."""
    out, size = list[str](), 0
    for paragraph in paragraphs:
        size += len(paragraph) + 2
        if size > limit:
            break
        if paragraph.strip():
            out.append(paragraph)
    return tuple(out)


HELDOUT = ("Northanger Abbey", "Persuasion", "Sense and Sensibility", "Paradise Lost")


def split(documents: Iterable[Document]) -> Iterator[Document]:
    """The classics by title; of each manual every page with an even digest of its name is held out."""
    for d in documents:
        even = hashlib.sha256(d.name.encode()).digest()[0] % 2 == 0
        held = d.name.endswith(HELDOUT) if d.source in ("r-cran-janeaustenr", "brotli", "dict-devil") else even
        yield Document(d.name, d.source, d.licence, d.paragraphs, "heldout" if held else "calibration")


def unique(documents: Iterable[Document]) -> list[Document]:
    """No paragraph twice: what is repeated is boilerplate."""
    seen, out = set[str](), list[Document]()
    for d in documents:
        fresh = [p for p in d.paragraphs if len(p.split()) < 8 or p not in seen]
        seen.update(fresh)
        out.append(Document(d.name, d.source, d.licence, tuple(fresh), d.split))
    return out


def grams(paragraph: str, n: int = 8) -> set[tuple[str, ...]]:
    """Runs of `n` pieces, each at most about two tokens long: parts of words, digits, marks."""
    pieces = re.findall(r"[A-Z]?[a-z]{1,6}|[A-Z]{1,3}|\d|[^\w\s]|_", paragraph)
    return {tuple(pieces[i : i + n]) for i in range(len(pieces) - n + 1)}


def runs(paragraphs: tuple[str, ...]) -> Iterator[tuple[str, set[tuple[str, ...]]]]:
    """Each paragraph with its runs of pieces, those that reach into the next paragraph included."""
    for p, following in zip(paragraphs, (*paragraphs[1:], ""), strict=True):
        yield p, grams(f"{p} ¶ {following[:24]}")


def apart(heldout: Iterable[Document], calibration: Iterable[Document]) -> Iterator[Document]:
    """The held-out documents without paragraphs that share a run of pieces with the calibration text."""
    known = {g for d in calibration for _, found in runs(d.paragraphs) for g in found}
    for d in heldout:
        kept = tuple(p for p, found in runs(d.paragraphs) if not (found & known))
        if sum(map(len, kept)) >= LEAST:
            yield Document(d.name, d.source, d.licence, kept, d.split)


def write(path: Path, name: str, documents: Iterable[Document]) -> None:
    """JSON lines, xz."""
    keys = ("name", "source", "licence", "text")
    rows = [json.dumps({k: getattr(d, k) for k in keys}, ensure_ascii=False) for d in documents]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(("\n".join(rows) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
