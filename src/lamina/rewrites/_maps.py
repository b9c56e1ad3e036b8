"""What rewrites of linear maps share: their sites, and options with one number for all or one for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lamina.core.sites import Kind
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.documents import Step


def linear_problems(step: Step, anatomy: Anatomy, *options: str) -> list[Problem]:
    """Sites that are no linear maps of the model, and options that are missing for them."""
    if not step.sites:
        return [Problem(step.rewrite, "the step names no site")]
    known = {s.id for s in anatomy.of_kind(Kind.LINEAR)}
    problems = [Problem(s, "the model has no such linear map") for s in step.sites if s not in known]
    for name in options:
        given = step.options.get(name)
        lacking = [s for s in step.sites if s not in given] if isinstance(given, Mapping) else []
        if given is None or lacking:
            where = lacking[0] if lacking else step.rewrite
            problems.append(Problem(where, f"the step tells no {name}", f"options: {{{name}: …}}"))
    return problems


def number_for(step: Step, option: str, site: str) -> Any:
    """The option of one site: the same for all, or its own."""
    given = step.options[option]
    return given[site] if isinstance(given, Mapping) else given


def shape_of(anatomy: Anatomy, site: str) -> tuple[int, int]:
    """Outputs and inputs of a linear map."""
    outputs, inputs = anatomy.weight(site).shape
    return outputs, inputs
