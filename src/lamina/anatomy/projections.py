"""The matrices by which an attention's heads make queries, keys and values of the stream, and write to it.

They are found by what they do. The block is run with marked numbers in the place of its maps' outputs, and the marks
are read where queries, keys and values meet; marks in the place of the heads' outputs are read where the next map
takes them. A rotation by position leaves the first token as it is, so that the marks are read there; norms of queries
and keys are passed by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lamina.anatomy._units_probe import Given
from lamina.anatomy.anatomy import Anatomy
from lamina.anatomy.joins import light
from lamina.anatomy.linears import is_linear, matrix
from lamina.anatomy.parts import Block, Branch
from lamina.anatomy.stacks import evaluating
from lamina.anatomy.trial import forward_of
from lamina.core.errors import UnsupportedError
from lamina.core.sites import Kind, Site

BASE = 64
"""Marks are written in digits of this base, from 1 on: whole numbers that bfloat16 holds too."""
CHECK = -1
"""The place of a digit by which mistakes show."""
AWAY = {torch.float32: 1e-4, torch.float64: 1e-6}
"""What a value made of the slices may differ by, relative to the values' norm; of other types 2e-2."""


@dataclass(frozen=True, eq=False)
class Projections:
    """Of each query head, float32: `q`, `k` and `v` [heads, size, width], `o` [heads, width, size].

    Keys and values that several heads share are repeated. Rows of `q` and `k` are in the order in which they meet;
    biases, rotations by position and the norms of queries and keys are left out.
    `gain` [width] is by what the norm before the maps multiplies each channel of the stream, `centred` whether it
    takes the mean over channels away first; `gain_after` [width] is that of a norm of what the attention adds.
    `group` heads share keys and values.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gain: Tensor
    centred: bool
    gain_after: Tensor
    group: int = 1


def projections(anatomy: Anatomy, site: Site | str) -> Projections:
    """The projections of an attention, read from the live model and certified on the anatomy's sample.

    Raises UnsupportedError where they can't be told: queries made of another map's output, attention that is no
    product of queries and keys, values that are not rows of one linear map.
    """
    branch, block = anatomy.branch(site), anatomy.block(site)
    if branch.site.kind not in (Kind.ATTENTION, Kind.CROSS_ATTENTION):
        raise UnsupportedError("has no queries, keys and values", where=branch.site.id)
    try:
        with torch.no_grad(), evaluating(anatomy.model):
            return _Probe(anatomy, block, branch).found()
    except _Unclear as reason:
        raise UnsupportedError(f"its projections can't be told: {reason}", where=branch.site.id) from None


class _Unclear(Exception):
    """Why they can't be told."""


@dataclass(eq=False)
class _Heard:
    """One run of the block: what met in the attention, what it gave, and what each map took and gave, in order."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mixed: Tensor | None = None
    taken: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    given: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    before: list[str] = field(default_factory=list[str])
    flows: list[tuple[str, Tensor, Tensor]] = field(default_factory=list[tuple[str, Tensor, Tensor]])

    @property
    def met(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, heads or groups, tokens, size]."""
        if self.query is None or self.key is None or self.value is None or self.mixed is None:
            raise _Unclear("queries and keys were not seen to meet")
        if not self.query.ndim == self.key.ndim == self.value.ndim == 4:
            raise _Unclear("queries, keys and values are not of the form [batch, heads, tokens, size]")
        return self.query, self.key, self.value


