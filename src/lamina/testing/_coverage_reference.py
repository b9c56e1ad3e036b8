"""What a model computes without one block or one branch, by plain torch: the drop is judged by this.

Of an anatomy it takes the paths of the blocks and of a branch's outlet alone; where the stream runs, it
sees for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lamina.anatomy.stacks import call
from lamina.core.errors import CertificateError, UnsupportedError

TOLERANCE = 1e-5
"""Largest difference that float32 outputs may show, over the largest number of the output."""
Outputs = dict[str, Tensor]
"""Floating outputs of one forward, by the way that leads to them."""


def outputs(model: nn.Module, sample: Mapping[str, Any]) -> Outputs:
    """All floating tensors that one forward returns, without a cache and without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = call(model, sample)
    return {path: t.detach().clone() for path, t in _floats(out, "") if t.numel()}


def _floats(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _floats(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _floats(inner, f"{path}.{place}")
    elif is_dataclass(value):
        for field in fields(value):
            yield from _floats(getattr(value, field.name), f"{path}.{field.name}")


def expect_equal(got: Outputs, want: Outputs, dense: Outputs) -> None:
    """What the thinned model returns is the reference, and that is not what the dense model returns.

    Lists and tensors with one entry per layer, which are shorter without a block, are left out. Raises
    CertificateError.
    """
    alike = [k for k in want if k in got and _length(got, k) == _length(want, k) and not _fewer(got[k], want[k])]
    if not alike:
        raise CertificateError(f"returns {', '.join(got) or 'nothing'} for {', '.join(want) or 'nothing'}")
    for key in alike:
        if got[key].shape != want[key].shape:
            raise CertificateError(f"output{key} is {list(got[key].shape)}, the reference {list(want[key].shape)}")
        apart, largest = _apart(got[key], want[key])
        if not apart <= TOLERANCE * largest:
            ratio = apart / max(largest, 1e-30)
            raise CertificateError(f"output{key} is off the reference by {ratio:.1e} of its largest")
    moved = [k for k in alike if k in dense and dense[k].shape == want[k].shape]
    if moved and not any(_moves(dense[k], want[k]) for k in moved):
        raise CertificateError("no output depends on it, so that nothing is shown")


def _length(found: Outputs, key: str) -> int:
    """How many entries the innermost list has that holds the output; 0 where none does."""
    stem, _, last = key.rpartition(".")
    return sum(k.rpartition(".")[0] == stem for k in found) if last.isdigit() else 0


def _fewer(got: Tensor, want: Tensor) -> bool:
    """Whether one of the first two dimensions, and nothing else, is smaller by one."""
    apart = [(d, b - a) for d, (a, b) in enumerate(zip(got.shape, want.shape, strict=False)) if a != b]
    return got.ndim == want.ndim > 2 and apart in ([(0, 1)], [(1, 1)])


def _moves(a: Tensor, b: Tensor) -> bool:
    apart, largest = _apart(a, b)
    return apart > 10 * TOLERANCE * largest


def _apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest difference, and the largest finite number of `b`; infinite where only one of them is finite."""
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return float("inf"), 0.0
    a, b = a[finite].double(), b[finite].double()
    return (float((a - b).abs().max()), float(b.abs().max())) if b.numel() else (0.0, 0.0)


@contextmanager
def masked(model: nn.Module, outlet: str, leaf: int, way: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
    """Inside, the module `outlet` returns zeros in its leaf number `leaf`.

    With a `way`, which is what happens from there to the stream, what gives zeros there if a number can be taken off.
    """

    def zero(_: nn.Module, args: Any, output: Any) -> Any:
        leaves, spec = tree_flatten(output)
        leaves[leaf] = torch.zeros_like(leaves[leaf])
        rest = None if way is None else way(leaves[leaf])
        if way is not None and rest is not None and rest.shape == leaves[leaf].shape and not way(-rest).any():
            leaves[leaf] = -rest
        return tree_unflatten(leaves, spec)

    handle = model.get_submodule(outlet).register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def handed_on(model: nn.Module, sample: Mapping[str, Any], paths: Sequence[str], gone: int) -> Iterator[None]:
    """Inside, the block `gone` of those at `paths` is not run: it hands on what it gets.

    What one block takes from the one before, it takes of its own arguments; where the model does something between the
    two, that is the first argument shaped like what it returns. The rest of what it returns is what it returned in a
    run of the whole model. A path that is there several times is a module that makes so many passes.
    """
    pair = (gone - 1, gone) if gone else (0, 1)
    calls = _recorded(model, sample, [paths[n] for n in (*pair, gone)])
    turn = [paths[:n].count(path) for n, path in enumerate(paths)]
    first, second = (calls[paths[n]][turn[n]] for n in pair)
    taken = {i: place for i, leaf in enumerate(first.leaves) for place, value in second.given if value is leaf}
    taken = taken or calls[paths[gone]][turn[gone]].alike()
    if not taken:
        raise UnsupportedError("the block takes nothing that is shaped like what it returns", where=paths[gone])
    module = model.get_submodule(paths[gone])
    before, usual = module.__dict__.get("forward"), module.forward
    rounds = enumerate(calls[paths[gone]])

    def forward(*args: Any, **kwargs: Any) -> Any:
        number, own = next(rounds)
        if number % paths.count(paths[gone]) != turn[gone]:
            return usual(*args, **kwargs)
        leaves = list(own.leaves)
        for leaf, place in taken.items():
            leaves[leaf] = args[place] if isinstance(place, int) else kwargs[place]
        return tree_unflatten(leaves, own.spec)

    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _Call:
    """One call of a block: the tensors it was given, by position or keyword, and the leaves it returned."""

    def __init__(self, args: Any, kwargs: Any, output: Any) -> None:
        self.given = [(p, v) for p, v in [*enumerate(args), *kwargs.items()] if isinstance(v, Tensor)]
        self.leaves, self.spec = tree_flatten(output)

    def alike(self) -> dict[int, int | str]:
        """The first leaf that is shaped like an argument, and where that argument stands."""
        for number, leaf in enumerate(self.leaves):
            for place, value in self.given:
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape == value.shape:
                    return {number: place}
        return {}


def _recorded(model: nn.Module, sample: Mapping[str, Any], paths: Sequence[str]) -> dict[str, list[_Call]]:
    """The calls of each of these modules in one forward, in order."""
    calls: dict[str, list[_Call]] = {}
    handles = []
    for path in dict.fromkeys(paths):

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            calls.setdefault(path, []).append(_Call(args, kwargs, output))

        handles.append(model.get_submodule(path).register_forward_hook(note, with_kwargs=True))
    try:
        outputs(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def repeats(model: nn.Module, sample: Mapping[str, Any]) -> bool:
    """Whether modules of one class, numbered and made of others, each return a tensor shaped like one they take.

    Two of them are enough. Found without lamina: where this does not hold, there is nothing to drop.
    """
    seen: dict[tuple[str, type], set[str]] = {}
    handles = []
    for path, module in model.named_modules():
        if not path[-1:].isdigit() or not any(True for _ in module.children()):
            continue
        key = (path.rpartition(".")[0], type(module))

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, key: Any = key, path: str = path) -> None:
            taken = {t.shape for _, t in _floats([*args, *kwargs.values()], "")}
            if any(t.shape in taken and t.ndim > 2 for _, t in _floats(output, "")):
                seen.setdefault(key, set()).add(path)

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        outputs(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return any(len(paths) > 1 for paths in seen.values())
