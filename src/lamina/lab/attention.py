"""Attention weights, block by block from what a block's attention was given: no model is made to run its slow path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.lab.rows import Rows

ATTENTIONS = frozenset({Kind.ATTENTION, Kind.CROSS_ATTENTION})


@dataclass(eq=False)
class Attention:
    """One attention's inputs on one batch: queries [batch, heads, tokens, size], keys and values [batch, groups, …].

    `softmaxed` [batch, heads, tokens, keys] holds the weights instead where a model computes them itself.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    scale: float | None = None
    causal: bool = False
    softmaxed: Tensor | None = None
    rows: Rows | None = None
    crossed: bool = False

    @property
    def heads(self) -> int:
        """How many heads there are."""
        found = self.query if self.softmaxed is None else self.softmaxed
        assert found is not None
        return found.shape[1]

    def weights(self, sequence: int, queries: Tensor | None = None) -> Tensor:
        """One sequence's attention weights [heads, queries, keys], float32, padding gone; `queries` picks rows."""
        keep = self._kept(sequence)
        rows = keep if queries is None else keep[queries.to(keep.device)]
        if self.softmaxed is not None:
            found = self.softmaxed[sequence].float()[:, rows]
        else:
            found = self._computed(sequence, rows)
        return found if self.crossed else found[:, :, keep]

    def _kept(self, sequence: int) -> Tensor:
        length = (self.query if self.softmaxed is None else self.softmaxed).shape[2]  # type: ignore[union-attr]
        device = (self.query if self.softmaxed is None else self.softmaxed).device  # type: ignore[union-attr]
        if self.rows is None or self.rows.mask.shape[1] != length:
            return torch.arange(length, device=device)
        return self.rows.mask[sequence].nonzero().squeeze(1).to(device)

    def _computed(self, sequence: int, rows: Tensor) -> Tensor:
        assert self.query is not None
        assert self.key is not None
        query, key = self.query[sequence].float()[:, rows], self.key[sequence].float()
        key = key.repeat_interleave(len(query) // len(key), 0)
        scale = self.scale if self.scale is not None else query.shape[-1] ** -0.5
        logits = query @ key.transpose(-1, -2) * scale
        if self.causal:
            behind = torch.arange(key.shape[1], device=key.device) > rows.unsqueeze(1)
            logits = logits.masked_fill(behind, float("-inf"))
        if self.mask is not None:
            mask = self.mask[min(sequence, len(self.mask) - 1)] if self.mask.ndim == 4 else self.mask
            mask = mask.expand(*mask.shape[:-2], self.query.shape[2], mask.shape[-1])[..., rows, : key.shape[1]]
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()
        return torch.softmax(logits, -1)


class _Listener(TorchFunctionMode):
    """Notes the arguments of attention as they are called for, while a branch runs that is an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.site = ""
        self.heard: dict[str, Attention] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.site:
            return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self.heard[self.site] = _noted(*args, **kwargs)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        soft = func in (functional.softmax, torch.softmax, Tensor.softmax)
        if soft and isinstance(out, Tensor) and out.ndim == 4 and self.site not in self.heard:
            self.heard[self.site] = Attention(softmaxed=out)
        return out


def _noted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attention:
    return Attention(query, key, value, attn_mask, scale, is_causal)


@contextmanager
def attention_recorded(model: nn.Module, anatomy: Anatomy) -> Iterator[Callable[[str], Attention | None]]:
    """Inside, forwards are listened to; calling what is yielded with a site hands over what its attention was given.

    What is not asked for is let go when the site runs again.
    """
    listener = _Listener()
    handles = []
    branches = [(b, x) for k in anatomy.stacks for b in k.blocks for x in b.branches if x.site.kind in ATTENTIONS]
    for block, branch in branches:
        core = model.get_submodule(block.path).get_submodule(branch.core)

        def opens(*_: Any, site: str = branch.site.id) -> None:
            listener.heard.pop(site, None)
            listener.site = site

        def closes(*_: Any) -> None:
            listener.site = ""

        handles += [core.register_forward_pre_hook(opens), core.register_forward_hook(closes)]

    def take(site: str) -> Attention | None:
        return listener.heard.pop(site, None)

    try:
        with listener:
            yield take
    finally:
        for handle in handles:
            handle.remove()
