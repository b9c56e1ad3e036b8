"""Default configs made tiny: every size by its name, every per-layer list cut to four layers that show each kind."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

DEPTH = 4
WORDS = 99
"""Ids of tokens that a tiny vocabulary has."""
SPECIAL = 79
"""Ids from here on are given to image, audio and other marks."""
_TOKEN = re.compile(r"(.*_)?(token_?(id|index|idx|ids|indices)|(pad|bos|eos|mask|unk)_(index|idx)|.*_id)")
_INDICES = re.compile(
    r"(.*_)?(indexes|indices|idxs|idx_list|only_layers|layer_ids|deepstack_\w+|cross_attention_layers|attn_layers)"
)


class Shrinker:
    """Shrinks one tree of configs; the marks of an image (…_token_id) get the same number all over the tree."""

    def __init__(self, rules: Sequence[tuple[str, Any]], known: Mapping[str, Mapping[str, Any]]) -> None:
        self.rules = [(re.compile(pattern), value) for pattern, value in rules]
        self.known = known
        """Changes for a model type, wherever its config stands in the tree."""
        self.marks: dict[str, int] = {}

    def shrink(self, config: Any, changes: Mapping[str, Any] | None = None) -> Any:
        """A tiny config of the same class; `changes` are fields set in the end, nested for configs inside."""
        changes = copy.deepcopy(_merged(self.known.get(config.model_type) or {}, changes or {}))
        layers = self._lists(config)
        values = {**_customised(config), **layers}
        for name in _fields(type(config)):
            value = _read(config, name)
            if _is_config(value) or (isinstance(changes.get(name), Mapping) and value is None and _sub(config, name)):
                values[name] = self._inner(config, name, value, changes.pop(name, None))
            elif isinstance(value, (list, tuple)) and value and all(map(_is_config, value)):
                values[name] = type(value)(self.shrink(v) for v in value)
            elif name not in layers:
                small = self.size(name, value)
                if not _same(small, value):
                    values[name] = small
        _picture(config, values)
        _heads(config, values)
        _stages(config, values)
        return type(config)(**{**values, **changes})

    def _inner(self, config: Any, name: str, value: Any, change: Any) -> Any:
        """A config inside: shrunk, or of another model type if the change names one."""
        change = dict(change or {})
        kind = change.pop("model_type", None)
        if kind is not None or value is None:
            value = (_mapped(kind) if kind else type(_sub(config, name)))()
        return self.shrink(value, change)

    def size(self, name: str, value: Any) -> Any:
        """The field's value made small by the first rule that its name matches; other values as they are."""
        if _TOKEN.fullmatch(name):
            return self._mark(name, value)
        if value is None or isinstance(value, (bool, float, str)):
            return value
        for pattern, limit in self.rules:
            if pattern.fullmatch(name):
                return _fit(limit, value)
        return value

    def _mark(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._mark(f"{name}{i}", v) for i, v in enumerate(value))
        if not isinstance(value, int) or isinstance(value, bool) or value < SPECIAL:
            return value
        stem = re.sub(r"_?(token)?_?(id|index|idx|ids|indices)(\d*)$", r"\3", name)
        usual = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 0}.get(stem)
        if usual is not None:
            return usual
        return self.marks.setdefault(stem, max(SPECIAL, WORDS - 1 - len(self.marks)))

    def _lists(self, config: Any) -> dict[str, Any]:
        """Per-layer lists and lists of layers' indices, cut to the layers that are kept."""
        depth = _read(config, "num_hidden_layers")
        if not isinstance(depth, int) or depth <= DEPTH:
            return {}
        named = {n: v for n in _fields(type(config)) if isinstance(v := _read(config, n), (list, tuple)) and v}
        long = {n: v for n, v in named.items() if len(v) == depth and n != "mrope_section"}
        indices = {n: v for n, v in named.items() if _INDICES.fullmatch(n) and n not in long and _below(v, depth)}
        kept = _representative(depth, [*long.values(), *([i in v for i in range(depth)] for v in indices.values())])
        cut = {n: type(v)(self.size(n, v[i]) for i in kept) for n, v in long.items()}
        return cut | {n: type(v)(j for j, i in enumerate(kept) if i in v) for n, v in indices.items()}


