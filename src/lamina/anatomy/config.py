"""Config surgery: what a config says of each layer, found by length and value, and rewritten on a copy.

A config speaks of depth in three ways: a number (`num_hidden_layers`), lists with one entry per layer (`layer_types`),
and lists of layer indices (`mlp_only_layers`). The first two are found by value, the third by value and suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lamina.core.errors import UnsupportedError

INDEX_SUFFIXES = ("_layers", "_idxs", "_indices", "_index", "_indexes")
RANK_SUFFIXES = ("_idx", "_index", "_id", "_number", "_num")
PERIODIC = ("_pattern", "_interval", "every_", "_every", "_period", "_freq")
Edits = dict[str, list[Any]]
"""Field → [before, after]."""


def owner_of(model: nn.Module, stack_path: str, depth: int) -> str | None:
    """The path of the nearest module above the stack whose config counts `depth` layers."""
    parts = stack_path.split(".") if stack_path else []
    for cut in range(len(parts), -1, -1):
        path = ".".join(parts[:cut])
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None and getattr(config, "num_hidden_layers", None) == depth:
            return path
    return None


def fields(config: Any) -> dict[str, Any]:
    """The config's own fields: what it would write, without nested configs."""
    return {k: v for k, v in config.to_dict().items() if not isinstance(v, dict)}


def edits(config: Any, depth: int, kept: Sequence[int], where: str = "") -> Edits:
    """What must change when only the layers `kept` remain of `depth`; the config itself is left alone.

    Raises UnsupportedError where a periodic rule can't express the result.
    """
    found: Edits = {}
    data = fields(config)
    name = next((k for k in (getattr(config, "attribute_map", {}) or {}).items() if k[0] == "num_hidden_layers"), None)
    count = name[1] if name else "num_hidden_layers"
    found[count] = [depth, len(kept)]
    explicit = any(isinstance(v, list | tuple) and len(v) == depth for v in data.values())
    for key, value in data.items():
        if isinstance(value, list | tuple) and len(value) == depth and depth > 1:
            found[key] = [list(value), [value[i] for i in kept]]
        elif _indexes(key, value, depth):
            found[key] = [list(value), [new for new, old in enumerate(kept) if old in value]]
        elif not explicit and _repeats(key, value):
            raise UnsupportedError(
                f"config field {key} = {value} repeats over the layers", where=where, hint="drop sublayers instead"
            )
    return found


def _repeats(key: str, value: Any) -> bool:
    """Whether the field is a period over the layers (`layer_pattern = 4`)."""
    return any(w in key for w in PERIODIC) and isinstance(value, int) and not isinstance(value, bool) and value > 1


def _indexes(key: str, value: Any, depth: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and key.endswith(INDEX_SUFFIXES)
        and len(value) < depth
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < depth for v in value)
        and len(set(value)) == len(value)
    )


def index_attributes(blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Attributes (path and name, relative to the block) that hold each block's rank among those that have it.

    Where a single block has one, its name must say so: any attribute may happen to be 0.
    """
    found: dict[str, list[int]] = {}
    for block in blocks:
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_"):
                    found.setdefault(f"{path}.{name}" if path else name, []).append(value)
    return tuple(
        key
        for key, values in found.items()
        if values == list(range(len(values))) and (len(values) > 1 or key.endswith(RANK_SUFFIXES))
    )


def config_path(model: nn.Module, config: Any) -> list[str]:
    """The attribute path from the model's config to `config`; empty where they are the same."""
    root = getattr(model, "config", None)
    if config is None or root is config or root is None:
        return []
    for name in getattr(root, "sub_configs", {}) or {}:
        if getattr(root, name, None) is config:
            return [name]
    raise UnsupportedError("the stack's config is not part of the model's config", where=type(root).__name__)
