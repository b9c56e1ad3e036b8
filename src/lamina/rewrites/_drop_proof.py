"""The proof of a drop: the model must answer to its sample as it did with the dropped sites silenced on trial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def tried(anatomy: Anatomy, gone: frozenset[str]) -> Tensor | None:
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


def _answer(anatomy: Anatomy, sites: Sequence[str], how: str) -> Tensor | None:
    """The first number-like output to the anatomy's sample; the same draws every time. None without weights."""
    if next(anatomy.model.parameters()).is_meta:
        return None
    try:
        with evaluating(anatomy.model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = outputs(call(anatomy.model, anatomy.sample))
    except (LaminaError, MemoryError):
        raise
    except Exception as error:
        what = f"{how} the model fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UnsupportedError(what, where=_where(sites), hint=KEEP) from error
    return next((t for t in found if t.is_floating_point()), None)


def expect_same(tried: Tensor | None, anatomy: Anatomy, sites: Sequence[str]) -> None:
    """The model, thinned, must run, and answer as it did on trial. Raises UnsupportedError."""
    where, made = _where(sites), _answer(anatomy, sites, "without it")
    if tried is None or made is None:
        return
    if tried.shape != made.shape:
        raise UnsupportedError(f"without it the output is {list(made.shape)}, not {list(tried.shape)}", where=where)
    eps = torch.finfo(tried.dtype).eps
    one, other = tried.double(), made.double()
    same = (one == other) | (one.isnan() & other.isnan())
    gap = (one - other).abs().masked_fill(same, 0.0)
    largest = one.abs().masked_fill(~one.isfinite(), 0.0).max() if one.numel() else one.sum()
    apart = float(gap.max() / largest.clamp_min(eps)) if gap.numel() else 0.0
    if not apart <= min(SAME[0] * eps, SAME[1]):
        what = f"dropped, it gives an output {apart:.1e} of its largest off that of the model that has it silenced"
        raise UnsupportedError(what, where=where, hint="something else in the model reads it; keep it")


def outputs(out: Any) -> list[Any]:
    """The tensors of a model's output."""
    return [t for t in tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(t, Tensor)]
