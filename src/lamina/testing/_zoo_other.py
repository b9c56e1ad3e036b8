"""Tiny models of timm and diffusers: their constructors' defaults made small, and what the data says on top."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from lamina.testing._zoo_shrink import Shrinker


def timm_model(name: str, entry: Mapping[str, Any]) -> nn.Module:
    """A timm model with its constructor's arguments from the data; `class` names a class instead of the registry."""
    args = entry.get("args") or {}
    if "class" in entry:
        module, _, kind = entry["class"].rpartition(".")
        return getattr(importlib.import_module(module), kind)(**args)
    return importlib.import_module("timm").create_model(name, pretrained=False, **args)


def timm_sample(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Two pictures of the size that the model is made for."""
    side = (entry.get("args") or {}).get("img_size", 64)
    return {"x": {"shape": [2, 3, side, side]}}


def diffusers_model(name: str, entry: Mapping[str, Any], shrinker: Shrinker) -> nn.Module:
    """A diffusers model: every size among its arguments' defaults made small."""
    kind = getattr(importlib.import_module("diffusers.models"), name)
    defaults = {p.name: p.default for p in inspect.signature(kind.__init__).parameters.values()}
    known = {n: v for n, v in defaults.items() if v is not inspect.Parameter.empty and v is not None}
    small = {n: s for n, v in known.items() if (s := shrinker.size(n, v)) != v}
    return kind(**{**small, **(entry.get("args") or {})})
