"""Anatomy: the sites of one model, how they hang on the residual stream, and the proof that this is so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lamina.anatomy.branches import find_branches, find_stream, returns_of, tokens_of
from lamina.anatomy.config import index_attributes, index_strides, owner_of
from lamina.anatomy.costs import Tied, kv_bytes, ledger, still_held, tied
from lamina.anatomy.joins import StreamError
from lamina.anatomy.linears import LinearSites
from lamina.anatomy.parts import Block, Branch, Certificate, Ledger, Stack
from lamina.anatomy.stacks import Seen, call, carries, default_sample, evaluating, find_stacks, linked
from lamina.anatomy.trace import Flops
from lamina.anatomy.units import UNITS, UnitSites
from lamina.core.errors import CertificateError, InputError, UnsupportedError, did_you_mean
from lamina.core.sites import SUBLAYERS, Cost, Kind, Site, Tie

TOLERANCE = 1e-5
"""Relative residual error that a float32 block may show; other types get their own rounding step."""


class Anatomy(UnitSites, LinearSites):
    """The sites of one model in depth order: each block, then its sublayers; units and linear maps where asked for."""

    def __init__(self, model: nn.Module, stacks: tuple[Stack, ...], sample: Mapping[str, Any], macs: int) -> None:
        self.model = model
        self.stacks = stacks
        self.sample = dict(sample)
        self._macs = macs

    @classmethod
    def of(cls, model: nn.Module, sample: Mapping[str, Tensor] | None = None) -> Anatomy:
        """Discover the anatomy by running the model once, then each block once, on a few tokens.

        `sample` holds the keyword inputs of one forward, batch first; by default seven token ids.
        Raises UnsupportedError (no stack) or CertificateError (a block is not its input plus branches).
        """
        with evaluating(model):
            given = dict(sample) if sample is not None else default_sample(model)
            chains = find_stacks(model, given)
            chains = _with_stream(model, chains)
            names = _stack_names(chains)
            _, largest = max(chains, key=lambda c: _weight(model, c[0]))
            tokens = tokens_of(largest[0].entering)
            for seen in (s for _, chain in chains for s in chain):
                seen.tokens = tokens
            stacks = tuple(_stack(model, n, p, c) for n, (p, c) in zip(names, chains, strict=True))
            with Flops() as counter:
                call(model, given)
            return cls(model, stacks, given, counter.total // 2 // tokens)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Blocks and sublayers in depth order."""
        return tuple(s for k in self.stacks for b in k.blocks for s in (b.site, *(x.site for x in b.branches)))

    @cached_property
    def _by_id(self) -> dict[str, Site]:
        return {s.id: s for s in self.sites}

    @cached_property
    def _branches(self) -> dict[str, tuple[Stack, Block, Branch]]:
        return {x.site.id: (k, b, x) for k in self.stacks for b in k.blocks for x in b.branches}

    @cached_property
    def _blocks(self) -> dict[str, tuple[Stack, Block]]:
        return {b.site.id: (k, b) for k in self.stacks for b in k.blocks}

    @cached_property
    def _ledger(self) -> Ledger:
        return ledger(self.model, self.stacks, kv_bytes(self.model, self.sample), self._macs)

    def site(self, site_id: str) -> Site:
        """One site by its id, also a linear map or the units of a sublayer; an unknown one is an error with a hint."""
        if site_id in self._by_id:
            return self._by_id[site_id]
        inside = next((s for s in self.inner_sites(site_id.rpartition(".")[0]) if s.id == site_id), None)
        inside = self._linear_table().get(site_id) if inside is None and "." in site_id else inside
        if inside is None and site_id.rpartition(".")[2] == Kind.CHANNEL:
            inside = next((c for k in self.stacks if (c := self.channels(k)) and c.id == site_id), None)
        if inside is None:
            raise InputError("the model has no such site", where=site_id, hint=did_you_mean(site_id, self._by_id))
        return inside

    def inner_sites(self, site_id: str) -> tuple[Site, ...]:
        """The units of a sublayer; none for anything else."""
        return self.units(site_id) if site_id in self._branches else ()

    def of_kind(self, *kinds: Kind) -> tuple[Site, ...]:
        """The sites of these kinds, in depth order: of a sublayer, its units come behind it, then its linear maps.

        Units and linear maps are found when they are first asked for. The channels of streams come last.
        """
        found = []
        for site in self.sites:
            found += [site] if site.kind in kinds else []
            if site.id in self._branches:
                found += [u for k in kinds if k in UNITS for u in self.units(site, k)]
                found += self.linears(site) if Kind.LINEAR in kinds else []
        if Kind.CHANNEL in kinds:
            found += [c for k in self.stacks if (c := self.channels(k)) is not None]
        return tuple(found)

    @property
    def sublayers(self) -> tuple[Site, ...]:
        """All residual branches, in depth order."""
        return self.of_kind(*SUBLAYERS)

    def branch(self, site: Site | str) -> Branch:
        """The branch behind a sublayer's site."""
        return self._branches[self.site(site if isinstance(site, str) else site.id).id][2]

    def block(self, site: Site | str) -> Block:
        """The block that is, or holds, this site."""
        known = self.site(site if isinstance(site, str) else site.id).id
        return self._blocks[known][1] if known in self._blocks else self._branches[known][1]

    def stack(self, site: Site | str) -> Stack:
        """The stack that holds this site."""
        return self._blocks[self.block(site).site.id][0]

    def parts(self, site: Site | str) -> tuple[Site, ...]:
        """The sublayers of a block, or the sublayer itself."""
        known = self.site(site if isinstance(site, str) else site.id)
        return tuple(x.site for x in self._blocks[known.id][1].branches) if known.kind is Kind.BLOCK else (known,)

    def expand(self, site_ids: Any) -> frozenset[str]:
        """The sublayers that a set of blocks and sublayers covers."""
        return frozenset(p.id for s in site_ids for p in self.parts(s))

    def collapse(self, sublayers: Any) -> tuple[str, ...]:
        """The same set with every wholly covered block named as a block, in depth order."""
        gone = set(sublayers)
        found = []
        for block_id, (_, block) in self._blocks.items():
            parts = [x.site.id for x in block.branches]
            found += [block_id] if gone.issuperset(parts) else [p for p in parts if p in gone]
        return tuple(found)

    def cost(self, site: Site | str) -> Cost:
        """What the site takes: its modules and the norms that serve it alone; of units, what each of them owns."""
        known = self.site(site if isinstance(site, str) else site.id)
        if known.kind is Kind.LINEAR:
            return self.linear_cost(known)
        return self.unit_cost(known) if known.kind in UNITS else self._ledger.sites[known.id]

    def total(self) -> Cost:
        """What the whole model takes."""
        return self._ledger.total

    def freed(self, site_ids: Any) -> Cost:
        """What dropping these sites frees; blocks wholly covered count as blocks (shared norms go too)."""
        gone = self.expand(site_ids)
        return sum((self.cost(s) for s in self.collapse(gone)), Cost()) - still_held(self._tied, gone)

    @cached_property
    def _tied(self) -> tuple[Tied, ...]:
        return tied(self.model, self.stacks)

    def ties(self, site: Site) -> tuple[Tie, ...]:
        """The parameters that the site owns, whole; of a site of units, the slices of each unit.

        A pass of a module that is run again and again owns none.
        """
        if site.kind in UNITS:
            return self.unit_ties(site)
        if site.kind is Kind.LINEAR:
            named = self.model.get_submodule(site.path).named_parameters(recurse=False)
            return tuple(Tie(f"{site.path}.{name}", dim=0, size=p.shape[0]) for name, p in named)
        block = self.block(site)
        if block.turns > 1:
            return ()
        module = self.model.get_submodule(block.path)
        owned = module.named_parameters() if site.kind is Kind.BLOCK else self.branch(site).owned(module)
        return tuple(Tie(f"{block.path}.{name}", dim=0, size=p.shape[0]) for name, p in owned)

    def _is_sample(self, sample: Mapping[str, Any] | None) -> bool:
        """Whether these are the inputs that the anatomy was found with."""
        if sample is None or sample is self.sample:
            return True
        mine, given = tree_flatten(self.sample), tree_flatten(dict(sample))
        return mine[1] == given[1] and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
            for a, b in zip(mine[0], given[0], strict=True)
        )

    def certify(self, sample: Mapping[str, Tensor] | None = None) -> Certificate:
        """Check `out = in + Σ branches` on every block, from what the modules really return.

        Raises CertificateError naming the worst block and its error.
        """
        from lamina.anatomy.watch import watch_blocks

        errors: dict[str, float] = {}
        dtype = torch.float32

        def check(block: Block, entering: Tensor, branches: Mapping[str, Tensor], leaving: Tensor) -> None:
            nonlocal dtype
            dtype = leaving.dtype
            total = block.course(self.model.get_submodule(block.path), entering, branches)[-1]
            if not bool(torch.isfinite(leaving).all()):
                what = "the stream behind this block holds NaN or Inf on a few tokens of any kind"
                raise CertificateError(what, where=block.site.id, hint="are its weights whole? try --dtype float32")
            error = (leaving.double() - total.double()).norm() / leaving.double().norm().clamp_min(1e-30)
            errors[block.site.id] = max(float(error), errors.get(block.site.id, 0.0))

        with evaluating(self.model), watch_blocks(self.model, self, check, sampled=self._is_sample(sample)):
            call(self.model, sample or self.sample)
        tolerance = TOLERANCE if dtype in (torch.float32, torch.float64) else float(torch.finfo(dtype).eps)
        certificate = Certificate(errors, tolerance, str(dtype).removeprefix("torch."))
        if not certificate.holds:
            worst = max(errors, key=lambda b: errors[b])
            branches = ", ".join(x.core for x in self._blocks[worst][1].branches)
            raise CertificateError(
                f"input + branches ({branches}) misses the block's output by {errors[worst]:.1e} of its norm "
                f"(at most {tolerance:.0e})",
                where=worst,
            )
        return certificate


