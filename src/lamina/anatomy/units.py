"""The units of a model's branches: heads, KV groups, neurons and experts, found by what they do, then certified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lamina.anatomy._units_channels import Channels, block_channels, kept_channels, outer_channels, placed, relative
from lamina.anatomy._units_cut import certify
from lamina.anatomy._units_experts import certify_experts, find_experts
from lamina.anatomy._units_find import NoUnits, Units, find
from lamina.anatomy._units_probe import Given, Rig, given_to
from lamina.anatomy._units_resize import Resized, resized, runs_left, runs_of, slimmer
from lamina.anatomy.parts import Block, Branch, Stack
from lamina.anatomy.stacks import evaluating
from lamina.core.errors import CertificateError, InputError, UnsupportedError
from lamina.core.sites import Cost, Kind, Site, Tie

KINDS: dict[Kind, tuple[Kind, ...]] = {
    Kind.ATTENTION: (Kind.HEAD, Kind.KV_GROUP),
    Kind.CROSS_ATTENTION: (Kind.HEAD, Kind.KV_GROUP),
    Kind.MLP: (Kind.NEURON,),
    Kind.MOE: (Kind.EXPERT,),
}
"""Kind of branch → kinds of its units."""
UNITS = frozenset(k for kinds in KINDS.values() for k in kinds) | {Kind.CHANNEL}
"""The kinds of units."""
FAULTS = (RuntimeError, TypeError, ValueError, IndexError, AssertionError)
"""What a block may raise that is run on numbers of one's own."""
SEEDS = (0, 1, 2)
"""Of the numbers that blocks are filled with, in turn, where some leave a unit without effect."""


@dataclass(frozen=True)
class UnitCertificate:
    """How units were certified: "cut" (zeroing, masking and cutting agree) or "mask" (zeroing and masking do).

    `error` is relative to what a unit adds; `tested` are the units that were tried.
    """

    site: Site
    how: str
    error: float
    tested: tuple[int, ...]


