"""The proof of a drop: the model must answer to its sample as it did with the dropped sites silenced on trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamina.anatomy.stacks import call, evaluating
from lamina.anatomy.trial import ablated
from lamina.core.errors import LaminaError, UnsupportedError

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy

SAME = 256, 0.05
"""How far apart the silenced and the thinned model may be: rounding steps of the largest output, at most that share."""
KEEP = "something else in the model needs it; keep it"


def tried(anatomy: Anatomy, gone: frozenset[str]) -> Any:
    """What the model answers to the sample with these silenced. Raises UnsupportedError where they can't be."""
    with ablated(anatomy.model, anatomy, gone), _expect_silent(anatomy, gone):
        return _answer(anatomy, anatomy.collapse(gone), "with it silenced")


@contextmanager
def _expect_silent(anatomy: Anatomy, gone: frozenset[str]) -> Iterator[None]:
    """Inside, what joins the stream from a silenced branch must be zeros, but for numbers that are added later."""
    handles = []
    for site in (s for s in gone if not anatomy.branch(s).joins):
        block, branch = anatomy.block(site), anatomy.branch(site)

        def hook(_: nn.Module, __: Any, output: Any, site: str = site, index: int = branch.outlet_index) -> None:
            if tree_leaves(output)[index].any():
                raise UnsupportedError("with its modules silenced it still adds to the stream", where=site, hint=KEEP)

        outlet = anatomy.model.get_submodule(f"{block.path}.{branch.outlet}")
        once = block.turns == 1 and branch.outlet_call is None
        handles += [outlet.register_forward_hook(hook)] if once else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _where(sites: Sequence[str]) -> str:
    return ", ".join(sites[:3]) + (" …" if len(sites) > 3 else "")


def _answer(anatomy: Anatomy, sites: Sequence[str], how: str) -> Any:
    """What the model returns for the anatomy's sample; the same draws every time. None without weights."""
    if next(anatomy.model.parameters()).is_meta:
        return None
    try:
        with evaluating(anatomy.model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return call(anatomy.model, anatomy.sample)
    except (LaminaError, MemoryError):
        raise
    except Exception as error:
        what = f"{how} the model fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UnsupportedError(what, where=_where(sites), hint=KEEP) from error


def expect_same(want: Any, anatomy: Anatomy, sites: Sequence[str]) -> None:
    """The model, thinned, must run, and answer as it did on trial. Raises UnsupportedError.

    All numbers that it returns are compared, but for lists and tensors with an entry for each layer.
    """
    where, got = _where(sites), _answer(anatomy, sites, "without it")
    if want is None or got is None:
        return
    shapes = [next((list(t.shape) for t in outputs(o) if t.is_floating_point()), None) for o in (want, got)]
    if shapes[0] != shapes[1]:
        raise UnsupportedError(f"without it the output is {shapes[1]}, not {shapes[0]}", where=where)
    for one, other in _pairs(want, got):
        eps = torch.finfo(one.dtype).eps
        apart = _apart(one.double(), other.double(), eps)
        if not apart <= min(SAME[0] * eps, SAME[1]):
            what = f"dropped, it gives an output {apart:.1e} of its largest off that of the model that has it silenced"
            raise UnsupportedError(what, where=where, hint="something else in the model reads it; keep it")


def _apart(one: Tensor, other: Tensor, eps: float) -> float:
    """The largest difference, over the largest number."""
    same = (one == other) | (one.isnan() & other.isnan())
    gap = (one - other).abs().masked_fill(same, 0.0)
    largest = one.abs().masked_fill(~one.isfinite(), 0.0).max() if one.numel() else one.sum()
    return float(gap.max() / largest.clamp_min(eps)) if gap.numel() else 0.0


def _pairs(one: Any, other: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The numbers of two answers that stand in the same place and have the same shape."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape == other.shape and one.is_floating_point() and other.is_floating_point():
            yield one, other
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        for key, value in one.items():
            yield from _pairs(value, other.get(key))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for a, b in zip(one, other, strict=True):
            yield from _pairs(a, b)


def outputs(out: Any) -> list[Tensor]:
    """The tensors of a model's output."""
    return [t for t in tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(t, Tensor)]
