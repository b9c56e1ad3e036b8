"""Inputs of one forward, derived from a model's signature and config."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

BATCH = 2
TOKENS = 7
GRID = 4
"""Patches along each side of a picture."""


def sample(model: nn.Module, given: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Keyword inputs of one forward, batch first; `given` replaces or adds some, None takes one away."""
    return _Sampler(model, given, torch.Generator().manual_seed(seed)).inputs


class _Sampler:
    """The inputs of one model; a maker for each name that many forwards share, then what the data gives."""

    def __init__(self, model: nn.Module, given: Mapping[str, Any], generator: torch.Generator) -> None:
        self.model, self.config, self.generator = model, getattr(model, "config", None), generator
        self.given = {k: v for k, v in given.items() if not k.startswith("_")}
        self.options = {k: v for k, v in given.items() if k.startswith("_")}
        self.takes = inspect.signature(model.forward).parameters
        self.inputs: dict[str, Tensor] = {}
        for name, make in MAKERS.items():
            if name in self.takes and name not in self.given:
                value = make(self)
                if value is not None:
                    self.inputs[name] = value
        for name, value in self.given.items():
            if value is not None:
                self.inputs[name] = made(value, self.generator)
        self._place()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def needed(self, name: str) -> bool:
        """Whether the forward can't do without the argument."""
        return self.takes[name].default is inspect.Parameter.empty

    def find(self, name: str, kind: type | tuple[type, ...] = int) -> Any:
        """A config field's value, of the towers before the whole, None where no config has it."""
        for config in sorted(_configs(self.config), key=lambda c: c is self.config):
            read = getattr(config, "_getattr_without_heterogeneous_validation", None)
            value = read(name, None) if read is not None else getattr(config, name, None)
            if isinstance(value, kind) and not isinstance(value, bool):
                return value
        return None

    def words(self, *shape: int) -> Tensor:
        """Token ids without the special ones."""
        special = {v for c in _configs(self.config) for v in _ids(c)}
        table = None
        with suppress(NotImplementedError, AttributeError):
            table = cast(Any, self.model).get_input_embeddings()
        known = table.num_embeddings if isinstance(table, nn.Embedding) else 79
        words = torch.tensor([i for i in range(3, min(known, 79)) if i not in special])
        return words[torch.randint(len(words), shape, generator=self.generator)]

    def _place(self) -> None:
        """Put the marks of pictures and sounds into the text, as many as their towers return rows."""
        ids = self.inputs.get("input_ids")
        if ids is None or "input_ids" in self.given:
            return
        types = torch.zeros_like(ids)
        for kind, number in (("image", 1), ("video", 2), ("audio", 3)):
            fields = [self.options.get(f"_{kind}_mark"), f"{kind}_token_id", f"{kind}_token_index"]
            mark: int = next((v for f in fields if f and (v := self.find(f))), 0)
            rows = self._rows(kind) if mark else 0
            if rows:
                ids = torch.cat([ids[:, :2], torch.full((len(ids), rows), mark), ids[:, 2:]], 1)
                types = torch.cat([types[:, :2], torch.full((len(ids), rows), number), types[:, 2:]], 1)
        self.inputs["input_ids"] = ids
        if types.any():
            for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
                if name in self.takes and name not in self.given:
                    self.inputs[name] = types if "mm" in name else types.clamp_max(1)

    def _rows(self, kind: str) -> int:
        """Rows that a tower hands to each text, 0 where it gets no input."""
        if (rows := self.options.get(f"_{kind}_tokens")) is not None:
            return rows
        name = f"get_{kind}_features"
        found = [f for m in self.model.modules() if (f := getattr(m, name, None)) is not None]
        features = next((f for f in found if "args" not in inspect.signature(f).parameters), None)
        if features is None:
            return 0
        takes = inspect.signature(features).parameters
        chosen = {k: v for k, v in self.inputs.items() if k in takes and k != "input_ids"}
        if not any(k.startswith(("pixel", "input_", "audio")) for k in chosen):
            return 0
        with torch.no_grad():
            return _count(features(**chosen)) // BATCH


