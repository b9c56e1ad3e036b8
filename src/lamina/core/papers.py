"""Papers and cards: where a method comes from and what it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from lamina.core.sites import Kind


class Need(IntEnum):
    """What a method makes the lab do, cheapest first."""

    NOTHING = 0
    FORWARD = 1
    GRADIENT = 2
    ABLATION = 3


class Status(StrEnum):
    """`stable` methods have an oracle test and a golden number on a real model."""

    STABLE = "stable"
    EXPERIMENTAL = "experimental"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A publication. `key` is its BibTeX key."""

    key: str
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str = ""
    url: str = ""
    venue: str = ""

    @property
    def link(self) -> str:
        """Where to read it."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.url

    def bibtex(self) -> str:
        """The BibTeX entry."""
        rows = {
            "title": "{" + self.title + "}",
            "author": " and ".join(self.authors),
            "year": str(self.year),
            "journal": self.venue,
            "eprint": self.arxiv,
            "archivePrefix": "arXiv" if self.arxiv else "",
            "url": self.url,
        }
        body = ",\n".join(f"  {key} = {{{value}}}" for key, value in rows.items() if value)
        return f"@article{{{self.key},\n{body}\n}}"


@dataclass(frozen=True, kw_only=True)
class Card:
    """The listing of one method: its name, role, source and status."""

    name: str
    role: str
    summary: str
    paper: Paper | None = None
    on: tuple[Kind, ...] = ()
    needs: Need = Need.NOTHING
    status: Status = Status.EXPERIMENTAL
    deviations: tuple[str, ...] = field(default=())
    options: tuple[tuple[str, str, str], ...] = ()
    """Each option's name, type and default."""
