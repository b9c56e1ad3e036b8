"""The registry: one decorator adds a method, and listing, citation and tests follow from it."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from lamina.core.errors import InputError, did_you_mean
from lamina.core.papers import Card, Need, Paper, Status
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.core.documents import Step

C = TypeVar("C", bound=type)


class Registry:
    """The methods of one role, by name."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._classes: dict[str, type] = {}

    def __iter__(self) -> Iterator[str]:
        discover()
        return iter(sorted(self._classes))

    def card(self, name: str) -> Card:
        """The card of one method."""
        return self.method(name).card  # type: ignore[attr-defined]

    def make(self, name: str, options: Mapping[str, Any] | None = None) -> Any:
        """Build a method with `options`; an unknown option is an error with a hint."""
        found = self.method(name)
        known = {f.name for f in dataclasses.fields(found) if f.init}
        for key in options or {}:
            if key not in known:
                raise InputError(f"{self.role} {name} has no option {key!r}", hint=did_you_mean(key, known))
        try:
            return found(**(options or {}))
        except ValueError as error:
            raise InputError(f"{self.role} {name}: {error}") from None

    def add(self, card: Card, cls: type) -> None:
        """Enter a class under its card's name."""
        if card.name in self._classes and self._classes[card.name].__qualname__ != cls.__qualname__:
            raise ValueError(f"{self.role} {card.name} is registered twice")
        cls.card = card
        self._classes[card.name] = cls

    def method(self, name: str) -> type:
        """The class of one method; an unknown name is an error with a hint."""
        discover()
        if name not in self._classes:
            raise InputError(f"no {self.role} named {name!r}", hint=did_you_mean(name, self._classes))
        return self._classes[name]


MEASURES = Registry("measure")
PLANNERS = Registry("planner")
REWRITES = Registry("rewrite")
HEALERS = Registry("healer")
EVALUATORS = Registry("evaluator")
EXPORTERS = Registry("exporter")
ROLES = {r.role: r for r in (MEASURES, PLANNERS, REWRITES, HEALERS, EVALUATORS, EXPORTERS)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe row: a paper's method as a measure, a planner and a rewrite that lamina holds."""

    name: str
    summary: str
    measure: str
    planner: str
    paper: Paper | None = None
    rewrite: str = "drop"
    measure_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    planner_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    kinds: tuple[Kind, ...] = ()
    refit: bool = False
    status: Status = Status.EXPERIMENTAL
    deviations: tuple[str, ...] = ()


_ROWS: dict[str, Row] = {}


def rows() -> dict[str, Row]:
    """All recipe rows, by name."""
    discover()
    return dict(sorted(_ROWS.items()))


def row(name: str) -> Row:
    """One recipe row."""
    found = rows()
    if name not in found:
        raise InputError(f"no recipe named {name!r}", hint=did_you_mean(name, found))
    return found[name]


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _options(cls: type) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (f.name, str(f.type), "" if f.default is dataclasses.MISSING else repr(f.default))
        for f in dataclasses.fields(cls)
        if f.init
    )


def _decorator(registry: Registry) -> Callable[..., Callable[[C], C]]:
    def register(
        name: str,
        paper: Paper | None = None,
        *,
        on: Kind | tuple[Kind, ...] = (),
        needs: Need = Need.NOTHING,
        status: str = "experimental",
        deviations: tuple[str, ...] = (),
    ) -> Callable[[C], C]:
        def enter(cls: C) -> C:
            card = Card(
                name=name,
                role=registry.role,
                summary=_summary(cls),
                paper=paper,
                on=(on,) if isinstance(on, Kind) else on,
                needs=needs,
                status=Status(status),
                deviations=deviations,
                options=_options(cls),
            )
            registry.add(card, cls)
            return cls

        return enter

    return register


def rewrite_of(step: Step) -> Any:
    """The rewrite of a step, with those of the step's options that are the method's own."""
    own = {f.name for f in dataclasses.fields(REWRITES.method(step.rewrite)) if f.init}
    return REWRITES.make(step.rewrite, {k: v for k, v in step.options.items() if k in own})


measure = _decorator(MEASURES)
planner = _decorator(PLANNERS)
rewrite = _decorator(REWRITES)
healer = _decorator(HEALERS)
evaluator = _decorator(EVALUATORS)
exporter = _decorator(EXPORTERS)


def recipe(name: str, paper: Paper | None, *, summary: str, **parts: Any) -> Row:
    """Enter a recipe row: `recipe("shortgpt", PAPER, measure=…, planner=…)`."""
    status = Status(parts.pop("status", "experimental"))
    entry = Row(name=name, paper=paper, summary=summary, status=status, **parts)
    if name in _ROWS and _ROWS[name] != entry:
        raise ValueError(f"recipe {name} is registered twice")
    _ROWS[name] = entry
    return entry


TRAVELS = (
    "lamina.rewrites.structure",
    *(f"lamina.rewrites.lamina_{name}" for name in ("parts", "attention", "layouts")),
)
"""The files that go with checkpoints: they need torch and register nothing."""
METHOD_PACKAGES = ("papers", "planners", "rewrites", "healers", "evaluators", "exporters")


@cache
def discover() -> None:
    """Import every module that registers a method: ours, then plug-ins (entry points `lamina.methods`)."""
    for package in METHOD_PACKAGES:
        root = importlib.import_module(f"lamina.{package}")
        for found in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
            if found.name not in TRAVELS and not found.name.rsplit(".", 1)[-1].startswith("_"):
                importlib.import_module(found.name)
    from importlib.metadata import entry_points

    for entry in entry_points(group="lamina.methods"):
        entry.load()


def cite(name: str) -> Paper:
    """The paper of a method or a recipe."""
    discover()
    known: dict[str, Paper | None] = {n: r.paper for n, r in _ROWS.items()}
    for registry in ROLES.values():
        known |= {n: registry.card(n).paper for n in registry}
    if name not in known:
        raise InputError(f"no method named {name!r}", hint=did_you_mean(name, known))
    paper = known[name]
    if paper is None:
        raise InputError(f"{name} is lamina's own; cite lamina itself", hint="see CITATION.cff")
    return paper
