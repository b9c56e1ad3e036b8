"""Train what is left to each depth where blocks share their maps: norms and biases, towards the dense last streams."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lamina.anatomy.trace import first_tensor
from lamina.core.errors import InputError
from lamina.lab.gradients import frozen
from lamina.lab.lab import real
from lamina.lab.objective import token_losses

if TYPE_CHECKING:
    from lamina.lab import Lab


def tails(lab: Lab, batch: Mapping[str, Tensor], count: int) -> list[Tensor]:
    """The streams behind the last `count` blocks of the last stack, real tokens alone [tokens, width]."""
    found: list[Tensor] = []
    with torch.no_grad(), _noted(lab, count, found):
        lab.forward(batch, head=False)
    return [h[real(batch)] for h in found]


def distance(lab: Lab, batch: Mapping[str, Tensor], wanted: Sequence[Tensor], weight: float) -> Tensor:
    """Next-token loss of a batch in nats + weight · mean over tokens and last blocks of ‖h - y‖² / ‖y‖².

    `wanted` are the dense streams y behind these blocks, as `tails` gives them.
    """
    found: list[Tensor] = []
    with _noted(lab, len(wanted), found):
        losses, valid = token_losses(lab.forward(batch), batch)
    off = losses.new_zeros(())
    for h, y in zip(found, wanted, strict=True):
        apart = (h[real(batch)].float() - y.float()).square().sum(-1) / y.float().square().sum(-1).clamp_min(1e-12)
        off = off + apart.mean() / len(wanted)
    return losses.sum() / valid.sum().clamp_min(1) + weight * off


def adapt(
    lab: Lab, sites: Sequence[str], wanted: Sequence[Sequence[Tensor]], *, steps: int, rate: float, weight: float
) -> list[float]:
    """Train the vectors of some blocks, in float32, one batch after the other; the losses, step by step.

    Adam, with a rate that falls to 0 on a line. Raises InputError where the loss is no number.
    """
    modules = [lab.model.get_submodule(lab.anatomy.block(s).path) for s in sites]
    own = list({id(p): p for m in modules for p in m.parameters() if p.ndim == 1}.values())
    held, losses = [p.detach().float().clone() for p in own], list[float]()
    if not own:
        return losses
    optimizer = torch.optim.Adam(held, lr=rate, foreach=False)
    with frozen(lab.model, own):
        for number in range(steps):
            place = number % len(lab.batches)
            with torch.enable_grad():
                loss = distance(lab, lab.batches[place], wanted[place], weight)
                slopes = torch.autograd.grad(loss, own, allow_unused=True)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise InputError(f"the loss is no number at step {number + 1}", where=sites[0], hint="a lower rate")
            for x, slope in zip(held, slopes, strict=True):
                x.grad = torch.zeros_like(x) if slope is None else slope.float()
            optimizer.param_groups[0]["lr"] = rate * (1 - number / steps)
            optimizer.step()
            with torch.no_grad():
                for p, x in zip(own, held, strict=True):
                    p.copy_(x)
            lab.counts.backwards += int(real(lab.batches[place]).sum()) * lab.depth
            lab.progress("norms", number + 1, steps)
    return losses


@contextmanager
def _noted(lab: Lab, count: int, found: list[Tensor]) -> Iterator[None]:
    """Inside, the streams behind the last `count` blocks of the last stack are put into `found`, in depth order."""

    def note(_: object, __: object, out: object) -> None:
        stream = first_tensor(out)
        assert stream is not None
        found.append(stream)

    blocks = lab.anatomy.stacks[-1].blocks[-count:]
    handles = [lab.model.get_submodule(b.path).register_forward_hook(note) for b in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
