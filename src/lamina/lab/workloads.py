"""What time and memory are measured on: prefill and decoding as `generate` runs them, clocks."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.core.errors import InputError
from lamina.core.sites import Kind
from lamina.lab.lab import real

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.lab.lab import Lab


class Workloads:
    """Token ids from the lab's text, and the two workloads."""

    def __init__(self, lab: Lab, batch: int) -> None:
        parts = [b["input_ids"][real(b).to(b["input_ids"].device)] for b in lab.batches]
        self.text, self.batch, self.device = torch.cat(parts), batch, lab.device
        self.limit = getattr(getattr(lab.model, "config", None), "max_position_embeddings", None) or 1 << 30

    def ids(self, length: int) -> Tensor:
        """Token ids [batch, length]: the lab's text, begun anew where it ends. Raises InputError beyond the context."""
        if length > self.limit:
            raise InputError(f"{length} tokens are more than the model's {self.limit}", hint="measure a shorter length")
        need = self.batch * length
        return self.text.repeat(-(-need // len(self.text)))[:need].view(self.batch, length).to(self.device)

    @torch.no_grad()
    def prefill(self, model: nn.Module, ids: Tensor) -> Any:
        """One forward with a cache; logits of the last position alone where the model can (as `generate` asks)."""
        return model(input_ids=ids, **_asks(model, use_cache=True, logits_to_keep=1))

    def decode(self, model: nn.Module, ids: Tensor, steps: int) -> float | None:
        """Seconds for `steps` greedy tokens after the prompt `ids`, one by one; None for a model without a cache."""
        return self.answer(model, ids, steps)[1]

    @torch.no_grad()
    def answer(self, model: nn.Module, ids: Tensor, steps: int) -> tuple[float, float | None]:
        """Seconds of the prefill of the prompt `ids`, and of `steps` greedy tokens behind it, as `decode` has them."""
        begin = clock(self.device)
        out = self.prefill(model, ids)
        read = clock(self.device) - begin
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            return read, None
        token = out.logits[:, -1:].argmax(-1)
        start = clock(self.device)
        for _ in range(steps):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return read, clock(self.device) - start


def _asks(model: nn.Module, **wishes: Any) -> Mapping[str, Any]:
    known = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values()) and "use_cache" in known
    return {k: v for k, v in wishes.items() if k in known or (open_ended and k == "use_cache")}


def clock(device: torch.device) -> float:
    """Seconds, after everything that the device was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def timed(model: nn.Module, paths: Iterable[str], device: torch.device) -> Iterator[list[float]]:
    """Inside, the seconds of every call of these modules are noted."""
    spans: list[float] = []
    handles = []

    def watch(module: nn.Module) -> None:
        held: list[float] = []
        handles.append(module.register_forward_pre_hook(lambda *_: held.append(clock(device))))
        handles.append(module.register_forward_hook(lambda *_: spans.append(clock(device) - held.pop())))

    for path in paths:
        watch(model.get_submodule(path))
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def modules_of(anatomy: Anatomy, sites: Iterable[str]) -> tuple[str, ...]:
    """The modules that compute these sites: a wholly covered block, or a branch's core and its norms."""
    found: list[str] = []
    for site in anatomy.collapse(anatomy.expand(sites)):
        block = anatomy.block(site)
        anatomy.stack(site).expect_unlooped("no module computes a site alone")
        if anatomy.site(site).kind is Kind.BLOCK:
            found.append(block.path)
        else:
            branch = anatomy.branch(site)
            found += [f"{block.path}.{path}" for path in (branch.core, *branch.own)]
    return tuple(found)


def vocabulary_of(model: nn.Module) -> Mapping[str, str]:
    """`embedding` and `head` → their paths, as far as the model tells them and they are modules of their own."""
    asked = {"embedding": "get_input_embeddings", "head": "get_output_embeddings"}
    found = {name: ask() for name, way in asked.items() if (ask := getattr(model, way, None)) is not None}
    paths = {id(module): path for path, module in model.named_modules()}
    return {name: paths[id(module)] for name, module in found.items() if module is not None and id(module) in paths}


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds, views of one storage once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [cache]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            sizes[item.untyped_storage()._cdata] = item.untyped_storage().nbytes()
        elif id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, Mapping):
                waiting += item.values()
            elif isinstance(item, list | tuple):
                waiting += item
            elif hasattr(item, "__dict__") and not isinstance(item, type | nn.Module):
                waiting += vars(item).values()
    return sum(sizes.values())
