"""Weights that lie on disk: mapped in while the module that they belong to runs, and read by whatever else asks."""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from lamina.core.errors import UnsupportedError
from lamina.lab._disk_files import Stored

HELD = "\0held"
"""Stands for the path of a module: these weights were asked for by `Weights.held`."""
LENT, TOGETHER = 1.5, 2
"""Weights of so many blocks are kept while they are lent to others, and of so many with one that is no block's."""
TOLD = frozenset(
    """shape dtype device layout ndim requires_grad grad grad_fn is_leaf is_meta is_cuda is_cpu is_mps is_xpu is_sparse
    is_quantized is_nested is_mkldnn itemsize nbytes numel nelement size dim ndimension element_size names get_device
    is_floating_point is_complex is_signed __len__ requires_grad_ retains_grad output_nr _version""".split()  # noqa: SIM905
)
"""What a parameter tells, and what can be set, without its numbers."""

_GIVEN: weakref.WeakValueDictionary[tuple[int, int], Tensor] = weakref.WeakValueDictionary()
"""Numbers that were read and are still in use, by their parameter."""


def is_light(tensor: Tensor) -> bool:
    """Whether it is a vector or a number: such parameters stay in memory."""
    return tensor.ndim < 2 or tensor.numel() <= max(tensor.shape)


@contextmanager
def aside() -> Iterator[None]:
    """Inside, nothing that watches what torch does sees it."""
    with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


