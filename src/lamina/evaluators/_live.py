"""How much memory a run holds at one time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
