"""Drop blocks and sublayers: what is dropped is not computed, not stored, has no norm and no cache entry."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Receipt, Step
from lamina.core.errors import LaminaError, UnsupportedError
from lamina.core.registry import rewrite
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from lamina.anatomy import Anatomy, Stack
    from lamina.anatomy.parts import Block, Branch
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
        return self._steps(step, anatomy)[0]

    def _steps(self, step: Step, anatomy: Anatomy) -> tuple[list[Problem], list[dict[str, Any]]]:
        """What stands in the way, and how the structure changes, stack by stack."""
        problems = [] if step.sites else [Problem("drop", "the step names no site")]
        known = {s.id for s in anatomy.sites}
        problems += [Problem(site, "the model has no such site") for site in step.sites if site not in known]
        if problems:
            return problems, []
        steps = list[dict[str, Any]]()
        gone = anatomy.expand(step.sites)
        problems += _half_blocks(anatomy, step.sites, gone)
        for stack in anatomy.stacks:
            parts = [x for b in stack.blocks for x in b.branches]
            if all(x.site.id in gone for x in parts):
                problems.append(Problem(stack.path, "nothing would be left of the stack", "keep at least one block"))
            elif (held := _measuring(parts)) and all(x.site.id in gone for x in held):
                problems.append(Problem(stack.path, "no attention would be left", "keep at least one"))
            elif stack_sites(anatomy, stack, gone):
                try:
                    steps.append(structure(anatomy, stack, gone))
                except UnsupportedError as error:
                    problems.append(Problem(error.where or stack.path, error.what, error.hint or ""))
        return problems, steps

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        return anatomy.total() - anatomy.freed(step.sites)

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Drop the sites from `lab.model` in place and find its anatomy anew.

        On the anatomy's sample, the model must then answer as the one did in which the sites were silenced on trial.
        Raises UnsupportedError, before anything is changed, for the first problem that `check` names; and, when the
        model is spoilt, where it answers otherwise.
        """
        from lamina.rewrites._drop_proof import expect_same, tried

        problems, steps = self._steps(step, lab.anatomy)
        for problem in problems:
            raise problem.error()
        before, after = lab.anatomy.total(), self.forecast(step, lab.anatomy)
        gone = lab.anatomy.expand(step.sites)
        before_it = tried(lab.anatomy, gone)
        receipt = Receipt(
            rewrite="drop", sites=lab.anatomy.collapse(gone), before=before, after=after, structure={"steps": steps}
        )
        self.replay(receipt, lab.model)
        expect_same(before_it, lab.anatomy, lab.anatomy.collapse(gone))
        lab.renew()
        return receipt

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])


def _half_blocks(anatomy: Anatomy, sites: Sequence[str], gone: frozenset[str]) -> list[Problem]:
    """Sublayers that are all of a block that does more: to what it hands on beside the stream, or to the stream."""
    found = []
    for block in (b for k in anatomy.stacks for b in k.blocks if b.site.id not in sites):
        parts = [x.site.id for x in block.branches]
        if gone.issuperset(parts) and (block.tells or (len(parts) == 1 and not block.plain)):
            what = "the next block reads what its block computes beside the stream"
            what = what if block.tells else "its block does more to the stream than to add this"
            found.append(Problem(parts[0], what, f"drop the whole block, {block.site.id}"))
    return found


def _measuring(parts: Sequence[Branch]) -> list[Branch]:
    """The branches by which a cache knows how many tokens it holds: attentions, or what else there is."""
    held = [x for x in parts if x.cached]
    return [x for x in held if x.site.kind is Kind.ATTENTION] or held


def stack_sites(anatomy: Anatomy, stack: Stack, gone: frozenset[str]) -> bool:
    """Whether any of `gone` lies in this stack."""
    return any(x.site.id in gone for b in stack.blocks for x in b.branches)


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
    if branch.hands:
        found["hands"] = [list(h) for h in branch.hands]
    if branch.widths:
        found["widths"] = [list(w) for w in branch.widths]
    return found


