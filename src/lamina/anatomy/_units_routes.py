"""What each expert of a mixture makes of each token that goes to it, as a forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamina.anatomy.trace import first_tensor
from lamina.core.errors import UnsupportedError
from lamina.core.sites import Kind, Site

if TYPE_CHECKING:
    from lamina.anatomy.anatomy import Anatomy

NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far gates × outputs may be from what the experts add, by type; others 5e-2."""


@dataclass(frozen=True, eq=False)
class Routed:
    """One mixture on one batch: tokens [tokens, width], the `experts` [tokens, k] that each goes to, and their `gates`.

    `outputs` has of each choice what the expert makes of the token, [k, tokens, width]; None where nobody asked.
    """

    tokens: Tensor
    experts: Tensor
    gates: Tensor
    outputs: Tensor | None = None


Note = Callable[[Site, Routed], None]


def experts_path(anatomy: Anatomy, site: Site) -> str:
    """The module that holds a mixture's stacked experts. Raises UnsupportedError where they are not stacked."""
    parameters = dict(anatomy.model.named_parameters())
    held = {t.param.rpartition(".")[0] for t in anatomy.ties(site) if parameters.get(t.param, torch.empty(0)).ndim > 2}
    if len(held) != 1:
        raise UnsupportedError("its experts are not stacked in one module", where=site.id)
    return held.pop()


def router_of(anatomy: Anatomy, site: Site) -> Tensor:
    """The router's rows [experts, width]. Raises UnsupportedError where there is no one such matrix."""
    parameters, width = dict(anatomy.model.named_parameters()), anatomy.stack(site.id.rpartition(".")[0]).width
    found = {t.param: parameters[t.param] for t in anatomy.ties(site) if t.param in parameters and t.dim == 0}
    path = experts_path(anatomy, site)
    rows = [p for n, p in found.items() if tuple(p.shape) == (site.width, width) and not n.startswith(f"{path}.")]
    if len(rows) != 1:
        raise UnsupportedError("its router is no one matrix", where=site.id)
    return rows[0].detach()


@contextmanager
def routes_watched(anatomy: Anatomy, note: Note, *, outputs: bool = False) -> Iterator[None]:
    """Inside, `note(site of experts, what went where)` is called for each mixture of each forward.

    `outputs` runs every choice's experts once more, on their own. Raises UnsupportedError for a mixture whose experts
    do not take tokens, choices and gates, or do not add gates × outputs.
    """
    sites = [s for m in anatomy.of_kind(Kind.MOE) for s in anatomy.units(m, Kind.EXPERT)]
    handles = []

    def watch(site: Site) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            note(site, _routed(site, module, args, kwargs, out, outputs=outputs))

        module = anatomy.model.get_submodule(experts_path(anatomy, site))
        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    try:
        for site in sites:
            watch(site)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _routed(site: Site, module: Any, args: Any, kwargs: Mapping[str, Any], out: Any, *, outputs: bool) -> Routed:
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    whole = [t for t in given if not t.is_floating_point()]
    if len(given) != 3 or len(whole) != 1 or given[1] is not whole[0] or given[1].shape != given[2].shape:
        raise UnsupportedError("its experts are given no tokens, choices and gates", where=site.id)
    tokens, experts, gates = (t.detach() for t in given)
    if not outputs:
        return Routed(tokens, experts, gates)
    made = []
    for place in range(experts.shape[1]):
        one = module.forward(tokens, experts[:, place : place + 1], torch.ones_like(gates[:, :1]))
        made.append(first_tensor(one))
    stacked = torch.stack(made).detach()
    total, got = (stacked * gates.T.unsqueeze(-1)).sum(0), first_tensor(out)
    assert got is not None
    if float((total - got).norm()) > NEAR.get(got.dtype, 5e-2) * float(got.norm()):
        raise UnsupportedError("what its experts add is not gates times outputs", where=site.id)
    return Routed(tokens, experts, gates, stacked)