@dataclass(eq=False)
class UnitTable:
    """The units of one model, found branch by branch when they are asked for; blocks built alike share the finding."""

    model: nn.Module
    stacks: tuple[Stack, ...]
    sample: Mapping[str, Any]
    _given: dict[str, Given] = field(default_factory=dict[str, Given])
    _alike: dict[Any, dict[Kind, Units | str]] = field(default_factory=dict)
    _found: dict[str, dict[Kind, Units | str]] = field(default_factory=dict)
    _streams: dict[str, Channels | str] = field(default_factory=dict)

    def of(self, block: Block, branch: Branch) -> dict[Kind, Units | str]:
        """Per kind: the certified units, their ties relative to the block, or why there are none."""
        if block.turns > 1:
            return dict.fromkeys(KINDS.get(branch.site.kind, ()), f"its weights serve {block.turns} passes")
        if branch.site.id not in self._found:
            key = (_signature(self.model.get_submodule(block.path)), branch.core, branch.site.kind)
            if key not in self._alike:
                self._alike[key] = self._look(block, branch)
            self._found[branch.site.id] = self._alike[key]
        return self._found[branch.site.id]

    def site(self, block: Block, branch: Branch, kind: Kind) -> Site | None:
        """The site of the units of one kind."""
        units = self.of(block, branch).get(kind)
        if not isinstance(units, Units):
            return None
        return Site(f"{branch.site.id}.{kind.value}", kind, branch.site.path, branch.site.block, units.width)

    def ties(self, block: Block, branch: Branch, kind: Kind) -> tuple[Tie, ...]:
        """The ties of the units of one kind, with absolute names."""
        units = self.of(block, branch)[kind]
        assert isinstance(units, Units)
        return tuple(replace(t, param=f"{block.path}.{t.param}") for t in units.ties)

    def certify(self, block: Block, branch: Branch, kind: Kind, ties: tuple[Tie, ...] | None = None) -> UnitCertificate:
        """Certify the units of this very block again, by default with the ties that were found."""
        units = self.of(block, branch)[kind]
        site = self.site(block, branch, kind)
        assert isinstance(units, Units)
        assert site is not None
        if ties is not None:
            own = tuple(replace(t, param=t.param.removeprefix(f"{block.path}.")) for t in ties)
            units = replace(units, ties=own, outputs=tuple(t for t in own if t.param == units.outputs[0].param))
        try:
            with evaluating(self.model), torch.enable_grad():
                made = _certified(_rig(self.model.get_submodule(block.path), self.given(block)), units)
        except NoUnits as reason:
            raise CertificateError(str(reason), where=site.id) from None
        return UnitCertificate(site, made.how, made.error, made.tested)

    def channels(self, stack: Stack) -> Channels | str:
        """The channels of a stack's stream, with absolute names, or why they can't be told."""
        if stack.path not in self._streams:
            try:
                stack.expect_unlooped("no channels")
                with evaluating(self.model), torch.enable_grad():
                    self._streams[stack.path] = self._channels(stack)
            except (NoUnits, UnsupportedError, *FAULTS) as reason:
                self._streams[stack.path] = str(reason)[:200]
        return self._streams[stack.path]

    def slimmer(self, stack: Stack, gone: Sequence[int]) -> dict[str, Any]:
        """How the model loses channels of a stack's stream, in plain data as of `without_units`."""
        found = self.channels(stack)
        if not isinstance(found, Channels):
            raise NoUnits(found)
        left = runs_of([c for c in range(stack.width) if c not in set(gone)])
        told: dict[str, dict[str, Any]] = {"cuts": {}, "tied": {}, "numbers": {}, "configs": {}}
        names: dict[int, list[str]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        held = {n: tuple(all_) for all_ in names.values() for n in all_}
        for (name, *others), dim in dict.fromkeys((held[t.param], t.dim) for t in found.ties):
            told["cuts"].setdefault(name, []).append((dim, left))
            told["tied"] |= {name: others} if others else {}
        alike: dict[Any, Resized] = {}
        for block in stack.blocks:
            module, given = self.model.get_submodule(block.path), self.given(block)
            key = _signature(module)
            if key not in alike:
                narrow = kept_channels(block, given, stack.width, gone)
                alike[key] = slimmer(_rig(module, given), relative(found, block), stack.width, gone, narrow)
            told["numbers"] |= _absolute(alike[key].numbers, block)
            told["configs"] |= _absolute(alike[key].configs, block)
        return told

    def _channels(self, stack: Stack) -> Channels:
        found: list[Channels] = []
        alike: dict[Any, Channels] = {}
        for block in stack.blocks:
            module = self.model.get_submodule(block.path)
            key = _signature(module)
            if key not in alike:
                alike[key] = block_channels(_rig(module, self.given(block)), block, stack.width)
            found.append(placed(alike[key], block))
        found.append(outer_channels(self.model, stack, self.sample, stack.width))
        return Channels(*(tuple(t for c in found for t in getattr(c, k)) for k in ("reads", "writes", "scales")))

    def without(self, block: Block, branch: Branch, kind: Kind, gone: Sequence[int]) -> dict[str, Any]:
        """How a branch loses some of its units, in plain data as of `UnitSites.without_units`."""
        units = self.of(block, branch)[kind]
        if not isinstance(units, Units):
            raise NoUnits("its units can't be cut")
        rig = _rig(self.model.get_submodule(block.path), self.given(block))
        told, cuts = resized(rig, units, gone), runs_left(rig, units, gone)
        parts = {"cuts": cuts, "numbers": told.numbers, "configs": told.configs}
        return {k: _absolute(v, block) for k, v in parts.items()}

    def given(self, block: Block) -> Given:
        """What the block gets in a run of the model on the sample."""
        if not self._given:
            with evaluating(self.model):
                self._given |= given_to(self.model, self.stacks, self.sample)
        return self._given[block.path]

    def _look(self, block: Block, branch: Branch) -> dict[Kind, Units | str]:
        wanted = KINDS.get(branch.site.kind, ())
        module = self.model.get_submodule(block.path)
        found: dict[Kind, Units | str] = dict.fromkeys(wanted, "")
        for seed in SEEDS if wanted else ():
            missing = [k for k, v in found.items() if isinstance(v, str)]
            if missing:
                try:
                    with evaluating(self.model), torch.enable_grad():  # they are found by gradients
                        made = _tried(_rig(module, self.given(block), seed), branch, module)
                except (RuntimeError, ValueError, TypeError, KeyError) as error:
                    made = dict.fromkeys(wanted, f"the block does not run on its own: {str(error)[:120]}")
                found |= {k: made[k] for k in missing if not (found[k] and isinstance(made[k], str))}
        return found


def _absolute(names: Mapping[str, Any], block: Block) -> dict[str, Any]:
    """With the names that modules and tensors of a block have in the model."""
    return {f"{block.path}.{n}" if n else block.path: v for n, v in names.items()}


def _rig(module: nn.Module, given: Given, seed: int = 0) -> Rig:
    """The block in float64, or where its class can't do that, in float32."""
    rig = Rig(module, given, seed)
    try:
        rig.run()
    except (RuntimeError, TypeError, ValueError):
        rig = Rig(module, given, seed, torch.float32)
        rig.run()
    return rig


def _tried(rig: Rig, branch: Branch, module: nn.Module) -> dict[Kind, Units | str]:
    names = [n for n, _ in branch.owned(module)]
    found: dict[Kind, Units | str]
    if branch.site.kind is Kind.MOE:
        try:
            found = {Kind.EXPERT: find_experts(rig, names)}
        except NoUnits as reason:
            found = {Kind.EXPERT: str(reason)}
    else:
        ran = rig.matrices(names)[::-1]
        tails = [*([branch.tail] if branch.tail in ran else []), *(p for p in ran[:2] if p != branch.tail)]
        tails = tails[:1] if branch.site.kind is Kind.MLP else tails  # what enters the first map is no neuron
        found = find(rig, branch.site.kind, tails, names)
    for kind, units in found.items():
        if isinstance(units, Units):
            try:
                found[kind] = _certified(rig, units)
            except (NoUnits, RuntimeError, IndexError, KeyError) as reason:
                found[kind] = str(reason)[:200]
    return found


def _certified(rig: Rig, units: Units) -> Units:
    return certify_experts(rig, units) if units.kind is Kind.EXPERT else certify(rig, units)


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """How a block is built: classes, shapes and settings of its modules, but for its own number."""
    parts = []
    for path, module in block.named_modules():
        shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False))
        kept = sorted((k, v) for k, v in vars(module).items() if isinstance(v, bool | float | str | int))
        parts.append((path, type(module), shapes, tuple(kv for kv in kept if kv[0] not in ("layer_idx", "layer_id"))))
    return tuple(parts)


