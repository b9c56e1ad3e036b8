"""What speed and memory are measured on: prefill and decoding as `generate` runs them, clocks, live tensors."""

from __future__ import annotations

import gc
import inspect
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamina.anatomy import Anatomy
from lamina.core.errors import InputError
from lamina.core.sites import Kind
from lamina.lab.lab import Lab, real


class Bench:
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

    @torch.no_grad()
    def decode(self, model: nn.Module, ids: Tensor, steps: int) -> float | None:
        """Seconds for `steps` greedy tokens after the prompt `ids`, one by one; None for a model without a cache."""
        out = self.prefill(model, ids)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            return None
        token = out.logits[:, -1:].argmax(-1)
        start = clock(self.device)
        for _ in range(steps):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return clock(self.device) - start


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


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that ops inside have made: `live` now, `peak` at most; older ones count as 0."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._enter((args, kwargs), counts=False)
        out = func(*args, **(kwargs or {}))
        self._enter(out, counts=True)
        return out

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for watch in self._known.values():
            watch.detach()

    def _enter(self, structure: Any, *, counts: bool) -> None:
        for tensor in tree_leaves(structure):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes() if counts else 0
                if key not in self._known:
                    self._known[key] = weakref.finalize(storage, self._leave, key, size)
                    self.live += size
                    self.peak = max(self.peak, self.live)

    def _leave(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that `run` holds at one time beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    with LiveTensors() as tracker:
        run()
    return tracker.peak