def _merged(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, nested; the second wins."""
    out = dict(one)
    for name, value in two.items():
        old = out.get(name)
        out[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def _representative(depth: int, lists: Sequence[Sequence[Any]]) -> list[int]:
    """Up to four layers, in order, that show as many kinds of layer as they can, each kind as often as the others."""
    kinds = [tuple(map(str, (v[i] for v in lists))) for i in range(depth)]
    turns = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
    return sorted(sorted(range(depth), key=lambda i: (turns[i], i))[:DEPTH])


def _below(values: Sequence[Any], depth: int) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < depth for v in values)


def _fit(limit: Any, value: Any) -> Any:
    """`value` no greater than `limit`, which is a number, {set: …}, or a name of a rule for lists."""
    if limit == "keep":
        return value
    if isinstance(limit, Mapping):
        return limit["set"]
    if isinstance(value, (list, tuple)):
        return type(value)(_ladder(limit, value))
    if not isinstance(value, int):
        return value
    limit = {"width": 32, "depth": DEPTH, "heads": 4}.get(limit, limit)
    return min(value, limit)


def _ladder(limit: Any, values: Sequence[Any]) -> list[Any]:
    """A list of sizes: widths of stages keep their ratios, depths keep two blocks (the deepest four)."""
    if not values or not all(isinstance(v, int) for v in values):
        return [_fit(limit, v) if isinstance(v, (list, tuple)) else v for v in values]
    if limit == "width":
        return [min(128, max(16, 16 * v // min(values) // 8 * 8)) for v in values]
    if limit == "axes":
        return {2: [4, 4], 3: [2, 2, 4], 4: [2, 2, 2, 2]}.get(len(values), list(values))
    if limit == "depth":
        deepest = values.index(max(values))
        return [min(v, DEPTH if i == deepest else 2) for i, v in enumerate(values)]
    return [min(v, 2 if limit == "heads" else limit) for v in values]


def _picture(config: Any, values: dict[str, Any]) -> None:
    """Images four patches wide; 64 pixels where there are no patches or small ones."""
    patch, size = _read(config, "patch_size"), _read(config, "image_size")
    if isinstance(patch, int) and patch > 4:
        values["patch_size"] = patch = 4
    elif isinstance(patch, (list, tuple)) and all(isinstance(p, int) and p > 4 for p in patch):
        values["patch_size"] = type(patch)(4 for _ in patch)
        patch = 4
    else:
        patch = None
    side = 16 if patch else 64
    if isinstance(size, int) and not isinstance(size, bool):
        values["image_size"] = min(size, side)
    elif isinstance(size, (list, tuple)) and size:
        values["image_size"] = type(size)(side for _ in size)


def _heads(config: Any, values: dict[str, Any]) -> None:
    """Latent attention has as many key heads as heads; a rotary embedding's sections fit the head's new size."""
    if isinstance(_read(config, "kv_lora_rank"), int) and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values.get("num_attention_heads", values["num_key_value_heads"])
    rope = _read(config, "rope_parameters")
    if not isinstance(rope, Mapping) or not (sections := rope.get("mrope_section")):
        return
    rope = copy.deepcopy(dict(rope))
    rope["mrope_section"] = {3: [2, 1, 1], 4: [1, 1, 1, 1]}.get(len(sections), sections)
    values["rope_parameters"] = rope
    part = rope.get("partial_rotary_factor") or 1.0
    if "head_dim" in _fields(type(config)):
        values["head_dim"] = int(8 / part)


def _stages(config: Any, values: dict[str, Any]) -> None:
    """Stages that a backbone hands out, where they are not its defaults."""
    values.pop("_out_features", None)
    values.pop("_out_indices", None)
    indices, depth = _read(config, "_out_indices"), _read(config, "num_hidden_layers")
    if indices and indices != _read(_fresh(type(config)), "_out_indices"):
        deep = isinstance(depth, int) and depth > DEPTH
        values["out_indices"] = list(range(DEPTH + 1 - len(indices), DEPTH + 1)) if deep else list(indices)


@cache
def _fields(kind: type) -> tuple[str, ...]:
    """Fields of a config class that are its own, not every config's."""
    from transformers import PreTrainedConfig

    common = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    return tuple(f.name for f in dataclasses.fields(kind) if f.name not in common)


@cache
def _fresh(kind: type) -> Any:
    """The class's default config, None where the defaults contradict each other."""
    try:
        return kind()
    except Exception:
        return None


def _customised(config: Any) -> dict[str, Any]:
    """What differs from the class's own defaults, deeply copied; configs inside are left out."""
    fresh = _fresh(type(config))
    mine = {n: _read(config, n) for n in _fields(type(config))}
    mine = {n: v for n, v in mine.items() if not _is_config(v) and not _same(v, _read(fresh, n))}
    return copy.deepcopy(mine)


def _same(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:
        return False


def _read(config: Any, name: str) -> Any:
    """The field's value (of a config with overrides per layer: the common one), None where there is none."""
    try:
        return config._getattr_without_heterogeneous_validation(name, None)
    except Exception:
        return None


def _is_config(value: Any) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)


def _sub(config: Any, name: str) -> Any:
    spec = type(config).sub_configs_defaults.get(name)
    return spec.default_config if spec is not None else None


def _mapped(kind: str) -> type:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind]