class UnitSites:
    """The part of an anatomy that knows units. Blocks and branches come from `stacks`, by the ids of their sites."""

    model: nn.Module
    stacks: tuple[Stack, ...]
    sample: dict[str, Any]

    def _units_of(self) -> UnitTable:
        table = self.__dict__.get("_unit_table")
        if table is None or table.model is not self.model:
            table = self.__dict__["_unit_table"] = UnitTable(self.model, self.stacks, self.sample)
        return table

    def _placed(self, site_id: str) -> tuple[Block, Branch] | None:
        places = {x.site.id: (b, x) for k in self.stacks for b in k.blocks for x in b.branches}
        return places.get(site_id)

    def units(self, site: Site | str, kind: Kind | None = None) -> tuple[Site, ...]:
        """The certified units of a sublayer, or of all sublayers of a block (of one kind)."""
        table, found = self._units_of(), []
        for block, branch in self._within(site if isinstance(site, str) else site.id):
            for one in KINDS.get(branch.site.kind, ()):
                made = table.site(block, branch, one) if kind in (None, one) else None
                found += [made] if made is not None else []
        return tuple(found)

    def refused_units(self, site: Site | str) -> dict[str, str]:
        """Unit sites that a sublayer or block was looked at for and does not have → why not."""
        table, found = self._units_of(), {}
        for block, branch in self._within(site if isinstance(site, str) else site.id):
            made = table.of(block, branch)
            found |= {f"{branch.site.id}.{k.value}": v for k, v in made.items() if isinstance(v, str)}
        return found

    def certify_units(self, site: Site, ties: tuple[Tie, ...] | None = None) -> UnitCertificate:
        """Certify units on their own block: zeroing equals masking and, where the class allows, cutting.

        `ties`: others in the place of those that were found. Raises CertificateError with what is off.
        """
        return self._units_of().certify(*self._expect_placed(site), site.kind, ties)

    def unit_ties(self, site: Site) -> tuple[Tie, ...]:
        """The slices that each unit of a site owns; a range that lies outside of its parameter is empty."""
        for stack in self.stacks if site.kind is Kind.CHANNEL else ():
            found = self._units_of().channels(stack)
            if isinstance(found, Channels) and site == self.channels(stack):
                return found.ties
        place = self._placed(site.id.rpartition(".")[0])
        if place is None or self._units_of().site(*place, site.kind) != site:
            raise InputError("the model has no such units", where=site.id, hint="ask units() of its sublayer")
        return self._units_of().ties(*place, site.kind)

    def unit_cost(self, site: Site) -> Cost:
        """What one unit owns: parameters and bytes, and a multiply-add per weight of its matrices and token."""
        parameters = dict(self.model.named_parameters())
        held = [(parameters[t.param], t) for t in self.unit_ties(site) if t.param in parameters]  # others are buffers
        owned = [(p, p.numel() // p.shape[t.dim] * t.size) for p, t in held]
        sizes = sum(n for _, n in owned), sum(n * p.element_size() for p, n in owned)
        return Cost(*sizes, macs=sum(n for p, n in owned if p.ndim > 1))

    def tail(self, site: Site) -> str:
        """The path of the linear map whose input columns a site's units are; '' for experts."""
        block, branch = self._expect_placed(site)
        units = self._units_of().of(block, branch)[site.kind]
        return f"{block.path}.{units.tail}" if isinstance(units, Units) and units.tail else ""

    def columns(self, site: Site) -> list[range]:
        """Of each unit, the columns of the tail's input that are its own, as ranges of one length and step.

        Unit i has those of `columns[i]`; a unit whose columns lie apart is an error.
        """
        block, branch = self._expect_placed(site)
        units = self._units_of().of(block, branch)[site.kind]
        outputs = units.outputs if isinstance(units, Units) else ()
        if len(outputs) != 1 or not self.tail(site):
            raise UnsupportedError("its units own no run of columns", where=site.id)
        tie = outputs[0]
        return [range(tie.start + i * tie.size, tie.start + (i + 1) * tie.size) for i in range(site.width)]

    def grouped(self, site: Site) -> tuple[int, int]:
        """How many units of a site share a KV head, and how many heads one unit has; 1 and 1 beside attentions."""
        units = self._units_of().of(*self._expect_placed(site))[site.kind]
        return (units.group, units.inner) if isinstance(units, Units) else (1, 1)

    def active(self, site: Site) -> int:
        """How many experts a token goes to."""
        units = self._units_of().of(*self._expect_placed(site))[site.kind]
        return units.active if isinstance(units, Units) else 0

    def without_units(self, site: Site, gone: Sequence[int]) -> dict[str, Any]:
        """How the model loses these units of a site, in plain data for `lamina.rewrites.structure`, names absolute.

        `cuts` of tensors, `numbers` of modules and fields of `configs` that follow. Raises UnsupportedError where the
        class can't run without them.
        """
        table = self._units_of()
        stack = next((k for k in self.stacks if site.kind is Kind.CHANNEL and site.path == k.path), None)
        try:
            with evaluating(self.model), torch.no_grad():
                found = (
                    table.slimmer(stack, gone)
                    if stack is not None
                    else table.without(*self._expect_placed(site), site.kind, gone)
                )
        except NoUnits as reason:
            raise UnsupportedError(str(reason), where=site.id, hint="cut other units, or none") from None
        return {k: v for k, v in found.items() if v}

    def _expect_placed(self, site: Site) -> tuple[Block, Branch]:
        place = self._placed(site.id.rpartition(".")[0])
        if place is None:
            raise InputError("no site of units", where=site.id)
        return place

    def channels(self, stack: Stack) -> Site | None:
        """The channels of a stack's stream as units, None where they can't be told (`refused_channels` says why)."""
        if not isinstance(self._units_of().channels(stack), Channels):
            return None
        site = ".".join(x for x in (stack.name, Kind.CHANNEL.value) if x)
        return Site(site, Kind.CHANNEL, stack.path, None, stack.width)

    def stream(self, stack: Stack) -> Channels:
        """The ties of a stack's channels, by what they do. Raises UnsupportedError where they can't be told."""
        found = self._units_of().channels(stack)
        if isinstance(found, str):
            raise UnsupportedError(found, where=stack.path)
        return found

    def refused_channels(self, stack: Stack) -> str:
        """Why a stack's stream has no channels that were certified; '' where it has."""
        found = self._units_of().channels(stack)
        return found if isinstance(found, str) else ""

    def coverage(self) -> dict[str, tuple[str, ...]]:
        """Every parameter's name → the sublayers that own it: one, or none where it is uncovered."""
        owners: dict[int, list[str]] = {}
        for block in (b for k in self.stacks for b in k.blocks if b.turns == 1):
            module = self.model.get_submodule(block.path)
            for branch in block.branches:
                for parameter in {id(p): p for _, p in branch.owned(module)}.values():
                    owners.setdefault(id(parameter), []).append(branch.site.id)
        return {name: tuple(owners.get(id(p), ())) for name, p in self.model.named_parameters()}

    def uncovered(self) -> dict[str, str]:
        """Parameters that no sublayer owns → the block that holds them, or '' outside of all stacks.

        Norms that several sublayers share, embeddings, the last norm, heads; all of a module that makes several passes.
        """
        blocks = {b.path: b.site.id for k in self.stacks for b in reversed(k.blocks)}
        return {
            name: next((site for path, site in blocks.items() if name.startswith(f"{path}.")), "")
            for name, held in self.coverage().items()
            if not held
        }

    def _within(self, site_id: str) -> list[tuple[Block, Branch]]:
        place = self._placed(site_id)
        if place is not None:
            return [place]
        blocks = [b for k in self.stacks for b in k.blocks if b.site.id == site_id]
        if not blocks:
            raise InputError("the model has no such block or sublayer", where=site_id)
        return [(b, x) for b in blocks for x in b.branches]
