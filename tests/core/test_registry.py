"""The registry: one decorator enters a method; names and options that are not known get a hint."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lamina.core import registry
from lamina.core.errors import InputError
from lamina.core.papers import Need, Paper, Status
from lamina.core.registry import MEASURES, ROLES, Registry, cite, measure, recipe, row, rows
from lamina.core.sites import Kind

PAPER = Paper(key="doe2020thing", title="A Thing", authors=("J. Doe", "R. Roe"), year=2020, arxiv="2001.00001")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test enters is forgotten afterwards."""
    registry.discover()
    monkeypatch.setattr(MEASURES, "_classes", dict(MEASURES._classes))
    monkeypatch.setattr(registry, "_ROWS", dict(registry._ROWS))


@dataclass(frozen=True, kw_only=True)
class Thing:
    """Says nothing of anything.

    More of it.
    """

    strength: float = 0.5
    name: str = "x"

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError("strength must not be negative")


@pytest.mark.usefixtures("clean")
def test_a_decorator_enters_a_method() -> None:
    measure("a-thing", PAPER, on=Kind.BLOCK, needs=Need.GRADIENT, status="stable", deviations=("none",))(Thing)
    assert "a-thing" in list(MEASURES)
    card = MEASURES.card("a-thing")
    assert (card.role, card.summary) == ("measure", "Says nothing of anything.")
    assert (card.on, card.needs) == ((Kind.BLOCK,), Need.GRADIENT)
    assert card.status is Status.STABLE
    assert card.options == (("strength", "float", "0.5"), ("name", "str", "'x'"))
    assert MEASURES.make("a-thing", {"strength": 2.0}) == Thing(strength=2.0)
    assert cite("a-thing") is PAPER


@pytest.mark.usefixtures("clean")
def test_unknown_names_and_options_get_a_hint() -> None:
    measure("a-thing", PAPER)(Thing)
    with pytest.raises(InputError, match=r"no measure named 'a-thin'.*did you mean a-thing"):
        MEASURES.make("a-thin")
    with pytest.raises(InputError, match=r"a-thing has no option 'strenght'.*did you mean strength\?"):
        MEASURES.make("a-thing", {"strenght": 1})
    with pytest.raises(InputError, match="strength must not be negative"):
        MEASURES.make("a-thing", {"strength": -1.0})
    with pytest.raises(InputError, match="known: "):
        MEASURES.make("qqqqqqqq")
    with pytest.raises(InputError, match="no method named"):
        cite("qqqqqqqq")


@pytest.mark.usefixtures("clean")
def test_a_name_is_taken_once() -> None:
    measure("a-thing", PAPER)(Thing)
    measure("a-thing", PAPER)(Thing)

    @dataclass(frozen=True)
    class Other:
        """Another."""

    with pytest.raises(ValueError, match="registered twice"):
        measure("a-thing", PAPER)(Other)
    recipe("a-row", PAPER, summary="x", measure="a-thing", planner="lowest")
    with pytest.raises(ValueError, match="registered twice"):
        recipe("a-row", PAPER, summary="y", measure="a-thing", planner="lowest")


@pytest.mark.usefixtures("clean")
def test_rows() -> None:
    recipe("a-row", PAPER, summary="x", measure="a-thing", planner="lowest")
    assert row("a-row").measure == "a-thing"
    with pytest.raises(InputError, match=r"no recipe named 'a-roww'.*a-row"):
        row("a-roww")
    assert list(rows()) == sorted(rows())


def test_what_is_lamina_s_own_cites_lamina() -> None:
    with pytest.raises(InputError, match=r"CITATION\.cff"):
        cite("drop")


def test_every_row_names_what_is_there() -> None:
    for name, found in rows().items():
        if found.measure:
            ROLES["measure"].make(found.measure, found.measure_options)
        ROLES["planner"].make(found.planner, found.planner_options)
        assert found.rewrite in list(ROLES["rewrite"]), name
        assert found.summary, name


def test_every_method_has_a_card_and_a_paper_has_a_source() -> None:
    for role, methods in ROLES.items():
        for name in methods:
            card = methods.card(name)
            assert (card.name, card.role) == (name, role)
            assert card.summary.endswith("."), f"{role} {name}: {card.summary!r}"
            if card.paper is not None:
                assert card.paper.link.startswith("https://")
                assert card.paper.key in card.paper.bibtex()


def test_bibtex() -> None:
    assert PAPER.bibtex() == (
        "@article{doe2020thing,\n  title = {{A Thing}},\n  author = {J. Doe and R. Roe},\n  year = {2020},\n"
        "  eprint = {2001.00001},\n  archivePrefix = {arXiv}\n}"
    )


def test_an_empty_registry_says_so() -> None:
    with pytest.raises(InputError, match="none is known"):
        Registry("policy").make("x")
