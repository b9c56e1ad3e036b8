"""Which field of which config counts a stack's layers: found by value, proved by building the model from it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lamina.anatomy.config import (
    COUNTING,
    STANDARD,
    Count,
    Edits,
    config_of,
    counts,
    edits,
    fields,
    repeated,
    spelt_out,
    tree,
)
from lamina.anatomy.passes import order
from lamina.core.errors import UnsupportedError

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Change:
    """What the configs of a model say once some layers of a stack are gone.

    `path` leads from the model's config to the one that is edited; `copies` are the paths of modules that hold a
    config of their own, made from it, and what changes there; `held` those that hold numbers taken from it.
    `sliced` are the tensors outside the stack that hold a part for each layer, one after the other, with the dimension.
    """

    path: tuple[str, ...] = ()
    edits: Edits = field(default_factory=dict[str, list[Any]])
    copies: Mapping[str, Edits] = field(default_factory=dict[str, Edits])
    held: Mapping[str, Edits] = field(default_factory=dict[str, Edits])
    sliced: Mapping[str, int] = field(default_factory=dict[str, int])


def dense_class(model: nn.Module) -> type:
    """The class that transformers or its author wrote: of a thinned checkpoint's model, the dense model's."""
    name = (getattr(getattr(model, "config", None), "lamina", None) or {}).get("model_class")
    return next((k for k in type(model).__mro__ if k.__name__ == name), type(model))


def twin(model: nn.Module, config: Any = None) -> nn.Module | None:
    """A model of the same dense class without weights, built from `config` or the model's own; None where it can't be.

    The config is copied first.
    """
    kind = dense_class(model)
    config = copy.deepcopy(config_of(model) if config is None else config)
    if config is None or not hasattr(kind, "_from_config"):
        return None
    try:
        with torch.device("meta"), _silent():
            return kind(config)
    except Exception:
        return None


@contextmanager
def _silent() -> Iterator[None]:
    """Without what libraries log about a config's values."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)


def shapes(module: nn.Module) -> Shapes:
    """The shape of every tensor of the state dict."""
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def change(model: nn.Module, stack_path: str, kept: Sequence[int]) -> Change:
    """What the configs must say when only the layers `kept` of the stack remain.

    Raises UnsupportedError where no field counts the stack's layers, or where the config can't say what remains.
    """
    depth = len(list(model.get_submodule(stack_path).children()))
    if len(kept) == depth or config_of(model) is None:
        return Change()
    return _Trial(model, stack_path, kept, depth).best()


def fewer_passes(model: nn.Module, stack_path: str, depth: int, kept: Sequence[int], run: Callable[[], Any]) -> Change:
    """What the config must say when of `depth` passes through a stack's modules only those of number `kept` remain.

    A field is right if `run`, with the field changed, has the model call the modules of those passes and no others.
    Raises UnsupportedError where no field does.
    """
    if config_of(model) is None:
        raise UnsupportedError("no config says how many passes its modules make", where=stack_path)
    passes = order(model, stack_path, run)
    wanted = [passes[n] for n in kept]
    for one in _Trial(model, stack_path, kept, depth).candidates():
        place = _place(model.config, one.path)
        try:
            _set(place, {k: after for k, (_, after) in one.edits.items()})
            if order(model, stack_path, run) == wanted:
                return one
        except Exception:  # whatever a config or a model may say of a number that it does not like
            continue
        finally:
            _set(place, {k: before for k, (before, _) in one.edits.items()})
    raise UnsupportedError("no config can say that these passes remain", where=stack_path, hint="drop others of them")