class _Ear(TorchFunctionMode):
    """Notes queries, keys and values where they meet; `swap` may give other numbers for what the heads make of them."""

    def __init__(self, heard: _Heard, swap: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.heard, self.swap = heard, swap
        self.open = False
        self._product: tuple[Tensor, Tensor] | None = None
        self._soft: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.open or self.heard.mixed is not None:
            return out
        if func is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return self._met(named["query"], named["key"], named["value"], out)
        if func in (functional.softmax, torch.softmax, Tensor.softmax) and out.ndim == 4:
            self._soft = out
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and all(t.ndim == 4 for t in args[:2]):
            if self._soft is None:
                self._product = args[0], args[1]
            elif self._product is not None and args[0].shape == self._soft.shape:
                query, key = self._product
                return self._met(query, key.transpose(-1, -2), args[1], out)
        return out

    def _met(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
        heard = self.heard
        heard.query, heard.key, heard.value, heard.mixed = query, key, value, out
        return self.swap(out)


class _Probe:
    """The runs of one block."""

    def __init__(self, anatomy: Anatomy, block: Block, branch: Branch) -> None:
        self.anatomy, self.branch = anatomy, branch
        self.block: nn.Module = anatomy.model.get_submodule(block.path)
        self.core: nn.Module = self.block.get_submodule(branch.core)
        self.args: Given = anatomy._units_of().given(block)
        self.width = anatomy.stack(branch.site).width
        own = {id(m) for path in (branch.core, *branch.own) for m in self.block.get_submodule(path).modules()}
        self.maps = {n: m for n, m in self.block.named_modules() if id(m) in own and is_linear(m)}

    def found(self) -> Projections:
        """All of it."""
        real = self._run()
        query, key, value = real.met
        self._expect_plain(real)
        heads, groups = query.shape[1], value.shape[1]
        if heads % groups or key.shape[1] not in (groups, heads):
            raise _Unclear(f"{heads} heads do not share {groups} keys and values evenly")
        marks, places, tail = self._marks(real)
        rows = [self._rows(m, real) for m in marks]
        for (name, index), seen in zip(rows, real.met, strict=True):
            exact = seen is value or not self._norms
            self._certify(name, index, seen, real, scale=exact and seen is not value)
        self._expect_one_source([name for name, _ in rows], real)
        if not torch.equal(_at(real.taken[tail], places), _heads_last(real.mixed)):
            raise _Unclear("what the heads make is changed before the next map takes it")
        maps = [matrix(self.maps[name]).detach().float()[index] for name, index in rows]
        q, k, v = (m.repeat_interleave(heads // len(m), 0) for m in maps)
        o = matrix(self.maps[tail]).detach().float()[:, places].movedim(0, 1).contiguous()
        gain, centred = self._gain(real, real.taken[rows[0][0]])
        after = self._gain_after(real, tail)
        shared = len(torch.unique(rows[2][1][:, 0]))
        return Projections(q, k, v, o, gain.to(q.device), centred, after.to(q.device), heads // shared)

    @property
    def _norms(self) -> list[nn.Module]:
        """What lies between maps and attention and holds no matrix, in the attention itself."""
        return [m for m in self.core.modules() if not list(m.children()) and light(m) and list(m.parameters())]

    def _run(
        self, write: Callable[[str, Tensor], Tensor] | None = None, swap: Callable[[Tensor], Tensor] | None = None
    ) -> _Heard:
        """Run the block; `write` gives other numbers for what a map before the attention returned."""
        heard = _Heard()
        with self._listening(heard, write, swap or (lambda out: out)):
            self.block(*self.args.args, **self.args.kwargs)
        return heard

    @contextmanager
    def _listening(
        self, heard: _Heard, write: Callable[[str, Tensor], Tensor] | None, swap: Callable[[Tensor], Tensor]
    ) -> Iterator[None]:
        names = {id(m): n for n, m in self.maps.items()}
        ear = _Ear(heard, swap)

        def opens(*_: Any) -> None:
            ear.open = True

        def closes(*_: Any) -> None:
            ear.open = False

        def map_ran(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            name, early = names[id(module)], heard.mixed is None
            if name in heard.given:
                raise _Unclear(f"{name} runs several times")
            heard.taken[name], heard.given[name] = args[0], output
            heard.before += [name] if early else []
            return write(name, output) if write is not None and early else None

        def flowed(_: nn.Module, args: Any, output: Any, path: str) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                heard.flows.append((path, args[0], output))

        with ExitStack() as held:
            hook = lambda handle: held.callback(handle.remove)  # noqa: E731
            hook(self.core.register_forward_pre_hook(opens))
            hook(self.core.register_forward_hook(closes))
            for module in self.maps.values():
                hook(module.register_forward_hook(map_ran))
            for path, module in self.block.named_modules():
                if not list(module.children()) and light(module):
                    hook(module.register_forward_hook(partial(flowed, path=path)))
            for module in self._norms if write is not None else ():
                held.enter_context(forward_of(module, lambda x, *_, **__: x))
            held.enter_context(ear)
            yield

    def _expect_plain(self, real: _Heard) -> None:
        for name in (*real.before, *[n for n in real.given if n not in real.before][:1]):
            taken, given = real.taken[name], real.given[name]
            if taken.shape[:-1] != given.shape[:-1] or taken.ndim != 3:
                raise _Unclear(f"{name} does not map tokens to tokens")

    def _marks(self, real: _Heard) -> tuple[list[Tensor], Tensor, str]:
        """The numbers of the rows that make queries, keys and values, [heads or groups, size] each.

        They count through all maps before the attention. Then, of the map behind it, the columns [heads, size] that
        take what the heads make, and its name.
        """
        starts, total = dict[str, int](), 0
        for name in real.before:
            starts[name] = total
            total += real.given[name].shape[-1]
        assert real.mixed is not None
        shape = (real.mixed.shape[1], real.mixed.shape[3])
        read: list[list[Tensor]] = []
        tail = ""
        digits = 1
        while BASE**digits < max(total, shape[0] * shape[1]):
            digits += 1
        for place in (None, CHECK, *range(digits)):

            def write(name: str, out: Tensor, place: int | None = place) -> Tensor:
                return _digit(torch.arange(out.shape[-1]) + starts[name], place).to(out).expand_as(out).clone()

            def swap(out: Tensor, place: int | None = place) -> Tensor:
                marks = _digit(torch.arange(shape[0] * shape[1]), place).view(shape[0], 1, shape[1])
                return marks.to(out).expand_as(out).clone()

            heard = self._run(write, swap)
            tail = next((n for n in heard.given if n not in heard.before), "")
            if not tail:
                raise _Unclear("no linear map takes what the heads make")
            seen = [t[0, :, 0].double().cpu() for t in heard.met]
            read.append([*seen, heard.taken[tail][0, 0].double().cpu()])
        found = [_number([r[i] for r in read]) for i in range(4)]
        columns = torch.full((shape[0] * shape[1],), -1)
        columns[found[3]] = torch.arange(len(found[3]))
        if bool((columns < 0).any()) or len(found[3]) != len(columns):
            raise _Unclear(f"{tail} does not take every number that the heads make once")
        return found[:3], columns.view(shape), tail

    def _rows(self, marks: Tensor, real: _Heard) -> tuple[str, Tensor]:
        """The one map whose rows these are, and their numbers in it."""
        start = 0
        for name in real.before:
            stop = start + real.given[name].shape[-1]
            if bool(((marks >= start) & (marks < stop)).all()):
                return name, marks - start
            start = stop
        raise _Unclear("they are rows of no single map")

    def _certify(self, name: str, index: Tensor, seen: Tensor, real: _Heard, *, scale: bool) -> None:
        """Raise where the slices do not make what was seen: values at all tokens, others (`scale`) at the first."""
        if seen is not real.value and not scale:
            return
        module = self.maps[name]
        bias: Any = getattr(module, "bias", None)
        made = real.taken[name].float() @ matrix(module).detach().float()[index.flatten()].T
        made = made if bias is None else made + bias.detach().float()[index.flatten()]
        made = made.unflatten(-1, tuple(index.shape)).transpose(1, 2)
        if scale:  # queries may be scaled before they meet keys
            made, seen = made[:, :, :1], seen[:, :, :1]
            made = made * ((made * seen).sum() / made.square().sum().clamp_min(1e-30))
        away = float((made - seen).norm() / seen.float().norm().clamp_min(1e-30))
        if away > AWAY.get(seen.dtype, 2e-2):
            raise _Unclear(f"its slices of {name} miss what was seen by {away:.0e}")

    def _expect_one_source(self, names: list[str], real: _Heard) -> None:
        """Raise where the maps do not read the stream itself: keys and values may read another, as queries do not."""
        sources = [real.taken[n] for n in names]
        if sources[0].shape[-1] != self.width:
            raise _Unclear(f"{names[0]} does not read the stream")
        crossed = self.branch.site.kind is Kind.CROSS_ATTENTION
        for name, source in zip(names[1:], sources[1:], strict=True):
            if not _same(source, sources[1] if crossed else sources[0]):
                raise _Unclear(f"{name} reads something else than {names[1 if crossed else 0]}")

    def _gain(self, real: _Heard, source: Tensor) -> tuple[Tensor, bool]:
        """By what the norm before the maps multiplies each channel, and whether it centres them."""
        for path, taken, given in reversed(real.flows):
            if _same(given, source) and taken.shape == given.shape and not _same(taken, given):
                return _gain_of(self.block.get_submodule(path), source)
        return torch.ones(source.shape[-1]), False

    def _gain_after(self, real: _Heard, tail: str) -> Tensor:
        for path, taken, given in real.flows:
            if _same(taken, real.given[tail]) and taken.shape == given.shape and not _same(taken, given):
                return _gain_of(self.block.get_submodule(path), given)[0]
        return torch.ones(real.given[tail].shape[-1])


def _digit(numbers: Tensor, place: int | None) -> Tensor:
    """One digit of each number, from 1 on; ones for None."""
    if place is None:
        return torch.ones_like(numbers)
    return (numbers * numbers % (BASE - 3) if place == CHECK else numbers // BASE**place % BASE) + 1


def _number(digits: list[Tensor]) -> Tensor:
    """The numbers of which ones, the check and then the digits were written, and perhaps scaled."""
    ones, *rest = digits
    if not bool((ones != 0).all()):
        raise _Unclear("some of what meets is made of no map's output")
    values = [digit / ones - 1 for digit in rest]
    whole = [v.round().long() for v in values]
    found = torch.stack([w * BASE**place for place, w in enumerate(whole[1:])]).sum(0)
    exact = all(bool(((v - w).abs() < 0.1).all()) for v, w in zip(values, whole, strict=True))
    if not exact or not torch.equal(_digit(found, CHECK) - 1, whole[0]):
        raise _Unclear("the outputs of maps are mixed before they meet")
    return found


def _at(taken: Tensor, places: Tensor) -> Tensor:
    return taken[..., places.flatten().to(taken.device)]


def _heads_last(mixed: Tensor | None) -> Tensor:
    """[batch, heads, tokens, size] → [batch, tokens, heads · size]."""
    assert mixed is not None
    return mixed.transpose(1, 2).flatten(2)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and bool(torch.equal(one, other)))


def _gain_of(norm: nn.Module, like: Tensor) -> tuple[Tensor, bool]:
    """Gain [width] and centring of a norm, from what it makes of signs that add up to zero, and of the same moved."""
    width = like.shape[-1]
    signs = torch.ones(width).masked_fill(torch.arange(width) % 2 == 1, -1.0)
    signs[-1] *= 1 - width % 2  # an odd one out
    rows = torch.stack([signs, -signs, signs + 1]).to(like).unsqueeze(0)
    up, down, moved = norm(rows)[0].float()
    size = signs.to(up)
    gain = (up - down) / 2 * size
    gain[-1] = gain[-1] if width % 2 == 0 else 1.0
    return gain.cpu(), bool((moved - up).abs().max() < 1e-2 * (up - down).abs().max())
