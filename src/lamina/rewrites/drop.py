"""Drop blocks and sublayers: what is dropped is not computed, not stored, has no norm and no cache entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Receipt, Step
from lamina.core.errors import LaminaError, UnsupportedError
from lamina.core.registry import rewrite
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from torch import nn

    from lamina.anatomy import Anatomy, Stack
    from lamina.anatomy.parts import Branch
    from lamina.core.sites import Cost
    from lamina.lab import Lab


@dataclass(frozen=True)
class Problem:
    """Why a step can't be done at a site, and what to do instead."""

    where: str
    what: str
    hint: str = ""

    def error(self) -> LaminaError:
        """The problem as an error."""
        return UnsupportedError(self.what, where=self.where, hint=self.hint)


@rewrite("drop", on=(Kind.BLOCK, *sorted(SUBLAYERS)), status="stable")
@dataclass(frozen=True, kw_only=True)
class Drop:
    """Take whole blocks or single residual branches out of the network."""

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        problems = [] if step.sites else [Problem("drop", "the step names no site")]
        known = {s.id for s in anatomy.sites}
        problems += [Problem(site, "the model has no such site") for site in step.sites if site not in known]
        if problems:
            return problems
        gone = anatomy.expand(step.sites)
        for stack in anatomy.stacks:
            parts = [x for b in stack.blocks for x in b.branches]
            if all(x.site.id in gone for x in parts):
                problems.append(Problem(stack.path, "nothing would be left of the stack", "keep at least one block"))
            elif any(x.cached for x in parts) and all(x.site.id in gone for x in parts if x.cached):
                problems.append(Problem(stack.path, "no attention would be left", "keep at least one"))
            elif stack.owner is None and _config(anatomy.model) is not None and stack_sites(anatomy, stack, gone):
                problems.append(Problem(stack.path, "no config counts this stack's layers"))
            else:
                try:
                    structure(anatomy, stack, gone)
                except UnsupportedError as error:
                    problems.append(Problem(stack.path, error.what, error.hint))
        return problems

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        return anatomy.total() - anatomy.freed(step.sites)

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Drop the sites from `lab.model` in place and find its anatomy anew.

        Raises UnsupportedError, before anything is changed, for the first problem that `check` names.
        """
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        before, after = lab.anatomy.total(), self.forecast(step, lab.anatomy)
        gone = lab.anatomy.expand(step.sites)
        steps = [structure(lab.anatomy, k, gone) for k in lab.anatomy.stacks if stack_sites(lab.anatomy, k, gone)]
        receipt = Receipt(
            rewrite="drop", sites=lab.anatomy.collapse(gone), before=before, after=after, structure={"steps": steps}
        )
        self.replay(receipt, lab.model)
        lab.renew()
        return receipt

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])


def stack_sites(anatomy: Anatomy, stack: Stack, gone: frozenset[str]) -> bool:
    """Whether any of `gone` lies in this stack."""
    return any(x.site.id in gone for b in stack.blocks for x in b.branches)


def _config(model: Any) -> Any:
    return getattr(model, "config", None)


def _branch(number: int, branch: Branch) -> dict[str, Any]:
    """How one branch is taken out of its block, in plain data."""
    found: dict[str, Any] = {
        "block": number,
        "core": branch.core,
        "own": list(branch.own),
        "stream": branch.stream,
        "returns": [list(r) for r in branch.returns],
    }
    if branch.joins:
        found["joins"] = True
    if branch.keeps:
        found["keeps"] = list(branch.keeps)
    if branch.widths:
        found["widths"] = [list(w) for w in branch.widths]
    return found


def structure(anatomy: Anatomy, stack: Stack, gone: frozenset[str]) -> dict[str, Any]:
    """One step of `lamina.rewrites.structure.replay`, in plain data.

    Raises UnsupportedError where the config can't say it.
    """
    from lamina.anatomy.config import config_path, edits

    whole = [n for n, b in enumerate(stack.blocks) if all(x.site.id in gone for x in b.branches)]
    branches = [
        _branch(n, x) for n, b in enumerate(stack.blocks) for x in b.branches if x.site.id in gone and n not in whole
    ]
    held = {n for n, b in enumerate(stack.blocks) if any(x.cached and x.site.id not in gone for x in b.branches)}
    caching = [n for n, b in enumerate(stack.blocks) if any(x.cached for x in b.branches)]
    rest = [n for n in range(len(stack.blocks)) if n not in whole]
    layers = caching or list(range(len(stack.blocks)))
    kept = [rank for rank, n in enumerate(layers) if n in (held if caching else set(rest))]
    config = _config(anatomy.model.get_submodule(stack.owner)) if stack.owner is not None else None
    return {
        "format": 1,
        "kind": "drop",
        "stack": stack.path,
        "depth": len(stack.blocks),
        "blocks": whole,
        "branches": branches,
        "cached": sorted({x.core for b in stack.blocks for x in b.branches if x.cached}),
        "stream": stack.blocks[0].stream,
        "index": list(stack.index),
        "owner": stack.owner,
        "config_path": config_path(anatomy.model, config),
        "config": {} if config is None else edits(config, len(layers), kept, where=stack.path),
    }
