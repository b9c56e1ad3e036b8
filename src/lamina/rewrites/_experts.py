"""Neurons of stacked experts: which rows and columns are one neuron's, found by trial; experts aligned and merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.anatomy._units_routes import experts_path
from lamina.anatomy.trace import first_tensor
from lamina.core.errors import UnsupportedError

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.core.sites import Site

EXACT = 1e-5
"""By how much, relatively, an expert may change when its neurons change places: rounding of float32."""
TOKENS = 5


@dataclass(frozen=True)
class Layout:
    """Where the neurons of an expert lie in its tensors: name → (dimension, how they lie along it).

    "plain": neuron j at j; "halves": at j and width + j; "pairs": at 2j and 2j + 1. Tensors without neurons (a bias
    of what comes out) are in `others`.
    """

    path: str
    width: int
    places: Mapping[str, tuple[int, str]]
    others: tuple[str, ...]

    def split(self, name: str, tensor: Tensor) -> Tensor:
        """One expert's tensor as [neurons, numbers]."""
        dim, way = self.places[name]
        lined = tensor.movedim(dim, 0).flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1)
        if way == "halves":
            return lined.unflatten(0, (2, self.width)).movedim(0, 1).flatten(1)
        return lined.reshape(self.width, -1) if way == "pairs" else lined

    def joined(self, name: str, rows: Tensor, like: Tensor) -> Tensor:
        """The reverse of `split`: a tensor shaped like one expert's."""
        dim, way = self.places[name]
        lined = rows
        if way != "plain":
            halves = rows.unflatten(1, (2, -1))
            lined = (halves.movedim(1, 0) if way == "halves" else halves).reshape(2 * self.width, -1)
        if like.ndim == 1:
            return lined.flatten()
        rest = [n for d, n in enumerate(like.shape) if d != dim]
        return lined.reshape(like.shape[dim], *rest).movedim(0, dim)


def tensors(model: nn.Module, path: str) -> dict[str, Tensor]:
    """The tensors of a module of stacked experts, [experts, …]."""
    return {n: p.detach() for n, p in model.get_submodule(path).named_parameters(recurse=False)}


def layout(anatomy: Anatomy, site: Site) -> Layout:
    """How a mixture's experts are laid out: the first way under which neurons may change places and nothing changes.

    Raises UnsupportedError where there is none.
    """
    path = experts_path(anatomy, site)
    module: Any = anatomy.model.get_submodule(path)
    held = tensors(anatomy.model, path)
    draw = torch.Generator().manual_seed(0)
    stream = anatomy.stack(site.id.rpartition(".")[0]).width
    first = next(iter(held.values()))
    tokens = torch.randn(TOKENS, stream, generator=draw).to(first)
    chosen = (torch.arange(TOKENS, device=first.device) % site.width).unsqueeze(1)
    gates = torch.ones(TOKENS, 1, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        want = first_tensor(module.forward(tokens, chosen, gates))
        assert want is not None
        for made in _candidates(path, held, stream):
            order = torch.randperm(made.width, generator=draw).to(first.device)
            changed = {n: _reordered(made, n, held[n], order) for n in made.places}
            got = first_tensor(torch.func.functional_call(module, changed, (tokens, chosen, gates)))
            assert got is not None
            if float((got - want).norm()) <= max(EXACT, float(torch.finfo(got.dtype).eps)) * float(want.norm()):
                return made
    raise UnsupportedError("its experts' neurons can't be told apart", where=site.id)


def _reordered(made: Layout, name: str, stacked: Tensor, order: Tensor) -> Tensor:
    return torch.stack([made.joined(name, made.split(name, one)[order], one) for one in stacked])


def _candidates(path: str, held: Mapping[str, Tensor], stream: int) -> Iterator[Layout]:
    """Ways in which the tensors agree on a number of neurons; those of two dimensions beside the experts' decide."""
    cubes = [n for n, t in held.items() if t.ndim == 3]
    flats = [n for n, t in held.items() if t.ndim == 2]
    ways = ("plain", "halves", "pairs")
    for dims in product((0, 1), repeat=len(cubes)):
        if any(held[n].shape[2 - d] != stream for n, d in zip(cubes, dims, strict=True)):
            continue
        lengths = [held[n].shape[1 + d] for n, d in zip(cubes, dims, strict=True)]
        width = min(lengths)
        if any(size not in (width, 2 * width) for size in lengths):
            continue
        choices = [("plain",) if size == width else ways[1:] for size in lengths]
        inner = [
            n
            for n in flats
            if any(held[n].shape[1] == s and n.startswith(c) for c, s in zip(cubes, lengths, strict=True))
        ]
        for kinds in product(*choices):
            places = {n: (d, k) for n, d, k in zip(cubes, dims, kinds, strict=True)}
            for some in (inner, [n for n in inner if held[n].shape[1] != stream]):
                owner = {n: next(c for c in cubes if n.startswith(c)) for n in some}
                full = {**places, **{n: (0, places[c][1]) for n, c in owner.items()}}
                yield Layout(path, width, full, tuple(n for n in held if n not in full))


def aligned(reference: Tensor, other: Tensor) -> Tensor:
    """The order of the other's neurons [neurons, numbers] in which they are most like the reference's: by products."""
    from scipy.optimize import linear_sum_assignment

    _, order = linear_sum_assignment((reference @ other.T).cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(other.device)


def merged(
    made: Layout, held: Mapping[str, Tensor], group: Sequence[int], shares: Sequence[float]
) -> dict[str, Tensor]:
    """One expert for a group, float64: tensors by their `shares`, neurons in the order of the group's first expert.

    `held` [experts, …]; without any share all count alike.
    """
    weights = torch.tensor(list(shares), dtype=torch.float64)
    weights = weights / weights.sum() if float(weights.sum()) > 0 else torch.full_like(weights, 1 / len(weights))

    def parts(expert: int) -> list[Tensor]:
        return [made.split(n, held[n][expert].double()) for n in made.places]

    first = parts(group[0])
    total = [float(weights[0]) * p for p in first]
    for share, expert in zip(weights[1:].tolist(), group[1:], strict=True):
        mine = parts(expert)
        order = aligned(torch.cat(first, 1), torch.cat(mine, 1))
        total = [t + share * p[order] for t, p in zip(total, mine, strict=True)]
    found = {n: made.joined(n, t, held[n][0]) for n, t in zip(made.places, total, strict=True)}
    for name in made.others:
        found[name] = torch.stack([w * held[name][e].double() for w, e in zip(weights, group, strict=True)]).sum(0)
    return found