def _with_stream(model: nn.Module, chains: list[tuple[str, list[Seen]]]) -> list[tuple[str, list[Seen]]]:
    """Those chains of modules through which a stream runs; the others must not be the greater part of the model.

    Raises UnsupportedError where no chain has a stream, StreamError where the largest has none.
    """
    found, others = [], {}
    for path, chain in chains:
        error = _no_stream(chain[0])
        if error is not None and all(_no_stream(seen) for seen in chain[1:]):
            others[path] = error
        else:
            found.append((path, chain))
    weight = {path: _weight(model, path) for path, _ in chains}
    for path, error in others.items():
        if weight[path] > max((weight[p] for p, _ in found), default=0):
            raise error
    return found


def _weight(model: nn.Module, path: str) -> int:
    return sum(p.numel() for p in model.get_submodule(path).parameters())


def _no_stream(seen: Seen) -> StreamError | None:
    """The error, where no stream runs through an element; None where one does."""
    try:
        find_stream(seen, seen.path)
    except StreamError as error:
        return error
    except CertificateError:
        pass
    return None


def _stack_names(chains: list[tuple[str, list[Seen]]]) -> list[str]:
    """'' for a single stack; else the first path part that tells them apart."""
    if len(chains) == 1:
        return [""]
    paths = [p.split(".") for p, _ in chains]
    for depth in range(max(map(len, paths))):
        names = [p[min(depth, len(p) - 1)] for p in paths]
        if len(set(names)) == len(names):
            return names
    return [p.replace(".", "_") for p, _ in chains]


