"""Several sublayers that are built alike as one that has the units of all: tensors, and numbers that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice, product
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.anatomy._units_cut import TOLERANCE, Attributes
from lamina.anatomy._units_find import NoUnits, Units
from lamina.anatomy._units_probe import Given, Rig
from lamina.anatomy._units_resize import SIZES, _Set, _settings, _sizes, _told
from lamina.anatomy.config import config_of
from lamina.anatomy.counting import shapes, twin
from lamina.anatomy.linears import is_linear, matrix
from lamina.anatomy.parts import Block, Branch
from lamina.anatomy.stacks import call, evaluating
from lamina.anatomy.trial import inputs_recorded
from lamina.core.errors import UnsupportedError
from lamina.core.sites import Cost, Kind, Site, Tie
from lamina.rewrites._norms import block_norms, norm_of

UNITS = {Kind.ATTENTION: Kind.KV_GROUP, Kind.MLP: Kind.NEURON}
"""What a sublayer is made of that can stand beside others."""
TRIES = 64
"""Ways to set a config's fields that are tried."""
Kept = Sequence[tuple[int, int]]
"""Which units stand in the wide sublayer, in order: (number of the block in its run, number of the unit)."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """What the blocks of a stack got on the anatomy's sample, and which maps read which norm: norm → maps, paths
    relative to the block.
    """

    given: dict[str, Given]
    readers: dict[str, dict[str, list[str]]]


def units_of(anatomy: Anatomy, branch: Branch) -> Site | None:
    """The units of a sublayer that stand beside those of others: KV groups, neurons."""
    found = anatomy.units(branch.site, UNITS[branch.site.kind]) if branch.site.kind in UNITS else ()
    return found[0] if found else None


def ties_of(anatomy: Anatomy, site: Site) -> tuple[Tie, ...]:
    """The ties of units, with names relative to their block."""
    start = f"{anatomy.block(site.id.rpartition('.')[0]).path}."
    return tuple(replace(t, param=t.param.removeprefix(start)) for t in anatomy.unit_ties(site))


def recorded(anatomy: Anatomy, blocks: Sequence[Block]) -> Recorded:
    """One run on the anatomy's sample."""
    readers: dict[str, dict[str, list[str]]] = {b.path: {p: [] for p in block_norms(anatomy, b)} for b in blocks}
    handles: list[Any] = []
    with evaluating(anatomy.model), inputs_recorded(anatomy.model, anatomy.stack(blocks[0].site)) as calls:
        try:
            for block in blocks:
                handles += _listening(anatomy.model.get_submodule(block.path), readers[block.path])
            call(anatomy.model, anatomy.sample)
        finally:
            for handle in handles:
                handle.remove()
        order = [b.path for b in anatomy.stack(blocks[0].site).blocks]
        given = {path: Given(*one) for path, one in zip(order, calls, strict=True)}
    return Recorded(given, readers)