class OnDisk(nn.Parameter):
    """A parameter whose numbers lie on disk. It knows its shape and type; what computes with it reads the numbers.

    They are let go as soon as nothing refers to them. They can't be changed.
    """

    numbers: Callable[[], Tensor]
    plain: Stored | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        setting = name == "__set__"
        name = func.__self__.__name__ if name in ("__get__", "__set__") else name
        if name in TOLD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if setting and name == "data" and _GIVEN.get((id(args[0]), id(args[1]))) is args[1]:
            return None  # a conversion that changed nothing
        changes = setting or name == "__setitem__" or (name.endswith("_") and not name.startswith("__"))
        if (changes and args and isinstance(args[0], OnDisk)) or isinstance(kwargs.get("out"), OnDisk):
            raise UnsupportedError(
                "the weights of a model that is read from disk block by block can't be changed", hint="load it whole"
            )
        if func is functional.embedding and (rows := _looked_up(*args, **kwargs)) is not None:
            return rows
        args, kwargs = tree_map_only(OnDisk, _numbers, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A parameter in memory."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.numbers().clone(), requires_grad=self.requires_grad)
        return memo[id(self)]


def _numbers(parameter: OnDisk) -> Tensor:
    """A tensor that asks for gradients as the parameter does: torch chooses some kernels by that, in any mode."""
    found = parameter.numbers().requires_grad_(parameter.requires_grad)
    _GIVEN[id(parameter), id(found)] = found
    return found


def _looked_up(indices: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Rows of an embedding: only those are read. None where it is more than that."""
    source = weight.plain if isinstance(weight, OnDisk) else None
    limit = args[1] if len(args) > 1 else kwargs.get("max_norm")
    if source is None or limit is not None:
        return None
    with aside():
        table = source.read(whole=False)
    return functional.embedding(indices, table, *args, **kwargs).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class Recipe:
    """How parameters are made from stored tensors: `make()` gives them by name."""

    targets: tuple[str, ...]
    sources: tuple[Stored, ...]
    make: Callable[[], Mapping[str, Tensor]]
    plain: bool = True
    """Whether it is one tensor as it is stored, but for its number type."""


class Weights:
    """The weights of one model on disk: which are in memory now, and how often each was read.

    `reads` counts by parameter's name, `bytes` what was mapped to be read whole; `live` and `peak` are the bytes of
    parameters in memory, now and at most, light ones not counted.
    """

    def __init__(self, model: nn.Module, recipes: Iterable[Recipe]) -> None:
        self._model = weakref.ref(model)
        self._recipes = {t: r for r in recipes for t in r.targets}
        self._parameters: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}
        self._owners: dict[str, str] = {}
        self._lent: OrderedDict[str, Tensor] | None = None
        self._lenders: dict[str, str] = {}
        self._block = self._inside = 0
        self._handles: list[Any] = []
        self.blocks: tuple[str, ...] = ()
        self.reads: Counter[str] = Counter()
        self.bytes = self.live = self.peak = 0
        self._empty: dict[torch.dtype, Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self._recipes and id(parameter) not in self._names and not is_light(parameter):
                self._names[id(parameter)] = name
                self._parameters[name] = parameter
                parameter.numbers = lambda name=name: self._one(name)[name]  # type: ignore[attr-defined]
                recipe = self._recipes[name]
                parameter.plain = recipe.sources[0] if recipe.plain else None  # type: ignore[attr-defined]
                self._take(name)
        self._watch(model)

    def within(self, path: str) -> list[str]:
        """The names of the parameters on disk that a module and those inside it use."""
        model = self._model()
        if model is None:
            return []
        found = [self._names.get(id(p)) for p in model.get_submodule(path).parameters()]
        return list(dict.fromkeys(n for n in found if n is not None))

    @contextmanager
    def held(self, path: str) -> Iterator[None]:
        """Inside, the weights of a module are in memory, and are read once."""
        self.release()
        names = [n for n in self.within(path) if n not in self._owners]
        try:
            self._fill(names, HELD, borrow=True)
            yield
        finally:
            self._let_go(names)

    @contextmanager
    def lending(self) -> Iterator[None]:
        """Inside, where the model runs or a block is `held`, it has the weights of the first of that name and shape.

        For what depends on shapes alone: of blocks of one build one is read then. A block that is called by itself
        has its own. Weights of at most two blocks are kept.
        """
        before, self._lent = self._lent, OrderedDict() if self._lent is None else self._lent
        self._inside = 0
        try:
            yield
        finally:
            self._lent = before

    def expect(self, path: str) -> None:
        """Tell the system that a module's weights will be needed soon."""
        for source in dict.fromkeys(s for n in self.within(path) for s in self._recipes[n].sources):
            source.expect()

    def release(self, inside: str | None = None) -> None:
        """Let go of what an interrupted call left behind: all but what is held, and what modules around a path use."""

        def left(owner: str) -> bool:
            around = inside is not None and f".{inside}.".startswith(f".{owner}." if owner else ".")
            return owner != HELD and not around

        self._let_go([name for name, owner in self._owners.items() if left(owner)])

    def block_reads(self) -> dict[str, int]:
        """Path of each block → how often its weights were read, the most read of them."""
        return {b: max((self.reads[n] for n in self.within(b)), default=0) for b in self.blocks}

    def close(self) -> None:
        """Take all hooks away. Reading goes on, tensor by tensor."""
        self._let_go(list(self._owners))
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _one(self, name: str, *, borrow: bool = False) -> dict[str, Tensor]:
        """One parameter's numbers, and those that are made with them; of another block where those are `borrow`ed."""
        if self._lent is None:
            return self._read([name])
        lender = self._lenders.get(name, name) if borrow else name
        if lender not in self._lent:
            self._make_room(self._lent, name)
            if name not in self._lenders:
                return self._read([name])
            self._lent[lender] = self._read([lender])[lender]
        self._lent.move_to_end(lender)
        return {name: self._lent[lender]}

    def _make_room(self, lent: OrderedDict[str, Tensor], name: str) -> None:
        """Give up what was lent longest ago, so that one more parameter finds room, and what it is made of."""
        recipe, dtype = self._recipes[name], self._parameters[name].dtype
        need = self._size(name) + sum(s.nbytes for s in recipe.sources if s.dtype != dtype or not recipe.plain)
        room = self._block * (LENT if name in self._lenders else TOGETHER)
        while lent and sum(t.numel() * t.element_size() for t in lent.values()) + need > room:
            lent.popitem(last=False)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These parameters' numbers, each recipe made once."""
        found: dict[str, Tensor] = {}
        with aside():
            for name in names:
                if name not in found:
                    recipe = self._recipes[name]
                    found |= recipe.make()
                    self.reads.update(recipe.targets)
                    self.bytes += sum(s.nbytes for s in recipe.sources)
        return found

    def _fill(self, names: list[str], owner: str, *, borrow: bool) -> None:
        """Bring in what is not there yet, for a module."""
        todo = [n for n in names if n not in self._owners]
        try:
            for name in todo:
                if name not in self._owners:
                    self._give_all(self._one(name, borrow=borrow), todo, owner)
        except BaseException:
            self._let_go(todo)
            raise

    def _size(self, name: str) -> int:
        return self._parameters[name].numel() * self._parameters[name].element_size()

    def _give_all(self, made: Mapping[str, Tensor], wanted: Iterable[str], owner: str) -> None:
        for name in wanted:
            if name in made and name not in self._owners:
                self._give(name, made[name], owner)

    def _give(self, name: str, tensor: Tensor, owner: str) -> None:
        parameter = self._parameters[name]
        with aside():
            parameter.__class__ = nn.Parameter
            parameter.data = tensor
        self._owners[name] = owner
        self.live += tensor.numel() * tensor.element_size()
        self.peak = max(self.peak, self.live)

    def _take(self, name: str) -> None:
        """What stands for the numbers is one NaN: nothing can go on with it unnoticed."""
        parameter = self._parameters[name]
        with aside():
            dtype = parameter.dtype
            if dtype not in self._empty:
                self._empty[dtype] = torch.full((1,), float("nan") if dtype.is_floating_point else 0).to(dtype)
            parameter.data = self._empty[dtype].expand(parameter.shape)
            parameter.__class__ = OnDisk

    def _let_go(self, names: Iterable[str]) -> None:
        for name in names:
            if self._owners.pop(name, None) is not None:
                self.live -= self._size(name)
                self._take(name)

    def _watch(self, model: nn.Module) -> None:
        """Hooks on the elements of containers, and on modules with weights of their own, for all that lies in them.

        Not on embeddings, of which only rows are read. An element inside an element is part of it; a module around
        elements has its own weights alone.
        """
        blocks: list[str] = []
        for path, container in model.named_modules():
            children = list(container.named_children())
            if children and all(n.isdigit() for n, _ in children) and not f"{path}.".startswith(_around(blocks)):
                made = [f"{path}.{n}" if path else n for n, _ in children]
                blocks += [p for p in made if self.within(p) and list(model.get_submodule(p).children())]
        self.blocks = tuple(blocks)
        first: dict[Any, str] = {}
        for block in blocks:
            for name in self.within(block):
                kind = name.removeprefix(block), self._parameters[name].shape, self._parameters[name].dtype
                self._lenders[name] = first.setdefault(kind, name)
            self._block = max(self._block, sum(self._size(n) for n in self.within(block)))
        for path, module in model.named_modules():
            own = any(id(p) in self._names for p in module.parameters(recurse=False))
            if path in self.blocks or (own and not isinstance(module, nn.Embedding)):
                self._hook(path, module)

        def runs(more: int) -> None:
            self._inside += more

        self._handles += [
            model.register_forward_pre_hook(lambda *_: runs(1), prepend=True),
            model.register_forward_hook(lambda *_: runs(-1), always_call=True),
        ]

    def _hook(self, path: str, module: nn.Module) -> None:
        block, within = path in self.blocks, f"{path}." if path else ""
        deep = block or not any(b.startswith(within) for b in self.blocks)

        def used(called: Any) -> list[str]:
            """What the module uses now.

            A copy's weights are not on disk, nor those that are put in for a call; and where something else runs in the
            place of a module inside, that one's are not used.
            """
            idle = [m for m in called.modules() if "forward" in vars(m)] if deep else []
            unused = {id(p) for m in idle for p in m.parameters()}
            found = [self._names.get(id(p)) for p in called.parameters(recurse=deep) if id(p) not in unused]
            return [n for n in found if n is not None]

        def opens(called: Any, args: Any, kwargs: Any) -> None:
            names = [] if "forward" in vars(called) else used(called)
            if not names:
                return
            called._forward_hooks.move_to_end(closing.id)  # others' hooks may still look at the weights
            _expect_no_gradients(path, called.parameters(), (*args, *kwargs.values()))
            self.release(path)
            self._fill(names, path, borrow=self._inside > 0)

        def closes(called: nn.Module, *_: Any) -> None:
            if self._owners and any(id(p) in self._names for p in called.parameters(recurse=deep)):
                self._let_go([n for n, owner in self._owners.items() if owner == path])

        closing = module.register_forward_hook(closes, always_call=True)
        self._handles += [module.register_forward_pre_hook(opens, with_kwargs=True), closing]


def _around(blocks: list[str]) -> tuple[str, ...]:
    return tuple(f"{b}." for b in blocks) or ("\0",)


def _expect_no_gradients(path: str, mine: Iterable[nn.Parameter], given: Iterable[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in (*mine, *given)):
        what = "a model that is read from disk block by block has no gradients"
        raise UnsupportedError(what, where=path, hint="run it in torch.no_grad(), or load it whole")
