"""Tallies on disk: their plain data as JSON, their arrays in one safetensors file. No pickles.

What a tally holds beyond data (functions, the model) comes from a fresh one of the same measure.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.core.errors import LaminaError
from lamina.core.files import atomic, read_data, to_json

SIMPLE = (str, int, float, bool, type(None))


def frozen(tally: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tally's data as a tree of plain values, and its arrays by the names that the tree gives them.

    Attributes that hold functions, modules or the like are left out.
    """
    arrays: dict[str, Tensor] = {}
    state = {k: _told(v, arrays, k) for k, v in vars(tally).items() if _is_data(v)}
    return state, arrays


def thawed(fresh: Any, state: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Any:
    """A fresh tally of the same measure with this state."""
    for name, told in state.items():
        setattr(fresh, name, _meant(told, arrays))
    return fresh


def save_tally(tally: Any, path: Path) -> None:
    """Write a tally into the folder `path`, atomically."""
    from safetensors.torch import save_file

    state, arrays = frozen(tally)
    with atomic(path) as draft:
        draft.mkdir()
        (draft / "state.json").write_text(to_json(state), encoding="utf-8")
        save_file({k: v.contiguous().clone() for k, v in arrays.items()}, draft / "arrays.safetensors")


def load_tally(fresh: Any, path: Path) -> Any:
    """The tally that was written to the folder `path`."""
    from safetensors.torch import load_file

    return thawed(fresh, read_data(path / "state.json"), load_file(path / "arrays.safetensors"))


def _is_data(value: Any) -> bool:
    if isinstance(value, (*SIMPLE, np.generic, np.ndarray, Tensor)):
        return True
    if isinstance(value, Mapping):
        return all(_is_data(k) and _is_data(v) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_data(v) for v in value)
    if dataclasses.is_dataclass(value) or hasattr(value, "merge"):
        return all(_is_data(v) for v in vars(value).values())
    return False


def _told(value: Any, arrays: dict[str, Tensor], name: str) -> Any:
    """A value in plain data: containers and classes are lists that begin with what they are."""
    if isinstance(value, float) and not np.isfinite(value):
        return ["number", repr(value)]
    if isinstance(value, bool | type(None)) or type(value) in (str, int, float):
        return value
    if isinstance(value, Tensor | np.ndarray | np.generic):
        array = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(_storable(np.asarray(value)))
        arrays[name] = array
        return ["tensor" if isinstance(value, Tensor) else "array", name, str(getattr(value, "dtype", ""))]
    if isinstance(value, str):  # an enumeration's member
        return ["member", type(value).__module__, type(value).__qualname__, str(value.value)]  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        pairs = enumerate(value.items())
        return ["dict", *([_told(k, arrays, f"{name}.{i}k"), _told(v, arrays, f"{name}.{i}")] for i, (k, v) in pairs)]
    if isinstance(value, list | tuple | set | frozenset):
        kind = next(t.__name__ for t in (list, tuple, set, frozenset) if isinstance(value, t))
        ordered = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [kind, *(_told(v, arrays, f"{name}.{i}") for i, v in enumerate(ordered))]
    told = {k: _told(v, arrays, f"{name}.{k}") for k, v in vars(value).items()}
    return ["object", type(value).__module__, type(value).__qualname__, told]


def _storable(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.int64).reshape(array.shape) if array.dtype == np.uint64 else array.copy()


def _meant(told: Any, arrays: Mapping[str, Tensor]) -> Any:
    if not isinstance(told, list):
        return told
    kind, *rest = told
    if kind == "number":
        return float(rest[0])
    if kind == "tensor":
        return arrays[rest[0]].clone()
    if kind == "array":
        found = arrays[rest[0]].numpy().copy()
        return found.view(np.uint64) if rest[1] == "uint64" else found
    if kind == "dict":
        return {_meant(k, arrays): _meant(v, arrays) for k, v in rest}
    containers: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if kind in containers:
        return containers[kind](_meant(v, arrays) for v in rest)
    cls = _class(rest[0], rest[1])
    if kind == "member":
        return cls(rest[2])
    found = cls.__new__(cls)
    for name, value in rest[2].items():
        object.__setattr__(found, name, _meant(value, arrays))
    return found


def _class(module: str, name: str) -> Any:
    """A class by its name, of lamina or of a module that is loaded already: a file makes nothing new run."""
    import sys

    if not module.startswith("lamina.") and module not in sys.modules:
        raise LaminaError(f"a tally on disk names {module}.{name}, which is not loaded", hint="survey again")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
