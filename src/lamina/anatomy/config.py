"""Config surgery: what a config says of each layer, found by length and value, and rewritten on a copy.

A config speaks of depth in three ways: a number (`num_hidden_layers`, `encoder_layers`, one entry of `depths`), lists
with one entry per layer (`layer_types`), and lists of layer indices (`mlp_only_layers`) or mappings from them. The
second are found by value, the third by value and suffix. Which number counts which stack is found by value and by
name, and proved by building: see `lamina.anatomy.counting`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lamina.core.errors import UnsupportedError

INDEX_SUFFIXES = ("_layers", "_layer_ids", "_idxs", "_indices", "_index", "_indexes")
RANK_SUFFIXES = ("_idx", "_index", "_id", "_number", "_num")
PERIODIC = ("_pattern", "_interval", "every_", "_every", "_period", "_freq")
COUNTING = re.compile(r"layer|depth|block", re.IGNORECASE)
STANDARD = "num_hidden_layers"
Edits = dict[str, list[Any]]
"""Field → [before, after]."""
Count = tuple[str, int | None]
"""The field that counts layers, and its place where the field is a list with one count per stage.

'' where nothing but the length of per-layer lists says how many there are.
"""


def config_of(module: Any) -> Any:
    """The module's config, if it is one of transformers' kind; None for others' (a plain mapping of arguments)."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "to_dict") else None


def owner_of(model: nn.Module, stack_path: str, depth: int) -> str | None:
    """The path of the nearest module above the stack whose config, or one inside it, counts `depth` layers."""
    parts = stack_path.split(".") if stack_path else []
    for cut in range(len(parts), -1, -1):
        path = ".".join(parts[:cut])
        config = config_of(model.get_submodule(path))
        if config is not None and any(counts(inner, depth) for _, inner in tree(config)):
            return path
    return None


def fields(config: Any) -> dict[str, Any]:
    """The config's own fields: what it would write, without nested configs."""
    return {k: v for k, v in config.to_dict().items() if not isinstance(v, dict) or _by_layer(v)}


