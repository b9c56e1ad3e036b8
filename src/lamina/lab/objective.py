"""What a model is asked for, and how far an output is from the dense model's: told from the model, not chosen.

- "next-token": the model predicts tokens; the rise of the loss on the text, in nats.
- "agreement": the model gives other distributions (a classifier, a masked LM); KL from the dense one, in nats.
- "output": the model gives vectors; ‖y′ - y‖² / ‖y‖² at each position, of the dense output y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lamina.core.errors import UnsupportedError
from lamina.lab.rows import Batch, Rows, ids_of, real
from lamina.maths.divergence import KLFrom, nll


@dataclass(frozen=True)
class Objective:
    """The way outputs are compared; `unit` is that of a damage."""

    name: str

    @property
    def unit(self) -> str:
        """Of what `rise` gives."""
        return "" if self.name == "output" else "nats"

    def rise(self, dense: Tensor, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Damage per position, float64, and which positions count, both [batch, positions]."""
        if self.name == "next-token":
            found = token_losses(out, batch)[0] - token_losses(dense, batch)[0]
            return found, token_losses(dense, batch)[1]
        dense, out = _positions(dense), _positions(out)
        if self.name == "agreement":
            found = KLFrom(dense)(out).double()
        else:
            found = ((out.double() - dense.double()) ** 2).sum(-1) / (dense.double() ** 2).sum(-1).clamp_min(1e-30)
        mask = Rows(batch).on(dense).mask.to(out.device)
        return found * mask, mask


def _positions(out: Tensor) -> Tensor:
    """[batch, positions, features]: an output of one vector per sequence has one position."""
    return out.unsqueeze(1) if out.ndim == 2 else out.flatten(1, -2)


def token_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Next-token losses in nats, float64, zero where nothing is predicted, and where it is: both [batch, tokens - 1].

    Padding neither predicts nor counts.
    """
    ids = ids_of(batch)
    if ids is None:
        raise UnsupportedError("without token ids there is no next-token loss", where="loss")
    mask = real(batch).to(logits.device)
    valid = mask[:, 1:] & mask[:, :-1]
    return nll(logits[:, :-1], ids[:, 1:]).double() * valid, valid


def objective_of(model: nn.Module, out: Any) -> Objective:
    """What a model's forward gave, `out`, is taken for."""
    can = getattr(model, "can_generate", None)
    if _logits(out) is None:
        return Objective("output")
    return Objective("next-token" if not callable(can) or can() else "agreement")


def _logits(out: Any) -> Tensor | None:
    if isinstance(out, Tensor):
        return out
    found: Any = getattr(out, "logits", None)
    return found if isinstance(found, Tensor) else None


def output_of(out: Any, *, head: bool = True) -> Tensor:
    """The tensor of a forward's result: logits, else last hidden states; the latter where no head is asked for."""
    names = ("logits", "last_hidden_state") if head else ("last_hidden_state",)
    found = next((t for n in names if isinstance(t := getattr(out, n, None), Tensor)), None)
    if found is not None:
        return found
    if isinstance(out, Tensor):
        return out
    values: Any = out.values() if hasattr(out, "values") else out
    return next(t for t in values if isinstance(t, Tensor))
