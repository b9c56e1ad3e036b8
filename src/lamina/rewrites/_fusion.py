"""Fuse a block into its neighbours: element-wise weights of its maps are learnt on what the group gave with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lamina.anatomy.linears import is_linear
from lamina.core.errors import InputError
from lamina.lab.gradients import frozen
from lamina.lab.lab import real
from lamina.lab.walk import Walk

if TYPE_CHECKING:
    from lamina.lab import Lab

BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the weights of fused maps are learnt: see `lamina.papers.depth.fusegpt`."""

    rank: int
    form: str
    epochs: int
    rate: float
    coefficient_rate: float
    loss: str


class Fused:
    """A parameter W + B A + C ∘ V, of which A, B and C are learnt: V is the fused block's, C and B A begin as 0.

    `form` of C: "low-rank" is E F with factors of rank `rank`, "full" a matrix, "rows" a number for each output. A bias
    (one dimension) gets no B A, and a C with a number for each output. `turned`: stored [inputs, outputs].
    """

    def __init__(
        self, weight: Tensor, other: Tensor, how: Training, generator: torch.Generator, *, turned: bool = False
    ) -> None:
        self.dtype, self.turned = weight.dtype, turned
        self.weight, self.other = self._turn(weight.detach().float()), self._turn(other.detach().float())
        self.base: list[Tensor] = []
        if weight.ndim == 1:
            self.coefficients = [torch.zeros_like(self.weight)]
        else:
            self.base = self._pair(how.rank, generator)
            columns = {"full": self.weight.shape[-1], "rows": 1}.get(how.form)
            self.coefficients = (
                self._pair(how.rank, generator)
                if columns is None
                else [self.weight.new_zeros(*self.weight.shape[:-1], columns)]
            )
        for tensor in (*self.base, *self.coefficients):
            tensor.requires_grad_()

    def _turn(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.turned else tensor

    def _pair(self, rank: int, generator: torch.Generator) -> list[Tensor]:
        """Factors of zero: none [outputs, rank], and numbers between ± 1/√inputs [rank, inputs]."""
        *stack, outputs, inputs = self.weight.shape
        drawn = (2 * torch.rand(*stack, rank, inputs, generator=generator) - 1) / inputs**0.5
        return [self.weight.new_zeros(*stack, outputs, rank), drawn.to(self.weight.device)]

    def made(self) -> Tensor:
        """The parameter [outputs, inputs], float32."""
        first, *rest = self.coefficients
        whole = self.weight + (first @ rest[0] if rest else first) * self.other
        return whole + self.base[0] @ self.base[1] if self.base else whole

    def stored(self) -> Tensor:
        """`made` as the module stores it."""
        return self._turn(self.made().to(self.dtype))


def pairs(block: nn.Module, other: nn.Module) -> Iterator[tuple[str, bool]]:
    """Parameters that two blocks both have, of maps and their biases: the name, and whether it is stored turned."""
    theirs = {name: p.shape for name, p in other.named_parameters()}
    for name, parameter in block.named_parameters():
        holder = block.get_submodule(name.rpartition(".")[0])
        if theirs.get(name) == parameter.shape and (parameter.ndim > 1 or is_linear(holder)):
            yield name, parameter.ndim == 2 and is_linear(holder) and not isinstance(holder, nn.Linear)


def around(place: int, depth: int, size: int) -> range:
    """The `size` neighbours of the block at a place, with it, of `depth` blocks: one more before it than behind."""
    start = max(0, min(place - size // 2, depth - size))
    return range(start, min(start + size, depth))


class Fusion(Walk):
    """A walk up to a group of blocks, one of which is fused into the others."""

    @torch.no_grad()
    def go_to(self, block: int) -> None:
        """On to the block of this number."""
        while self.at < block:
            self.step()

    def fuse(self, gone: int, group: Sequence[int], how: Training, generator: torch.Generator) -> list[float]:
        """Learn the group without block `gone`, then write its weights; the losses, step by step.

        Raises InputError where the loss is no number.
        """
        self.go_to(group[0])
        wanted = [self._through(group, n, {}).detach() for n in range(len(self.streams))]
        left = [n for n in group if n != gone]
        maps = {n: self._maps(n, gone, how, generator) for n in left}
        losses = self._train(left, maps, wanted, how)
        with torch.no_grad():
            for n, held in maps.items():
                for name, fused in held.items():
                    self._module(n).get_parameter(name).copy_(fused.stored())
        return losses

    def _maps(self, block: int, gone: int, how: Training, generator: torch.Generator) -> dict[str, Fused]:
        one, other = self._module(block), self._module(gone)
        return {
            name: Fused(one.get_parameter(name), other.get_parameter(name), how, generator, turned=turned)
            for name, turned in pairs(one, other)
        }

    def _train(
        self, left: Sequence[int], maps: Mapping[int, Mapping[str, Fused]], wanted: Sequence[Tensor], how: Training
    ) -> list[float]:
        every = [f for held in maps.values() for f in held.values()]
        groups = [[t for f in every for t in f.base], [t for f in every for t in f.coefficients]]
        rates = (how.rate, how.coefficient_rate)
        optimizer = torch.optim.Adam(({"params": g} for g in groups), lr=0.0, betas=BETAS, foreach=False)
        steps, losses = how.epochs * len(wanted), list[float]()
        for number in range(steps):
            place = number % len(wanted)
            with frozen(self.lab.model), torch.enable_grad():
                out = self._through(left, place, maps)
                keep = real(self.lab.batches[place]).to(out.device)
                loss = LOSSES[how.loss](wanted[place].float(), out.float(), keep)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise InputError("the loss is no number", where=self.stack.blocks[left[0]].site.id, hint="lower rates")
            free = [t for g in groups for t in g]
            for tensor, slope in zip(free, torch.autograd.grad(loss, free, allow_unused=True), strict=True):
                tensor.grad = slope
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * number / steps))
            optimizer.step()
            self.lab.progress("fusion", number + 1, steps)
        return losses

    def _module(self, block: int) -> nn.Module:
        return self.lab.model.get_submodule(self.stack.blocks[block].path)

    def _through(self, blocks: Sequence[int], place: int, maps: Mapping[int, Mapping[str, Fused]]) -> Tensor:
        """What some blocks make of a batch's stream [batch, tokens, width], with the weights that are learnt."""
        x = self.streams[place]
        for at in blocks:
            block, (args, kwargs) = self.stack.blocks[at], self._calls[place][at]
            if isinstance(block.stream, int):
                args = (*args[: block.stream], x, *args[block.stream + 1 :])
            else:
                kwargs = {**kwargs, block.stream: x}
            held = {name: f.stored() for name, f in maps.get(at, {}).items()}
            out = functional_call(self._module(at), held, args, dict(kwargs))
            while isinstance(out, tuple | list):
                out = next(o for o in out if o is not None)
            x = out
            self.lab.counts.blocks += int(real(self.lab.batches[place]).sum())
        return x


def over_features(dense: Tensor, out: Tensor, keep: Tensor) -> Tensor:
    """KL from the softmax over features of the dense stream to that of the other, mean over tokens."""
    p, q = dense[keep].log_softmax(-1), out[keep].log_softmax(-1)
    return functional.kl_div(q, p, reduction="sum", log_target=True) / len(q)


def over_sequences(dense: Tensor, out: Tensor, keep: Tensor) -> Tensor:
    """The same with softmaxes over the sequences of a batch, summed over tokens and features, over the sequences."""
    if len(dense) < 2 or not bool(keep.all()):
        what = "softmaxes over a batch need two sequences at least, of one length"
        raise InputError(what, where="loss: sequences", hint="loss: features")
    return functional.kl_div(out.log_softmax(0), dense.log_softmax(0), reduction="batchmean", log_target=True)


def squares(dense: Tensor, out: Tensor, keep: Tensor) -> Tensor:
    """Mean squared difference over tokens and features."""
    return (dense[keep] - out[keep]).square().mean()


LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "features": over_features,
    "sequences": over_sequences,
    "squares": squares,
}
"""(dense, thinned [batch, tokens, width], real [batch, tokens]) → what is minimised."""


def fuse(lab: Lab, sizes: Mapping[str, int], how: Training) -> None:
    """Fuse blocks in turn, each into what is left of its neighbours; `sizes`: block → how many a group is."""
    generator = torch.Generator().manual_seed(lab.seed)
    gone: list[str] = []
    for site, size in sizes.items():
        place = next(n for n, k in enumerate(lab.anatomy.stacks) if site in [b.site.id for b in k.blocks])
        blocks = [b.site.id for b in lab.anatomy.stacks[place].blocks]
        left = [n for n, b in enumerate(blocks) if b not in gone]
        group = [left[n] for n in around(left.index(blocks.index(site)), len(left), size)]
        Fusion(lab, gone, place).fuse(blocks.index(site), group, how, generator)
        gone.append(site)