def tree(config: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The config and those inside it at any depth, each once, with the attribute path that leads there."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), config)]
    seen = {id(config)}
    while todo:
        path, here = todo.pop(0)
        yield path, here
        held = getattr(here, "__dict__", {})
        for name in dict.fromkeys((*(getattr(here, "sub_configs", None) or ()), *held)):
            inner = held.get(name) if name in held else getattr(here, name, None)
            if hasattr(inner, "to_dict") and hasattr(inner, "model_type") and id(inner) not in seen:
                seen.add(id(inner))
                todo.append(((*path, name), inner))


def counts(config: Any, depth: int) -> list[Count]:
    """The fields that may count `depth` layers, the standard one first; last of all its lists of that length."""
    standard = (getattr(config, "attribute_map", {}) or {}).get(STANDARD, STANDARD)
    found: list[Count] = []
    for key, value in fields(config).items():
        if key != standard and not COUNTING.search(key):
            continue
        if _whole(value) and value == depth:
            found.append((key, None))
        elif isinstance(value, list | tuple) and all(map(_whole, value)):
            found += [(key, place) for place, v in enumerate(value) if v == depth]
    listed = any(
        isinstance(v, list | tuple) and len(v) == depth > 1 for k, v in fields(config).items() if COUNTING.search(k)
    )
    return sorted(found, key=lambda c: (c[0] != standard, c[1] is not None)) + ([("", None)] if listed else [])


def edits(config: Any, depth: int, kept: Sequence[int], count: Count | None = None, first: int = 0) -> Edits:
    """What must change when only the layers `kept` remain of `depth`; the config itself is left alone.

    `count` is the field that counts them, `first` the number of the first layer in lists of layers.
    """
    found: Edits = {}
    data = fields(config)
    key, place = count or ((getattr(config, "attribute_map", {}) or {}).get(STANDARD, STANDARD), None)
    if place is not None:
        value = list(data[key])
        return {key: [value, [*value[:place], len(kept), *value[place + 1 :]]]}
    if key:
        found[key] = [depth, len(kept)]
        found |= _multiple(data, key, depth, len(kept)) | _stages(data, depth, kept)
    for key, value in data.items():
        if isinstance(value, list | tuple) and len(value) == depth and depth > 1:
            found[key] = [list(value), [value[i] for i in kept]]
        elif _indexes(key, value, depth, first):
            found[key] = [list(value), [new + first for new, old in enumerate(kept) if old + first in value]]
        elif isinstance(value, Mapping) and _by_layer(value):
            held = {int(k): v for k, v in value.items()}
            found[key] = [dict(value), {str(new): held[old] for new, old in enumerate(kept) if old in held}]
    return found


def spelt_out(config: Any, depth: int, kept: Sequence[int]) -> Edits:
    """Lists of words that are repeated over the layers (`block_types`), with one entry for each that remains."""
    found: Edits = {}
    for key, value in fields(config).items():
        words = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        if words and 1 < len(value) < depth and COUNTING.search(key):
            found[key] = [list(value), [value[i % len(value)] for i in kept]]
    return found


def _multiple(data: Mapping[str, Any], key: str, depth: int, left: int) -> Edits:
    """The standard count where it is a multiple of the one that counts (two attentions in a layer)."""
    value: Any = data.get(STANDARD)
    if key == STANDARD or not _whole(value) or value == depth or value % depth:
        return {}
    return {STANDARD: [value, value // depth * left]}


def _stages(data: Mapping[str, Any], depth: int, kept: Sequence[int]) -> Edits:
    """Names of a backbone's stages, one for each layer and one before, and the numbers of those it gives out."""
    names, given = data.get("stage_names"), data.get("out_indices")
    if not isinstance(names, list | tuple) or len(names) != depth + 1:
        return {}
    found: Edits = {"stage_names": [list(names), list(names[: len(kept) + 1])]}
    if given is not None:
        places = [p % len(names) for p in given]
        after = [sum(k < p for k in kept) for p in places]
        if len(set(after)) < len(places):
            hint = "keep a layer between those"
            raise UnsupportedError(f"two of the outputs {list(given)} would be one", where="out_indices", hint=hint)
        found["out_indices"] = [places, after]
    return found


def told_apart(config: Any, depth: int, one: int, other: int) -> bool:
    """Whether the config, or one inside it, has a list of `depth` entries that says other things of two layers."""
    if config is None or one == other:
        return False
    values = [v for _, c in tree(config) for v in fields(c).values() if isinstance(v, list | tuple) and len(v) == depth]
    return any(str(v[one]) != str(v[other]) for v in values)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _by_layer(value: Any) -> bool:
    """Whether the value maps layers' numbers to what is set for them."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(str(k).isdigit() and isinstance(v, Mapping) for k, v in value.items())
    )


def repeated(config: Any, depth: int) -> tuple[str, int] | None:
    """A field that is a period over the layers (`layer_pattern = 4`), where no list says what each layer is."""
    data = fields(config)
    if any(isinstance(v, list | tuple) and len(v) == depth for v in data.values()):
        return None
    periods = ((k, v) for k, v in data.items() if any(w in k for w in PERIODIC) and _whole(v) and v > 1)
    return next(periods, None)


def _indexes(key: str, value: Any, depth: int, first: int = 0) -> bool:
    return (
        isinstance(value, list | tuple)
        and key.endswith(INDEX_SUFFIXES)
        and len(value) < depth
        and all(_whole(v) and first <= v < depth + first for v in value)
        and len(set(value)) == len(value)
    )


def index_attributes(blocks: Sequence[nn.Module], places: Sequence[int] | None = None) -> tuple[str, ...]:
    """Attributes (path and name, relative to the block) that hold each block's number, or its rank among those that
    have it.

    `places` are the blocks' numbers, by default their order. Where a single block has the attribute, its name must say
    what it is: any attribute may happen to be 0.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for place, block in zip(places or range(len(blocks)), blocks, strict=True):
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if _whole(value) and not name.startswith("_"):
                    found.setdefault(f"{path}.{name}" if path else name, []).append((place, value))
    return tuple(
        key
        for key, pairs in found.items()
        if _numbers([p for p, _ in pairs], [v for _, v in pairs])
        and (len({v for _, v in pairs}) > 1 or key.endswith(RANK_SUFFIXES))
    )


def _numbers(places: list[int], values: list[int]) -> bool:
    return values in (places, list(range(len(values))))


def index_strides(blocks: Sequence[nn.Module], places: Sequence[int] | None = None) -> dict[str, tuple[int, int]]:
    """Attributes that count the parts of blocks: name → (a, b), where it is a · number + b with 0 ≤ b < a, a > 1.

    As of a block that holds two cache entries. Their names must say what they are.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for place, block in zip(places or range(len(blocks)), blocks, strict=True):
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if _whole(value) and name.endswith(RANK_SUFFIXES) and not name.startswith("_"):
                    found.setdefault(f"{path}.{name}" if path else name, []).append((place, value))
    strides: dict[str, tuple[int, int]] = {}
    for key, pairs in found.items():
        (first, start), (second, end) = (*pairs, *pairs)[:2]
        step = (end - start) // (second - first) if second > first else 0
        shift = start - step * first
        if step > 1 and 0 <= shift < step and all(value == step * place + shift for place, value in pairs):
            strides[key] = (step, shift)
    return strides


def config_path(model: nn.Module, config: Any) -> list[str]:
    """The attribute path from the model's config to `config`; empty where they are the same."""
    root = config_of(model)
    if config is None or root is None:
        return []
    for path, inner in tree(root):
        if inner is config:
            return list(path)
    raise UnsupportedError("the stack's config is not part of the model's config", where=type(root).__name__)