def _stack(model: nn.Module, name: str, path: str, chain: list[Seen]) -> Stack:
    blocks: list[Block] = []
    known: dict[Any, Block] = {}
    beside = carries(chain)
    carried = sorted({i for i, _ in beside})
    for number, seen in enumerate(chain):
        block_id = ".".join(x for x in (name, "block", str(number)) if x)
        alike = known.get(signature := _signature(seen, number))
        block = _read(seen, block_id, number, carried) if alike is None else _copied(alike, seen, block_id, number)
        if block.plain and not any(x.way for x in block.branches):
            known[signature] = block
        blocks.append(block)
    elements = [n for n, _ in model.get_submodule(path).named_children()]
    places = [elements.index(s.path.removeprefix(f"{path}.").split(".")[0]) for s in chain]
    modules = [s.module for s in chain]
    looped = any(s.turns > 1 for s in chain)
    index, strides = ((), {}) if looped else (index_attributes(modules, places), index_strides(modules, places))
    marked = tuple(_mark_cached(b, (*index, *strides)) for b in blocks)
    owner = owner_of(model, path, len(chain) if looped else len(elements))
    return Stack(name, path, marked, owner, index, int(first_width(chain)), linked(chain), strides, beside)


def _read(seen: Seen, block_id: str, number: int, carried: Sequence[int]) -> Block:
    """A block, traced on its own."""
    branches, after, trace, tells = find_branches(seen, block_id, number, carried)
    if not branches:
        raise UnsupportedError("the block joins nothing to the stream", where=block_id)
    site = Site(block_id, Kind.BLOCK, seen.path, number)
    returns, macs = returns_of(seen.output, seen.entering), seen.products(trace.flops)
    return Block(site, seen.path, branches, seen.stream, returns, macs, after, seen.turn, seen.turns, tells)


def _copied(alike: Block, seen: Seen, block_id: str, number: int) -> Block:
    """The same for a block that is built just like one that was traced; the certificate checks each by itself."""
    branches = tuple(
        replace(
            x,
            site=Site(
                f"{block_id}.{x.site.id.rpartition('.')[2]}", x.site.kind, f"{seen.path}.{x.core}", number, x.site.width
            ),
        )
        for x in alike.branches
    )
    site = Site(block_id, Kind.BLOCK, seen.path, number)
    return replace(alike, site=site, path=seen.path, branches=branches, turn=seen.turn, turns=seen.turns)


def _signature(seen: Seen, number: int) -> tuple[Any, ...]:
    """How a block is built and called: classes, shapes and settings of its modules, but for its own number."""
    parts = []
    for path, module in seen.module.named_modules():
        shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in module.named_parameters(recurse=False))
        kept = sorted((k, v) for k, v in vars(module).items() if isinstance(v, bool | float | str | int))
        parts.append((path, type(module), shapes, tuple(kv for kv in kept if kv[1] is True or kv[1] != number)))
    called = tuple(type(a) for a in seen.args), tuple(sorted((k, str(type(v))) for k, v in seen.kwargs.items()))
    returns = returns_of(seen.output, seen.entering)
    return tuple(parts), called, seen.stream, tuple(seen.entering.shape), returns, seen.rounds


def first_width(chain: list[Seen]) -> int:
    """The width of the residual stream."""
    return chain[0].leaving.shape[-1]


def _mark_cached(block: Block, index: tuple[str, ...]) -> Block:
    """A branch holds a cache entry if it mixes positions and some module of it knows the block's number."""
    numbered = tuple(
        replace(
            x,
            cached=x.site.kind in (Kind.ATTENTION, Kind.MIXER)
            and any(k.rpartition(".")[0].startswith(x.core) for k in index),
        )
        for x in block.branches
    )
    return replace(block, branches=numbered)