def structure(
    anatomy: Anatomy, stack: Stack, gone: frozenset[str], maps: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """One step of `lamina.rewrites.structure.replay`, in plain data.

    `maps`: of the sublayers that are gone, those whose cores a map replaces, with what it is (see `lamina_parts`).
    Raises UnsupportedError where the config can't say it.
    """
    from lamina.anatomy.counting import change

    maps = maps or {}
    if stack.looped:
        return _fewer_passes(anatomy, stack, gone)
    own, others = _entries(anatomy, stack)
    elements = _elements(anatomy, stack)
    blocks = {n: b for n, (_, _, b) in enumerate(elements) if b is not None}
    whole = [n for n, b in blocks.items() if all(x.site.id in gone and x.site.id not in maps for x in b.branches)]
    branches = [
        _branch(n, x) | ({"map": dict(maps[x.site.id])} if x.site.id in maps else {})
        for n, b in blocks.items()
        for x in b.branches
        if x.site.id in gone and n not in whole
    ]
    for x in (x for n, b in blocks.items() if n not in whole for x in b.branches if x.site.id in gone and x.tells):
        hint = "keep it, or drop its whole block"
        raise UnsupportedError("the next block reads what it computes beside the stream", where=x.site.id, hint=hint)
    kept = _kept(elements, gone, own | others, whole)
    said = change(anatomy.model, stack.path, list(kept.values()))
    if others:
        _check_first(anatomy, stack, {n: b for n, b in blocks.items() if n in kept}, gone, own, kept)
    if said.sliced:
        _check_slices(anatomy, stack, [blocks[n].site.id for n in whole], kept, said.sliced)
    return {
        "format": 1,
        "kind": "drop",
        "stack": stack.path,
        "depth": len(elements),
        "blocks": whole,
        "branches": branches,
        "cached": sorted(own | others),
        **({"first": sorted(own)} if others else {}),
        "stream": stack.blocks[0].stream,
        **({"carries": [list(c) for c in stack.carries]} if stack.carries else {}),
        "index": list(stack.index),
        **({"strides": {k: list(v) for k, v in stack.strides.items()}} if stack.strides else {}),
        "config_path": list(said.path),
        "config": said.edits,
        "copies": dict(said.copies),
        "held": dict(said.held),
        **({"sliced": dict(said.sliced), "kept": list(kept.values())} if said.sliced else {}),
    }


def _fewer_passes(anatomy: Anatomy, stack: Stack, gone: frozenset[str]) -> dict[str, Any]:
    """The step where blocks are passes of one module: the config says a smaller number of them, no module goes."""
    from lamina.anatomy.counting import fewer_passes
    from lamina.anatomy.stacks import call, evaluating

    for block in stack.blocks:
        left = [x.site.id for x in block.branches if x.site.id not in gone]
        if left and len(left) < len(block.branches):
            site = next(x.site.id for x in block.branches if x.site.id in gone)
            what = f"its weights serve {block.turns} passes"
            raise UnsupportedError(what, where=site, hint=f"drop the whole pass, {block.site.id}")
    kept = [n for n, b in enumerate(stack.blocks) if not all(x.site.id in gone for x in b.branches)]
    with evaluating(anatomy.model):
        said = fewer_passes(
            anatomy.model, stack.path, len(stack.blocks), kept, lambda: call(anatomy.model, anatomy.sample)
        )
    return {
        "format": 1,
        "kind": "drop",
        "stack": stack.path,
        "depth": len(list(anatomy.model.get_submodule(stack.path).children())),
        "passes": kept,
        "blocks": [],
        "branches": [],
        "cached": [],
        "stream": stack.blocks[0].stream,
        "index": [],
        "config_path": list(said.path),
        "config": said.edits,
    }


def _entries(anatomy: Anatomy, stack: Stack) -> tuple[set[str], set[str]]:
    """The cores that hold a cache entry: those that count the tokens, and others (cross-attention, convolutions)."""
    numbered = {key.rpartition(".")[0] for key in (*stack.index, *stack.strides)}
    own = {x.core for b in stack.blocks for x in b.branches if x.cached}
    others = set[str]()
    for block in stack.blocks:
        module = anatomy.model.get_submodule(block.path)
        holding = {n for n, m in module.named_modules() if n in numbered and _takes_cache(m)}
        for x in block.branches:
            if any(f"{n}.".startswith(f"{path}.") for n in holding for path in (x.core, *x.own)):
                others.add(x.core)
    return (own, others - own) if own else (others, own)


def _takes_cache(module: nn.Module) -> bool:
    """Whether a module is handed the cache."""
    return any("past" in name or "cache" in name for name in inspect.signature(module.forward).parameters)


_Element = tuple[int, Any, "Block | None"]
"""One of a container's modules, groups opened: the rank of the layer it belongs to, itself, and which block it is."""


def _elements(anatomy: Anatomy, stack: Stack) -> list[_Element]:
    """What the stack's container holds: the blocks, and perhaps others (the first of a stage, which narrows).

    Raises UnsupportedError where a block is not an element of it.
    """
    from lamina.rewrites.structure import flat

    blocks = {id(anatomy.model.get_submodule(b.path)): b for b in stack.blocks}
    children = anatomy.model.get_submodule(stack.path).children()
    found = [(rank, m, blocks.get(id(m))) for rank, element in enumerate(children) for m in flat([element])]
    if [b for _, _, b in found if b is not None] != list(stack.blocks):
        raise UnsupportedError("the blocks are not the container's own, in order", where=stack.path)
    return found


def _kept(elements: Sequence[_Element], gone: frozenset[str], cached: set[str], whole: Sequence[int]) -> dict[int, int]:
    """Which of the layers that the config counts remain: number of the element that stands for one → which it was.

    A layer is an element that holds a cache entry, with those beside it that lost theirs; or one that never had any.
    """
    from lamina.rewrites.structure import holds_cache

    ranks = [rank for rank, _, _ in elements]
    kept: dict[int, int] = {}
    for number, (rank, module, block) in enumerate(elements):
        branches = () if block is None else block.branches
        cut = {x.core for x in branches if x.site.id in gone}
        bare = ranks.count(rank) == 1 and not holds_cache(module, cached)
        if block is None or (number not in whole and (bare or holds_cache(module, cached - cut))):
            kept[number] = rank
    return kept


def _check_slices(
    anatomy: Anatomy, stack: Stack, whole: Sequence[str], kept: Mapping[int, int], sliced: Mapping[str, int]
) -> None:
    """Each layer has a part of its own in tensors outside the stack: those of layers that are gone serve no other.

    Shown by other numbers in their parts, which change nothing where the layers are gone. Raises UnsupportedError.
    """
    import torch

    from lamina.anatomy.stacks import call, evaluating
    from lamina.anatomy.trial import ablated
    from lamina.rewrites._drop_proof import outputs

    name, places = next(iter(sliced)), [n for n, b in enumerate(stack.blocks) if b.site.id in whole]
    depth = len(stack.blocks)
    if len(kept) + len(whole) != depth:
        hint = "drop whole blocks, or sublayers without a cache entry"
        raise UnsupportedError(f"{name} has a part for each layer, cache entry or not", where=stack.path, hint=hint)
    model = anatomy.model
    held = {n: model.get_parameter(n).data for n in sliced}
    if any(t.is_meta for t in held.values()):
        return
    with evaluating(model), ablated(model, anatomy, whole):
        before = outputs(call(model, anatomy.sample))
        try:
            for n, tensor in held.items():
                parts = tensor.clone().unflatten(sliced[n], (depth, -1))
                theirs = torch.tensor(places, device=tensor.device)
                parts.index_add_(sliced[n], theirs, torch.ones_like(parts.index_select(sliced[n], theirs)))
                model.get_parameter(n).data = parts.flatten(sliced[n], sliced[n] + 1)
            after = outputs(call(model, anatomy.sample))
        finally:
            for n, tensor in held.items():
                model.get_parameter(n).data = tensor
    if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        raise UnsupportedError(f"{name} has no part of its own for each layer", where=stack.path)


def _check_first(
    anatomy: Anatomy,
    stack: Stack,
    blocks: Mapping[int, Block],
    gone: frozenset[str],
    own: set[str],
    kept: Mapping[int, int],
) -> None:
    """A cache is measured by its first entry: where the first layer has none of that kind, another takes its number.

    Raises UnsupportedError where the config tells the two apart.
    """
    from lamina.anatomy.config import config_of, told_apart

    measuring = [n for n, b in blocks.items() if any(x.core in own and x.site.id not in gone for x in b.branches)]
    lead, first = kept[measuring[0]], next(iter(kept.values()))
    depth = len(list(anatomy.model.get_submodule(stack.path).children()))
    if told_apart(config_of(anatomy.model), depth, first, lead):
        hint = "drop what else it has of the cache as well, or keep both"
        raise UnsupportedError("the first block can't do without attention of its own", where=stack.path, hint=hint)