def _listening(module: nn.Module, readers: dict[str, list[str]]) -> list[Any]:
    """Hooks that tell which map of a block reads what a norm made, by the tensor itself."""
    made: dict[str, Tensor] = {}
    handles = []
    for path in readers:

        def makes(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
            made[path] = output

        handles.append(module.get_submodule(path).register_forward_hook(makes))
    for path, inner in module.named_modules():
        if is_linear(inner):

            def reads(_: nn.Module, args: Any, path: str = path) -> None:
                for norm in (n for n, out in made.items() if out is args[0]):
                    readers[norm].append(path)

            handles.append(inner.register_forward_pre_hook(reads))
    return handles


def folded(module: nn.Module, readers: Mapping[str, Sequence[str]], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block's parameters with its norms' gains and biases in the maps that read them, float64.

    `values`: the block's own parameters, or others of their shapes. Raises UnsupportedError where a map has no bias to
    take a norm's.
    """
    out = {n: v.detach().double() for n, v in values.items()}
    for path, maps in readers.items():
        norm = norm_of(module.get_submodule(path))
        assert norm is not None
        gain = out[f"{path}.{norm.weight}"] + norm.offset
        shift = out.get(f"{path}.{norm.bias}")
        for name in maps:
            inner = module.get_submodule(name)
            weight = out[f"{name}.weight"] if isinstance(inner, nn.Linear) else out[f"{name}.weight"].T
            if shift is not None and f"{name}.bias" in out:
                out[f"{name}.bias"] = out[f"{name}.bias"] + weight @ shift
            elif shift is not None and bool(shift.any()):
                raise UnsupportedError(f"{name} has no bias that could take the norm's", where=path)
            made = weight * gain
            out[f"{name}.weight"] = made if isinstance(inner, nn.Linear) else made.T
        out[f"{path}.{norm.weight}"] = torch.full_like(gain, 1 - norm.offset)
        if shift is not None:
            out[f"{path}.{norm.bias}"] = torch.zeros_like(shift)
    return out


def joined(parts: Sequence[Mapping[str, Tensor]], ties: Sequence[Tie], kept: Kept) -> dict[str, Tensor]:
    """Tied tensor → the slices of all kept units side by side, run after run of the ties."""
    axes: dict[tuple[str, int], list[Tie]] = {}
    for tie in ties:
        axes.setdefault((tie.param, tie.dim), []).append(tie)
    found = {}
    for (name, dim), mine in axes.items():
        rows = [
            parts[j][name].narrow(dim, tie.start + i * tie.size, tie.size)
            for tie in sorted(mine, key=lambda t: t.start)
            for j, i in kept
        ]
        found[name] = torch.cat(rows, dim)
    return found


def whole(values: Mapping[str, Tensor], site: Site, ties: Sequence[Tie]) -> bool:
    """Whether each tied tensor is nothing but its units' slices, along one dimension."""
    sizes: dict[str, int] = {}
    dims: dict[str, set[int]] = {}
    for tie in ties:
        sizes[tie.param] = sizes.get(tie.param, 0) + tie.size * site.width
        dims.setdefault(tie.param, set()).add(tie.dim)
    return all(n in values and len(dims[n]) == 1 and values[n].shape[min(dims[n])] == size for n, size in sizes.items())


def rig_of(anatomy: Anatomy, block: Block, given: Given) -> Rig:
    """A float64 copy of the block on what it got, or a float32 one where its class can do no other."""
    module = anatomy.model.get_submodule(block.path)
    try:
        rig = Rig(module, given)
        rig.run()
    except (RuntimeError, TypeError, ValueError):
        rig = Rig(module, given, dtype=torch.float32)
    return rig


def expect_alike(anatomy: Anatomy, blocks: Sequence[Block], seen: Recorded) -> None:
    """Raise UnsupportedError where the blocks would not compute the same with the same weights and input.

    Also where a block computes otherwise once its norms are part of its maps.
    """
    first = rig_of(anatomy, blocks[0], seen.given[blocks[0].path])
    want = first.run()
    for block in blocks[1:]:
        other = rig_of(anatomy, block, seen.given[blocks[0].path])
        there = rig_of(anatomy, block, _with(seen.given[block.path], block, seen.given[blocks[0].path], blocks[0]))
        if not all(_close(r.run(first.values), want, first) for r in (other, there)):
            raise UnsupportedError(f"it does not work as {blocks[0].site.id} does", where=block.site.id)
    made = folded(first.module, seen.readers[blocks[0].path], first.values)
    if not _close(first.run({n: v.to(first.dtype) for n, v in made.items()}), want, first):
        raise UnsupportedError("its norms are read by more than linear maps", where=blocks[0].site.id)


def _with(given: Given, block: Block, other: Given, first: Block) -> Given:
    """What a block got, with another block's stream."""
    stream = other.args[first.stream] if isinstance(first.stream, int) else other.kwargs[first.stream]
    if isinstance(block.stream, int):
        return Given((*given.args[: block.stream], stream, *given.args[block.stream + 1 :]), given.kwargs)
    return Given(given.args, {**given.kwargs, block.stream: stream})


def _close(one: Tensor, other: Tensor, rig: Rig) -> bool:
    return float((one - other).norm()) <= TOLERANCE[rig.dtype] * float(other.norm())


def resized(anatomy: Anatomy, site: Site, count: int, given: Given) -> dict[str, dict[str, Any]]:
    """Absolute path → the numbers (`numbers`), and the fields of its own config (`configs`), for `count` units.

    Found by trial: with some units twice, or without some, the block must compute what it does with their columns
    doubled, or zero. Raises UnsupportedError where no setting does.
    """
    home = site.id.rpartition(".")[0]
    block, ties = anatomy.block(home), ties_of(anatomy, site)
    tail = anatomy.tail(site).removeprefix(f"{block.path}.")
    outputs = tuple(t for t in ties if t.param == f"{tail}.weight")
    group, inner = anatomy.grouped(site)
    units = Units(site.kind, site.width, ties, outputs, tail, group, inner)
    try:
        with evaluating(anatomy.model), torch.no_grad():
            told = _tried(rig_of(anatomy, block, given), units, count)
    except NoUnits as reason:
        raise UnsupportedError(str(reason), where=home, hint="width: 1") from None

    def absolute(names: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{block.path}.{n}" if n else block.path: dict(v) for n, v in names.items()}

    return {"numbers": absolute(told.numbers), "configs": absolute(told.configs)}


def _tried(rig: Rig, units: Units, count: int) -> Any:
    """The fewest numbers with which the block runs with `count` units."""
    chosen = [(0, n % units.width) for n in range(count)]
    times = torch.bincount(torch.tensor([i for _, i in chosen]), minlength=units.width)
    due = dict(rig.values)
    for tie in units.outputs:
        value = due[tie.param] = due[tie.param].clone()
        at = value.narrow(tie.dim, tie.start, tie.size * units.width)
        shape = [-1 if d == tie.dim else 1 for d in range(value.ndim)]
        at.mul_(times.repeat_interleave(tie.size).to(value).view(shape))
    want = rig.run(due)
    changed = joined([rig.values], units.ties, chosen)
    free = {
        n: held
        for n, held in Attributes(rig, units, changed, units.width - count).free.items()
        if n.partition(":")[0] not in SIZES
    }
    for setting in _settings(list(free)):
        changes = [(holder, name, made) for n in setting for holder, name, made in free[n]]
        with _Set([*_sizes(rig, changed), *changes]):
            try:
                out = rig.run(changed)
            except Exception:  # whatever a class does with numbers that do not fit
                continue
        if out.shape == want.shape and _close(out, want, rig):
            return _told(rig, changes)
    raise NoUnits(f"no setting of its numbers lets the block run with {count} of {units.width} units")


def growth(anatomy: Anatomy, site: Site, count: int) -> Cost:
    """What `count` units in the place of those that a sublayer has take more, or less."""
    more, each = count - site.width, anatomy.unit_cost(site)
    home = site.id.rpartition(".")[0]
    cost = anatomy.cost(home)
    if site.kind is Kind.NEURON:
        return Cost(each.parameters * more, each.bytes * more, each.macs * more)
    products = cost.macs - sum(anatomy.linear_cost(s).macs for s in anatomy.linears(home))
    kv = cost.kv_bytes * count // site.width - cost.kv_bytes
    return Cost(each.parameters * more, each.bytes * more, each.macs * more + products * count // site.width - products,
                kv)  # fmt: skip


def said_by_config(model: nn.Module, numbers: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The step that lets the model's config tell the widths, where its class then builds all the shapes; or nothing.

    `numbers`: what was counted before → what there is.
    """
    config: Any = config_of(model)
    pairs = [p for p in dict.fromkeys(numbers) if p[0] != p[1]]
    if not pairs or config is None or config is not getattr(model, "config", None):
        return {}
    fields = {k: v for k, v in config.to_dict().items() if type(v) is int}
    ways = []
    for before, after in pairs:
        mine = [k for k, v in fields.items() if v == before]
        ways.append([dict.fromkeys(some, after) for size in (1, 2, 0) for some in combinations(mine, size)])
    for way in islice(product(*ways), TRIES):
        said = {k: v for one in way for k, v in one.items()}
        odd = _told_apart(model, config, said) if said else None
        if odd is not None:
            edits = {k: (fields[k], v) for k, v in said.items()}
            return {"format": 1, "kind": "narrow", "cuts": {}, "numbers": odd, "config": edits}
    return {}


def _told_apart(model: nn.Module, config: Any, said: Mapping[str, int]) -> dict[str, dict[str, int]] | None:
    """The whole numbers that modules have where the class builds them from the config with these fields, and lack here.

    None where it builds other shapes.
    """
    import copy

    tried = copy.deepcopy(config)
    for name, value in said.items():
        setattr(tried, name, value)
    built = twin(model, tried)
    if built is None or shapes(built) != shapes(model):
        return None
    found: dict[str, dict[str, int]] = {}
    others = dict(model.named_modules())
    for path, module in built.named_modules():
        mine = {k: v for k, v in vars(module).items() if type(v) is int}
        odd = {k: v for k, v in mine.items() if vars(others[path]).get(k) != v}
        found |= {path: odd} if odd else {}
    return found


def tail_of(anatomy: Anatomy, site: Site) -> tuple[str, Tensor, Tensor | None]:
    """Of units: the path of the map whose columns they are, its weights [outputs, inputs] and its bias."""
    module: Any = anatomy.model.get_submodule(anatomy.tail(site))
    return anatomy.tail(site), matrix(module).detach(), getattr(module, "bias", None)
