"""Find the stacks of a model: containers whose elements hand one stream from each to the next."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamina.anatomy.trace import first_tensor, fresh
from lamina.core.errors import InputError, UnsupportedError


@dataclass(eq=False)
class Seen:
    """One call of one element of a container, as it was made in a run of the whole model."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None
    stream: int | str = 0
    rounds: int = 1
    """How often the model runs the element in one forward, passes apart."""
    turn: int = 0
    turns: int = 1
    """Which of the element's passes over the stream this is, and how many there are: each is a block of its own."""
    tokens: int = 1
    """Positions of the model's largest stack: costs are told for one of them."""

    @property
    def entering(self) -> Tensor:
        """The stream that goes in, [batch, tokens, width]."""
        return self.args[self.stream] if isinstance(self.stream, int) else self.kwargs[self.stream]

    def products(self, flops: int) -> int:
        """Multiply-adds per token of what takes so many FLOPs in one call."""
        return flops // 2 * self.rounds // self.tokens

    @property
    def leaving(self) -> Tensor:
        """The stream that comes out."""
        found = first_tensor(self.output, tuple(self.entering.shape))
        found = first_tensor(self.output) if found is None else found
        if found is None:
            raise UnsupportedError("the block returns no tensor", where=self.path)
        return found


def default_sample(model: nn.Module, tokens: int = 7) -> dict[str, Tensor]:
    """Token ids [1, tokens] for a model that reads tokens; the same for every run."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        vocabulary = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        vocabulary = embeddings[0] if embeddings else None
    if not isinstance(vocabulary, nn.Embedding):
        raise InputError(
            "can't make an input for this model", where=type(model).__name__, hint="pass sample={'name': tensor, …}"
        )
    step = torch.arange(1, tokens + 1, device=vocabulary.weight.device)
    return {"input_ids": ((step * 7919) % max(vocabulary.num_embeddings - 1, 1)).unsqueeze(0)}


def call(model: nn.Module, sample: Mapping[str, Any]) -> Any:
    """One forward without a cache and without gradients."""
    with torch.no_grad():
        if caches(model) and "use_cache" not in sample:
            with suppress(TypeError):  # some hand it on to what does not take it
                return model(**sample, use_cache=False)
        return model(**sample)


def caches(model: nn.Module) -> bool:
    """Whether a forward of the model takes `use_cache`."""
    config = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        return True
    inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())
    named = inspect.signature(model.forward).parameters
    return "use_cache" in named or ("kwargs" in named and any(hasattr(c, "use_cache") for c in inner))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _watched(model: nn.Module, seen: list[Seen]) -> Iterator[None]:
    handles = []
    for path, container in model.named_modules():
        children = list(container.named_children())
        if len(children) < 1 or not all(name.isdigit() for name, _ in children):
            continue
        for name, child in children:
            where = f"{path}.{name}" if path else name

            def opens(module: nn.Module, args: Any, kwargs: Any, where: str = where) -> None:
                seen.append(Seen(where, module, *fresh((args, kwargs))))

            def closes(module: nn.Module, args: Any, kwargs: Any, output: Any, where: str = where) -> None:
                next(s for s in reversed(seen) if s.path == where and s.output is None).output = output

            handles.append(child.register_forward_pre_hook(opens, with_kwargs=True))
            handles.append(child.register_forward_hook(closes, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _streams_of(seen: Seen) -> list[int | str]:
    """Where the element may take the stream: arguments shaped like what it returns, the likeliest first."""
    made = [t for t in tree_leaves(seen.output) if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 1]
    given = [(p, v) for p, v in [*enumerate(seen.args), *seen.kwargs.items()] if isinstance(v, Tensor)]
    return list(dict.fromkeys(p for out in made for p, v in given if v.shape == out.shape))


def _choose_stream(calls: list[Seen]) -> None:
    """Where elements take several streams, and those that come first make no chain, another that does."""
    first = [c.stream for c in calls]
    for place in _streams_of(calls[0]):
        if _is_chain(calls):
            return
        if all(place in _streams_of(c) for c in calls):
            for one in calls:
                one.stream = place
    if not _is_chain(calls):
        for one, place in zip(calls, first, strict=True):
            one.stream = place


def find_stacks(model: nn.Module, sample: Mapping[str, Any]) -> list[tuple[str, list[Seen]]]:
    """(container's path, calls of its elements in depth order) of every stack, outermost only.

    Raises UnsupportedError where no chain of at least two elements is found.
    """
    seen: list[Seen] = []
    with _watched(model, seen):
        call(model, sample)
    parents: dict[str, list[Seen]] = {}
    for one in seen:
        places = _streams_of(one) if one.output is not None else []
        if places:
            one.stream = places[0]
            parents.setdefault(one.path.rpartition(".")[0], []).append(one)
    often = Counter(one.path for one in seen)
    for one in seen:
        one.rounds = often[one.path]
    parents = {path: _first_round(calls) for path, calls in parents.items()}
    for calls in parents.values():
        _count_passes(calls, often)
        _choose_stream(calls)
    chains = {path: calls for path, calls in parents.items() if _is_chain(calls)}
    long = {p for p, c in chains.items() if len(c) > 1} or set(chains)
    outer = dict.fromkeys(_holder(p, chains) for p in long if not any(_inside(p, q) for q in long))
    if not outer:
        raise UnsupportedError("no stack of blocks that share a residual stream was found", where=type(model).__name__)
    return [(path, _flatten(chains[path], chains)) for path in chains if path in outer]


def _first_round(calls: list[Seen]) -> list[Seen]:
    """The calls until the first element is called again, where a model runs through its blocks several times."""
    again = next((n for n, c in enumerate(calls) if n and c.path == calls[0].path), len(calls))
    return calls[:again] if again > 1 else calls


def _count_passes(calls: list[Seen], often: Mapping[str, int]) -> None:
    """Number the passes where elements are run again and again, each time on what they have just returned."""
    passes = Counter(c.path for c in calls)
    if max(passes.values()) == 1 or not linked(calls):
        return
    met: Counter[str] = Counter()
    for one in calls:
        one.turn, one.turns, one.rounds = met[one.path], passes[one.path], often[one.path] // passes[one.path]
        met[one.path] += 1


def _holder(path: str, chains: Mapping[str, list[Seen]]) -> str:
    """The container itself, or the one around it if that holds nothing else (a single group of blocks)."""
    parent = path.rpartition(".")[0]
    around = chains.get(parent, [])
    return parent if len(around) == 1 and around[0].path == path and _same(around[0], chains[path]) else path


def _is_chain(calls: list[Seen]) -> bool:
    once = any(c.turns > 1 for c in calls) or len({c.path for c in calls}) == len(calls)
    kinds = Counter(type(m) for c in calls for m in _opened(c.module))
    repeated = len(calls) == 1 or max(kinds.values()) > 1
    whole = all(list(c.module.children()) for c in calls)
    return once and repeated and whole and (linked(calls) or _alike(calls, kinds))


def _opened(module: nn.Module) -> list[nn.Module]:
    """The elements of a group of blocks, or the block itself."""
    return list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else [module]


def linked(calls: list[Seen]) -> bool:
    """Whether each element gets the very tensor that the one before returned."""
    return all(a.leaving is b.entering for a, b in pairwise(calls))


def carries(calls: list[Seen]) -> tuple[tuple[int, int | str], ...]:
    """What each element hands to the next beside the stream: (place in what it returns, position or keyword)."""
    found: list[set[tuple[int, int | str]]] = []
    for one, other in pairwise(calls):
        out = one.output if isinstance(one.output, tuple | list) else ()
        given = [*enumerate(other.args), *other.kwargs.items()]
        main = one.leaving
        pairs = {(i, p) for i, v in enumerate(out) for p, g in given if isinstance(v, Tensor) and v is g is not main}
        found.append(pairs)
    return tuple(sorted(set.union(*found), key=str)) if found else ()


def _alike(calls: list[Seen], kinds: Mapping[type, int]) -> bool:
    """Whether elements of one class work on streams of one shape, though something happens between them."""
    return len(calls) > 1 and len(kinds) == 1 and len({tuple(c.entering.shape) for c in calls}) == 1


def _inside(path: str, outer: str) -> bool:
    return path.startswith(outer + ".") if outer else path != ""


def _flatten(calls: list[Seen], chains: Mapping[str, list[Seen]]) -> list[Seen]:
    """Elements that are themselves chains (groups of blocks) are replaced by their elements."""
    flat: list[Seen] = []
    for one in calls:
        inner = chains.get(one.path)
        flat.extend(_flatten(inner, chains) if inner and _same(one, inner) else [one])
    return flat


def _same(one: Seen, inner: list[Seen]) -> bool:
    """Whether an element does nothing but run the inner chain."""
    return inner[0].entering is one.entering and inner[-1].leaving is one.leaving