def _set(config: Any, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        setattr(config, key, copy.deepcopy(value))


def _place(config: Any, path: Sequence[str]) -> Any:
    """The config inside a config."""
    for name in path:
        config = getattr(config, name)
    return config


class _Trial:
    """Edits of one model's configs, and how well the models that they build agree with what remains of one stack."""

    def __init__(self, model: nn.Module, path: str, kept: Sequence[int], depth: int) -> None:
        self.model, self.path, self.kept, self.depth = model, path, kept, depth
        self.root: Any = model.config
        self.shapes = shapes(model)

    def best(self) -> Change:
        """The first edit whose model has all that remains; else the first that counts the stack's layers."""
        if twin(self.model) is None:
            return self._likeliest()
        known: dict[int, tuple[Change, nn.Module]] = {}
        for one in self.candidates():
            built = self._build(one)
            fit = self._fit(built) if built is not None else 0
            if built is not None and fit:
                known.setdefault(fit, (one, built))
            if fit == len(FITS):
                break
        if not known:
            raise UnsupportedError("no config counts this stack's layers", where=self.path)
        one, built = known[max(known)]
        if max(known) < len(FITS):
            self._check_periods(one)
        sliced = self._slices(shapes(built))
        return replace(one, copies=self._copies(built), held=self._held(built, sliced, one.edits), sliced=sliced)

    def _slices(self, theirs: Shapes) -> dict[str, int]:
        """Tensors outside the stack that hold a part for each layer → the dimension.

        Raises UnsupportedError where one differs otherwise.
        """
        found: dict[str, int] = {}
        for name, shape in self.shapes.items():
            other = theirs.get(name, shape)
            if name.startswith(f"{self.path}.") or other == shape:
                continue
            differing = [d for d, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b]
            whole = len(shape) == len(other) and len(differing) == 1
            if not whole or shape[differing[0]] * len(self.kept) != other[differing[0]] * self.depth:
                raise UnsupportedError(f"{name} has a size that depends on the number of layers", where=self.path)
            found[name] = differing[0]
        return found

    def _likeliest(self) -> Change:
        """Where the class can't be built here: the field that has the usual name, or the only one."""
        found = [c for c in self.candidates() if len(c.edits) > 0]
        if len({(c.path, next(iter(c.edits))) for c in found}) > 1:
            found = [c for c in found if next(iter(c.edits)) == STANDARD]
        if not found:
            raise UnsupportedError("no config counts this stack's layers", where=self.path)
        self._check_periods(found[0])
        return found[0]

    def _check_periods(self, one: Change) -> None:
        """What repeats over the layers must not be told by a period, since what remains no longer does."""
        if rule := repeated(_place(self.root, one.path), self.depth):
            what = f"config field {rule[0]} = {rule[1]} repeats over the layers"
            raise UnsupportedError(what, where=self.path, hint="drop sublayers instead")

    def candidates(self) -> Iterator[Change]:
        """Edits that may be right, the likeliest first: of the nearest config, all that it says of the layers.

        Then without one of its lists, which may be no list of layers.
        """
        near = self._above()
        for path, config in sorted(tree(self.root), key=lambda p: near.get(id(p[1]), len(near))):
            for count in counts(config, self.depth):
                for whole in self._readings(config, count):
                    if spelt := spelt_out(config, self.depth, self.kept):
                        yield Change(path, whole | spelt)
                    for left in (None, *(k for k in whole if k != count[0])):
                        yield Change(path, {k: v for k, v in whole.items() if k != left})

    def _readings(self, config: Any, count: Count) -> Iterator[Edits]:
        """The edits of one config where this field counts: its lists of layers count them from 0, or from 1."""
        found: list[Edits] = []
        for first in (0, 1):
            whole = edits(config, self.depth, self.kept, count=count, first=first)
            if whole not in found:
                found.append(whole)
                yield whole

    def _above(self) -> dict[int, int]:
        """The configs of the modules above the stack: id → how far above."""
        parts = self.path.split(".")
        paths = [".".join(parts[:cut]) for cut in range(len(parts), -1, -1)]
        configs = [config_of(self.model.get_submodule(p)) for p in paths]
        return {id(c): far for far, c in reversed(list(enumerate(configs))) if c is not None}

    def _build(self, one: Change) -> nn.Module | None:
        """The model that the edited config builds."""
        config = copy.deepcopy(self.root)
        place = _place(config, one.path)
        try:
            _set(place, {k: after for k, (_, after) in one.edits.items()})
        except (TypeError, ValueError):
            return None
        return twin(self.model, config)

    def _fit(self, built: nn.Module) -> int:
        """How much of the built model is as it must be: 0 where the stack has another number of layers."""
        try:
            layers = list(built.get_submodule(self.path).children())
        except AttributeError:
            return 0
        if len(layers) != len(self.kept):
            return 0
        inside = f"{self.path}."
        mine, theirs = ({k for k in s if not k.startswith(inside)} for s in (self.shapes, shapes(built)))
        own = list(self.model.get_submodule(self.path).children())
        cut = ("Gone", "Group")
        alike = all(
            shapes(own[old]) == shapes(layer) and _nature(own[old]) == _nature(layer)
            for old, layer in zip(self.kept, layers, strict=True)
            if not any(type(m).__name__ in cut for m in own[old].modules())
        )
        return FITS[mine == theirs, alike]

    def _copies(self, built: nn.Module) -> dict[str, Edits]:
        """What changes in configs that modules made from the model's and keep to themselves."""
        seen = {id(c) for _, c in tree(self.root)}
        found: dict[str, Edits] = {}
        others = dict(built.named_modules())
        for path, module in self.model.named_modules():
            config = config_of(module)
            if config is None or id(config) in seen or path.startswith(f"{self.path}."):
                continue
            seen.add(id(config))
            other = config_of(others.get(path))
            if other is not None and (differing := self._differing(fields(config), fields(other))):
                found[path] = differing
        return found

    def _held(self, built: nn.Module, sliced: Mapping[str, int], said: Edits) -> dict[str, Edits]:
        """What changes in the plain attributes of modules outside the stack that speak of layers.

        Those are named so, or as a field of the config that changes. Of modules whose tensors are `sliced`, all that
        changes.
        """
        found: dict[str, Edits] = {}
        others = dict(built.named_modules())
        owners = {name.rpartition(".")[0] for name in sliced}
        for path, module in self.model.named_modules():
            if path in others and not path.startswith(f"{self.path}."):
                mine, theirs = (
                    {k: v for k, v in vars(m).items() if not k.startswith("_") and _plain(v)}
                    for m in (module, others[path])
                )
                speak = {k: v for k, v in mine.items() if path in owners or k in said or COUNTING.search(k)}
                if differing := self._differing(speak, theirs, sure=path in owners):
                    found[path] = differing
        return found

    def _differing(self, mine: Mapping[str, Any], theirs: Mapping[str, Any], *, sure: bool = False) -> Edits:
        """Fields of two configs that differ and speak of layers (`sure`: any that differ)."""
        found: Edits = {}
        for key, old in mine.items():
            new = theirs.get(key)
            if isinstance(old, list | tuple) and isinstance(new, list | tuple):
                if list(old) != list(new):
                    found[key] = [list(old), list(new)]
            elif type(old) is not type(new) or old == new:
                continue
            elif sure or isinstance(old, Mapping) or COUNTING.search(key):
                found[key] = [old, new]
        return found


def _nature(module: nn.Module) -> list[tuple[str, Any]]:
    """The classes inside a module, and the words, factors and switches that they hold."""
    found: list[tuple[str, Any]] = []
    for path, inner in module.named_modules():
        held = {k: v for k, v in vars(inner).items() if type(v) in (float, bool, str) and not k.startswith("_")}
        found.append((path, (type(inner).__name__, {k: v for k, v in held.items() if k not in MODES})))
    return found


def _plain(value: Any) -> bool:
    """Whether it is a number, or a list of numbers or words."""
    if isinstance(value, list | tuple):
        return all(type(v) in (int, str) for v in value)
    return type(value) is int


MODES = ("training", "gradient_checkpointing")
FITS = {(False, False): 1, (False, True): 2, (True, False): 3, (True, True): 4}
"""(all outside the stack is as it was, the layers are those that remain) → rank."""
