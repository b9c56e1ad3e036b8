"""A stream in another basis: gains of its norms go into the maps that read them, then all that reads or writes turns.

An RMSNorm gives the same of a stream that an orthogonal Q has turned, turned: so the network computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamina.anatomy.stacks import call, evaluating
from lamina.anatomy.trace import first_tensor
from lamina.core.errors import UnsupportedError
from lamina.rewrites._norms import Norm, norm_of

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy, Stack
    from lamina.lab import Lab

NEAR = {torch.float64: 1e-8, torch.float32: 1e-4}
"""How far, of the output's size, a turned network may be off, by type; others 5e-2."""
SMALL = 1e-9


@dataclass(frozen=True, eq=False)
class Basis:
    """The parameters that hold a stream's channels: name → dimension of `writes`, of `reads` with the norm's path.

    `norms` path → what it is; `untied` are reads whose weights are an embedding's too, and no longer will be.
    """

    writes: Mapping[str, int]
    reads: Mapping[str, tuple[int, str]]
    norms: Mapping[str, Norm]
    untied: tuple[str, ...] = ()


def refused(anatomy: Anatomy, stack: Stack) -> str:
    """Why a stream can't be turned, as far as its norms tell without a run; '' where nothing is in the way."""
    for tie in anatomy.stream(stack).scales:
        path = tie.param.rpartition(".")[0]
        norm = norm_of(anatomy.model.get_submodule(path))
        if norm is None or norm.centred:
            return f"{path} is no RMSNorm, and would see another mean in another basis"
        if norm.bias:
            return f"{path} adds a bias, which no map that reads it can take over"
    for block in stack.blocks:
        behind = {f"{block.path}.{x.outlet}" for x in block.branches if x.outlet != x.core}
        if behind & {t.param.rpartition(".")[0] for t in anatomy.stream(stack).scales}:
            return f"{sorted(behind)[0]} scales what its sublayer adds, channel by channel"
    return ""


def basis(anatomy: Anatomy, stack: Stack) -> Basis:
    """Who reads which norm, by a run on the sample. Raises UnsupportedError where a reader is given something else."""
    found = anatomy.stream(stack)
    norms: dict[str, Norm] = {}
    for tie in found.scales:
        path = tie.param.rpartition(".")[0]
        made = norm_of(anatomy.model.get_submodule(path))
        assert made is not None
        norms[path] = made
    writes = {t.param: t.dim for t in found.writes}
    names: dict[int, list[str]] = {}
    for name, p in anatomy.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    twins = {n: [o for o in held if o != n] for held in names.values() for n in held}
    reads = {t.param: t.dim for t in found.reads}
    tied = {o: d for n, d in writes.items() for o in twins[n]}
    sources = _sources(anatomy, norms, {n.rpartition(".")[0] for n in (*reads, *tied)})
    linked: dict[str, tuple[int, str]] = {}
    for name, dim in {**reads, **tied}.items():
        source = sources.get(name.rpartition(".")[0])
        if source is None:
            raise UnsupportedError("it reads the stream, and not what a norm makes of it", where=name)
        linked[name] = dim, source
    return Basis(writes, linked, norms, tuple(tied))


def _sources(anatomy: Anatomy, norms: Mapping[str, Norm], readers: set[str]) -> dict[str, str]:
    """Path of a reading module → the norm whose output it is given, itself or as a view."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}

    def gives(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            tensor = first_tensor(out)
            if tensor is not None:
                made[tensor.untyped_storage().data_ptr()] = path, tensor

        return hook

    def takes(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and (near := made.get(leaf.untyped_storage().data_ptr())) is not None:
                    found[path] = near[0]

        return hook

    of = anatomy.model.get_submodule
    handles: list[Any] = [of(p).register_forward_hook(gives(p)) for p in norms]
    handles += [of(p).register_forward_pre_hook(takes(p), with_kwargs=True) for p in readers]
    try:
        with torch.no_grad(), evaluating(anatomy.model):
            call(anatomy.model, anatomy.sample)
    finally:
        for handle in handles:
            handle.remove()
    return found


def energies(lab: Lab, norms: Sequence[str]) -> Tensor:
    """Σ over norms and tokens of n nᵀ, n the stream in units of its own root mean square; float64 [width, width]."""
    total: list[Tensor] = []

    def note(x: Tensor, rows: Any) -> None:
        here = rows.on(x)
        tokens = here.strip(x).float()
        tokens = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True).clamp_min(SMALL))
        total.append((tokens.T @ tokens).double())
        total[:] = [sum(total[1:], total[0])]

    for rows in lab.rows():
        handles = [
            lab.model.get_submodule(p).register_forward_pre_hook(lambda m, args, rows=rows: note(args[0], rows))
            for p in norms
        ]
        try:
            with torch.no_grad():
                lab.forward(rows.batch, head=True)
        finally:
            for handle in handles:
                handle.remove()
        lab.progress("stream", rows.offset - lab.offset + rows.sequences, lab.sequences)
    return total[0]


def turn(model: nn.Module, held: Basis, q: Tensor) -> None:
    """Write the network in the basis of the columns of `q` [width, width]; gains become one; ties are cut."""
    named = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in held.untied:
            path, _, last = name.rpartition(".")
            own = nn.Parameter(named[name].detach().clone(), named[name].requires_grad)
            setattr(model.get_submodule(path), last, own)
            named[name] = own
        for name, (dim, path) in held.reads.items():
            gain = held.norms[path].gain(model.get_submodule(path)).to(q.device)
            _put(named[name], dim, lambda w, gain=gain: (w * gain) @ q)
        for name, dim in held.writes.items():
            _put(named[name], dim, lambda w: w @ q)
        for path, norm in held.norms.items():
            model.get_submodule(path).get_parameter(norm.weight).fill_(1 - norm.offset)


def scale_gains(model: nn.Module, held: Basis, factor: float) -> None:
    """Set all gains to a number."""
    with torch.no_grad():
        for path, norm in held.norms.items():
            model.get_submodule(path).get_parameter(norm.weight).fill_(factor - norm.offset)


def _put(parameter: Tensor, dim: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change a tensor, seen as rows of channels, in float64."""
    parameter.copy_(change(parameter.double().movedim(dim, -1)).movedim(-1, dim))


@dataclass
class Proof:
    """The output on the sample before, to be held against that of the turned network."""

    anatomy: Anatomy
    before: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.before = self._output()

    def _output(self) -> Tensor:
        from lamina.rewrites._narrow_config import first_output

        out = first_output(self.anatomy)
        assert out is not None
        return out

    def off(self) -> float:
        """How far the output is off, of its size."""
        return float((self._output().double() - self.before.double()).norm() / self.before.double().norm())

    def expect(self) -> None:
        """Raise UnsupportedError where the network computes something else."""
        off = self.off()
        if off > NEAR.get(self.before.dtype, 5e-2):
            raise UnsupportedError(f"turned, its output is off by {off:.1e}", where=self.anatomy.stacks[0].path)


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Inside, weights may change in place; if an error leaves, they are what they were."""
    held = [(p, p.detach().clone()) for p in model.parameters()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in held:
                parameter.copy_(value)
        raise