def _count(out: Any) -> int:
    """Rows in what a tower returns: a tensor [.., d], a list of them, or an output that has them."""
    if hasattr(out, "pooler_output"):
        out = out.pooler_output
    if isinstance(out, Tensor):
        return out.numel() // out.shape[-1]
    if isinstance(out, (list, tuple)):
        if isinstance(out[0], (list, tuple)):
            return _count(out[0])
        return sum(_count(t) for t in out)
    raise TypeError(f"a tower returned {type(out).__name__}")


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(type(config), "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _configs(inner)


def _ids(config: Any) -> Iterator[int]:
    for name, value in config.__dict__.items():
        if re.fullmatch(r".*(token_id|token_index|_idx)", name):
            yield from value if isinstance(value, (list, tuple)) else [value]


def made(value: Any, generator: torch.Generator) -> Any:
    """A tensor from data.

    A number or a list as it is; {shape: …} normal numbers; {shape: …, below: n} integers, as floats with float: true;
    {shape: …, full: x}; {places: [height, width]} the x and y of every patch; {as: x} no tensor but x itself.
    """
    if not isinstance(value, Mapping):
        return torch.tensor(value)
    if "as" in value:
        return value["as"]
    if "places" in value:
        height, width = value["places"]
        places = [[x, y] for y in range(height) for x in range(width)]
        return torch.tensor([places] * value.get("batch", BATCH))
    shape = value["shape"]
    if "full" in value:
        return torch.full(shape, value["full"])
    if "below" in value:
        whole = torch.randint(value.get("from", 0), value["below"], shape, generator=generator)
        return whole.float() if value.get("float") else whole
    return torch.randn(shape, generator=generator)


def _text(s: _Sampler) -> Tensor:
    return s.words(BATCH, TOKENS)


def _target(s: _Sampler) -> Tensor | None:
    both = getattr(s.config, "is_encoder_decoder", False) or s.needed("decoder_input_ids")
    return s.words(BATCH, TOKENS - 1) if both else None


def _flat(s: _Sampler) -> tuple[int, int] | None:
    """Patches of one picture and numbers in a patch, where pictures come as a list of patches."""
    if not {"grid_thw", "image_grid_thw", "grid_thws"} & set(s.takes):
        return None
    patch, frames = s.find("patch_size"), s.find("temporal_patch_size") or 1
    channels = s.find("in_channels") or s.find("num_channels") or 3
    return GRID * GRID, channels * frames * patch * patch


def _picture(s: _Sampler) -> Tensor:
    if flat := _flat(s):
        return s.normal(BATCH * flat[0], flat[1])
    size = s.find("image_size", (int, list, tuple)) or 64
    height, width = (size, size) if isinstance(size, int) else (*size, *size)[:2]
    return s.normal(BATCH, s.find("num_channels") or s.find("in_channels") or 3, height, width)


def _video(s: _Sampler) -> Tensor | None:
    if not s.needed("pixel_values_videos"):
        return None
    return s.normal(BATCH, s.find("num_frames") or 4, 3, *_picture(s).shape[-2:])


def _patches(s: _Sampler) -> Tensor | None:
    if not s.needed("hidden_states") or not _flat(s):
        return None
    return _picture(s)


def _grid(s: _Sampler) -> Tensor:
    return torch.tensor([[1, GRID, GRID]] * BATCH)


def _wave(s: _Sampler) -> Tensor:
    return s.normal(BATCH, 2000)


def _spectrum(s: _Sampler) -> Tensor:
    bands = s.find("num_mel_bins") or s.find("feature_size") or 80
    if frames := s.find("max_source_positions"):
        return s.normal(BATCH, bands, 2 * frames)
    return s.normal(BATCH, 32, bands)


def _heard(s: _Sampler) -> Tensor | None:
    features = s.inputs.get("input_features")
    if features is None:
        return None
    return torch.ones(BATCH, features.shape[2 if s.find("max_source_positions") else 1], dtype=torch.long)


def _boxes(s: _Sampler) -> Tensor:
    corners = torch.randint(0, 30, (BATCH, TOKENS, 2), generator=s.generator)
    return torch.cat([corners, corners + 1 + torch.randint(0, 30, (BATCH, TOKENS, 2), generator=s.generator)], -1)


MAKERS: dict[str, Callable[[_Sampler], Tensor | None]] = {
    "input_ids": _text,
    "decoder_input_ids": _target,
    "pixel_values": _picture,
    "pixel_values_videos": _video,
    "hidden_states": _patches,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "input_values": _wave,
    "input_features": _spectrum,
    "input_features_mask": _heard,
    "bbox": _boxes,
}
