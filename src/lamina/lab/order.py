"""In which order a plan's steps are done: those of one rewrite as one, rounding behind what it rounds, drops last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lamina.core import registry
from lamina.core.documents import Step
from lamina.core.errors import UnsupportedError
from lamina.core.papers import Need
from lamina.core.registry import REWRITES
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.lab import Lab


def informed(steps: Sequence[Step]) -> bool:
    """Whether any of the steps looks at a text."""
    return any(registry.REWRITES.card(s.rewrite).needs >= Need.FORWARD for s in steps)


def merged(steps: Sequence[Step], lab: Lab) -> list[Step]:
    """The steps as they are done: sites are named as in the dense model throughout, so what drops comes last, at once.

    Steps of one rewrite whose options go together are one: options that differ are told site by site. A rewrite whose
    class says a later `stage` comes behind the others. Raises UnsupportedError where a site would lose its name midway.
    """
    _expect_names_kept(steps, lab)
    gone = [site for step in steps if step.rewrite == "drop" for site in step.sites]
    found: list[Step] = []
    for step in (s for s in steps if s.rewrite != "drop"):
        place = next((n for n, s in enumerate(found) if (together(s, step)) is not None), None)
        if place is None:
            found.append(step)
        else:
            joined = together(found[place], step)
            assert joined is not None
            found[place] = joined
    found.sort(key=lambda s: (_removes(s), getattr(type(registry.rewrite_of(s)), "stage", 0)))
    out = lab.anatomy.collapse(lab.anatomy.expand(gone))
    found += [Step(rewrite="drop", sites=out)] if out else []
    _expect_blocks_kept(found)
    return found


def _expect_names_kept(steps: Sequence[Step], lab: Lab) -> None:
    """A map in the place of an attention is an MLP by what it does: no other step may name its block's sublayers."""
    for number, step in enumerate(steps):
        for site in step.sites if step.rewrite == "replace" else ():
            if lab.anatomy.site(site).kind is Kind.MLP:
                continue
            block = lab.anatomy.block(site).site.id
            others = [s for n, x in enumerate(steps) if n != number for s in x.sites if s.startswith(f"{block}.")]
            if others:
                what = f"{others[0]} would have another name once this is a map"
                raise UnsupportedError(what, where=site, hint="replace both in one step, or apply the other one first")


def _removes(step: Step) -> bool:
    """Whether a rewrite, by its class's word, leaves fewer blocks than there were: those behind get other names."""
    return bool(getattr(REWRITES.method(step.rewrite), "removes", False))


def _expect_blocks_kept(steps: Sequence[Step]) -> None:
    """Nothing may name blocks, or round what is still to be merged, once others are gone; drops do so at once."""
    gone = [s for s in steps if _removes(s)]
    others = [s for s in steps if s is not gone[0] and (s in gone or s.rewrite == "drop" or _late(s))] if gone else []
    if others:
        what = f"blocks go here, and {others[0].rewrite} would find others under their names"
        raise UnsupportedError(what, where=gone[0].sites[0], hint="apply one plan after the other")


def _late(step: Step) -> bool:
    return getattr(REWRITES.method(step.rewrite), "stage", 0) > 0


def together(one: Step, other: Step) -> Step | None:
    """Both as one step; None where they are not of one rewrite, or their options can't be told site by site."""
    each = getattr(type(registry.rewrite_of(one)), "each", ())
    if one.rewrite != other.rewrite or set(one.sites) & set(other.sites) or not each:
        return None
    options: dict[str, Any] = {}
    for name in {**one.options, **other.options}:
        mine, theirs = one.options.get(name), other.options.get(name)
        if name in each:
            options[name] = {**_by_site(one, mine), **_by_site(other, theirs)}
        elif mine != theirs:
            return None
        else:
            options[name] = mine
    return Step(rewrite=one.rewrite, sites=(*one.sites, *other.sites), options=options)


def _by_site(step: Step, value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else dict.fromkeys(step.sites, value)
