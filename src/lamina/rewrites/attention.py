"""Attentions that see less, or cost less by token: their maps stay, what happens between them changes."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.errors import did_you_mean
from lamina.core.papers import Card
from lamina.core.registry import rewrite
from lamina.core.sites import Kind
from lamina.rewrites._maps import number_for
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.core.sites import Cost
    from lamina.lab import Lab


@dataclass(frozen=True, kw_only=True)
class Attend(ABC):
    """Another attention function between an attention's own maps, behind its rotary embedding and norms.

    It stands in transformers' table of attention functions, so it takes models that look theirs up there.
    """

    card: ClassVar[Card]
    numbers: ClassVar[Mapping[str, int]] = {}
    """The step's whole numbers → the least that each may be; 0 where it may be left out."""

    @abstractmethod
    def settings(self, step: Step, site: str) -> dict[str, Any]:
        """What `lamina_attention.attend` is told of a site."""

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        known = {s.id for s in anatomy.sublayers}
        problems = [] if step.sites else [Problem(step.rewrite, "the step names no site")]
        problems += [Problem(s, "the model has no such sublayer") for s in step.sites if s not in known]
        problems += self._option_problems(step)
        for site in step.sites if not problems else ():
            problems += [Problem(site, *found) for found in _unfit(anatomy, site)] or self._own(step, anatomy, site)
        return problems

    def _option_problems(self, step: Step) -> Iterator[Problem]:
        """Options that are none, are missing, or are no whole numbers."""
        known = [*self.numbers, *(f.name for f in fields(self))]
        yield from (
            Problem(step.rewrite, f"no option {n!r}", did_you_mean(n, known)) for n in step.options if n not in known
        )
        for name, least in self.numbers.items():
            if name not in step.options:
                if least:
                    yield Problem(step.rewrite, f"the step tells no {name}", f"options: {{{name}: …}}")
                continue
            for site in step.sites:
                given = step.options[name]
                number = given.get(site) if isinstance(given, Mapping) else given
                if not isinstance(number, int) or isinstance(number, bool) or number < least:
                    yield Problem(site, f"{name} is a whole number of tokens from {least}, not {number!r}")

    def _own(self, step: Step, anatomy: Anatomy, site: str) -> list[Problem]:
        """What else stands in the way of the method at a site that can take another attention function."""
        return []

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """The same as before: products are counted on a few tokens, and a cache holds every token (see `remarks`)."""
        for site in step.sites:
            anatomy.site(site)
        return anatomy.total()

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Change the attentions of `lab.model`. Raises UnsupportedError for the first problem, before any change."""
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        before, after = lab.anatomy.total(), self.forecast(step, lab.anatomy)
        modules = {core_of(lab.anatomy, s)[0]: self.settings(step, s) for s in step.sites}
        receipt = Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
            structure={"steps": [{"format": 1, "kind": "attend", "modules": modules}]},
        )  # fmt: skip
        self.change(step, lab, receipt)
        lab.renew()
        return receipt

    def change(self, step: Step, lab: Lab, receipt: Receipt) -> None:
        """What `apply` does to the model."""
        self.replay(receipt, lab.model)

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])


@rewrite("window", on=Kind.ATTENTION)
@dataclass(frozen=True, kw_only=True)
class Window(Attend):
    """Let attentions see the last `options["window"]` tokens, each its own among them, and the first `sinks` of a text.

    Each option is one number, or one for each site. On texts that are not longer, all is as before, to the last bit.
    Tokens keep their places: sinks are as far away as they are. Costs stay, in what they count: products are those of a
    few tokens, KV bytes those of one. On longer texts fewer keys are read and multiplied: window + sinks of them.
    """

    card: ClassVar[Card]
    each: ClassVar[tuple[str, ...]] = ("window", "sinks")
    numbers: ClassVar[Mapping[str, int]] = {"window": 1, "sinks": 0}

    def settings(self, step: Step, site: str) -> dict[str, Any]:
        """Window, and sinks where there are any."""
        sinks = number_for(step, "sinks", site) if "sinks" in step.options else 0
        return {"window": number_for(step, "window", site)} | ({"sinks": sinks} if sinks else {})

    def _own(self, step: Step, anatomy: Anatomy, site: str) -> list[Problem]:
        module = core_of(anatomy, site)[1]
        told, own = self.settings(step, site), _window_of(module)
        if own and told["window"] >= own:
            return [Problem(site, f"it sees {own} tokens as it is", "take a smaller window")]
        return (
            [Problem(site, "a window of its own hides the first tokens", "sinks: 0")]
            if own and told.get("sinks")
            else []
        )

    @staticmethod
    def remarks(receipt: Receipt) -> Iterator[str]:
        """What the costs do not tell."""
        most = {s: sum(int(number_for(_step(receipt), n, s)) for n in receipt.options) for s in receipt.sites}
        sizes = f"{min(most.values())}" + (f" to {max(most.values())}" if len(set(most.values())) > 1 else "")
        yield (
            f"window: {len(most)} attentions read the keys and values of at most {sizes} tokens; transformers' cache "
            "still holds those of all, so no memory is saved there"
        )

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: two attentions alike, and two with windows and sinks of their own."""
        sites = [s.id for s in anatomy.of_kind(Kind.ATTENTION)]
        mixed = {
            "window": dict(zip(sites[:2], (4, 2), strict=False)),
            "sinks": dict(zip(sites[:2], (0, 2), strict=False)),
        }
        steps = (
            Step(rewrite="window", sites=tuple(sites[1:3]), options={"window": 3}),
            Step(rewrite="window", sites=tuple(sites[:2]), options=mixed),
        )
        return tuple(s for s in steps if not Window().check(s, anatomy))


def _step(receipt: Receipt) -> Step:
    return Step(rewrite=receipt.rewrite, sites=receipt.sites, options=receipt.options)


def core_of(anatomy: Anatomy, site: str) -> tuple[str, Any]:
    """The module of an attention that calls an attention function, and its path; '' and None where there is none."""
    block, branch = anatomy.block(site), anatomy.branch(site)
    core = f"{block.path}.{branch.core}"
    found = [
        (f"{core}.{name}" if name else core, m)
        for name, m in anatomy.model.get_submodule(core).named_modules()
        if hasattr(getattr(m, "config", None), "_attn_implementation") and _looks_up(m)
    ]
    return found[0] if len(found) == 1 else ("", None)


def _looks_up(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in transformers' table."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _window_of(module: Any) -> int:
    """How many tokens an attention sees as it is; 0 for all."""
    config = module.config
    alike = 0 if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    return int(getattr(module, "sliding_window", alike) or 0)


def _unfit(anatomy: Anatomy, site: str) -> Iterator[tuple[str, str]]:
    """Why a sublayer can't take another attention function, and what to do instead."""
    if anatomy.site(site).kind is not Kind.ATTENTION:
        yield "it is no attention", ""
        return
    module = core_of(anatomy, site)[1]
    if module is None:
        yield "its attention is not looked up in transformers' table of attention functions", "drop it, or leave it"
    elif not getattr(module, "is_causal", True):
        yield "its attention looks ahead", "drop it, or leave it"
