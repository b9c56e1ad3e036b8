"""Quality: perplexity, and the divergence from the dense model, on held-out text, with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamina.core.documents import Evidence
from lamina.core.errors import InputError
from lamina.core.registry import evaluator
from lamina.maths.bootstrap import ratio_interval

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.lab import Lab

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tallied:
    """Per sequence, float64 [sequences]: predicted tokens, sums in nats of the losses and of KL(dense‖thinned)."""

    tokens: Array
    thinned: Array
    dense: Array | None = None
    kl: Array | None = None

    @property
    def loss(self) -> float:
        """Mean loss of the thinned model, nats per token."""
        return float(self.thinned.sum() / self.tokens.sum())


@evaluator("quality", status="stable")
@dataclass(frozen=True, kw_only=True)
class Quality:
    """Held-out loss, perplexity and KL to the dense model; intervals by paired bootstrap over sequences."""

    seed: int = 0
    resamples: int = 2000

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f"an interval takes at least 100 resamples, not {self.resamples}")

    def evaluate(self, lab: Lab, /, *, reference: nn.Module | None) -> tuple[Evidence, ...]:
        """Evidence `loss`, `perplexity` and `kl` of the lab's model (thinned) against `reference` (dense), on its text.

        Both models read every batch in turn. Without a reference only the thinned model's own numbers.
        """
        return self.evidence(tally(lab, reference))

    def evidence(self, found: Tallied) -> tuple[Evidence, ...]:
        """The evidence of what was tallied."""
        rows = [*self._own("thinned", found.thinned, found.tokens)]
        if found.dense is None or found.kl is None:
            return tuple(rows)
        rows = [*self._own("dense", found.dense, found.tokens), *rows]
        rise, *bounds = self._mean(found.thinned - found.dense, found.tokens)
        kl = self._mean(found.kl, found.tokens)
        rows.append(self._row("loss", "difference", "nats/token", (rise, *bounds), found, "thinned − dense, paired"))
        times = (math.exp(rise), *(None if b is None else math.exp(b) for b in bounds))
        rows.append(self._row("perplexity", "ratio", "", times, found, "exp of the loss difference"))
        rows.append(self._row("kl", "thinned", "nats/token", kl, found, "KL(dense‖thinned)"))
        return tuple(rows)

    def _own(self, of: str, sums: Array, tokens: Array) -> tuple[Evidence, Evidence]:
        mean = self._mean(sums, tokens)
        found = Tallied(tokens, sums)
        return (
            self._row("loss", of, "nats/token", mean, found, ""),
            self._row("perplexity", of, "", tuple(None if v is None else math.exp(v) for v in mean), found, ""),
        )

    def _mean(self, sums: Array, tokens: Array) -> tuple[float, float | None, float | None]:
        low, high = ratio_interval(sums, tokens, seed=self.seed, resamples=self.resamples) or (None, None)
        return float(sums.sum() / tokens.sum()), low, high

    def _row(self, name: str, of: Any, unit: str, values: tuple[Any, ...], found: Tallied, what: str) -> Evidence:
        how = f"{int(found.tokens.sum())} tokens; BCa bootstrap over sequences, {self.resamples} resamples"
        value, low, high = values
        return Evidence(
            name=name, value=value, low=low, high=high, unit=unit, of=of, n=len(found.tokens), seed=self.seed,
            how=f"{what}; {how}" if what else how,
        )  # fmt: skip


def tally(lab: Lab, reference: nn.Module | None = None) -> Tallied:
    """Per-sequence sums of the lab's model, and of a dense reference with the same vocabulary, on the lab's text."""

    def pairs() -> Iterable[tuple[Any, Tensor, Tensor | None]]:
        done = 0
        for batch in lab.batches:
            yield batch, lab.forward(batch), None if reference is None else _logits(reference, batch)
            done += len(batch["input_ids"])
            lab.progress("quality", done, lab.sequences)

    return _collect(pairs())


def score(model: nn.Module, tokens: Tensor, *, reference: nn.Module | None = None, batch_size: int = 4) -> Tallied:
    """The same for token ids [sequences, tokens] and any causal model, without a lab."""
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise InputError(f"a text is token ids [sequences, tokens], not {list(tokens.shape)}")
    batches = ({"input_ids": t} for t in tokens.split(batch_size))
    return _collect((b, _logits(model, b), None if reference is None else _logits(reference, b)) for b in batches)


def _collect(pairs: Iterable[tuple[Any, Tensor, Tensor | None]]) -> Tallied:
    import torch

    from lamina.lab.lab import sequence_losses

    rows: list[list[Tensor]] = [[], [], [], []]
    with torch.no_grad():
        for batch, thinned, dense in pairs:
            sums, counts = sequence_losses(thinned, batch)
            rows[0].append(counts)
            rows[1].append(sums)
            if dense is not None:
                if dense.shape != thinned.shape:
                    shapes = f"{list(dense.shape)} against {list(thinned.shape)}"
                    raise InputError(f"dense and thinned model give different logits, {shapes}")
                rows[2].append(sequence_losses(dense, batch)[0])
                rows[3].append(_divergence(dense.to(thinned.device), thinned, batch))
    found = [torch.cat(r).cpu().numpy().astype(np.float64) if r else None for r in rows]
    tokens, own = found[0], found[1]
    if tokens is None or own is None or not tokens.sum():
        raise InputError("the text has no token to predict")
    return Tallied(tokens, own, found[2], found[3])


def _divergence(dense: Tensor, thinned: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Sums of KL(dense‖thinned) over the predicting positions, float64 [batch]; one sequence at a time."""
    import torch

    from lamina.lab.lab import real
    from lamina.maths.divergence import KLFrom

    mask = real(batch).to(thinned.device)
    valid = mask[:, 1:] & mask[:, :-1]
    return torch.stack(
        [(KLFrom(p[:-1])(q[:-1]).double() * v).sum() for p, q, v in zip(dense, thinned, valid, strict=True)]
    )


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    import torch

    device = next(model.parameters()).device
    extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    with torch.no_grad():
        out = model(**{k: v.to(device) for k, v in batch.items()}, **extra)
    found = getattr(out, "logits", None)
    return found if found is not None else out[0] if isinstance(out, tuple) else out
