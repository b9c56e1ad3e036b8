"""Tiny random instances of the architectures that transformers, timm and diffusers know, built from configs alone.

`names()` lists them, `build(name)` makes one with inputs of a forward. What the sizes' rules can't tell is data, in
`zoo.yaml`. timm and diffusers are optional: without them their names are listed, and `build` refuses.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lamina.core.errors import UnsupportedError, did_you_mean
from lamina.testing._zoo_fill import fill
from lamina.testing._zoo_other import diffusers_model, timm_model, timm_sample
from lamina.testing._zoo_samples import sample
from lamina.testing._zoo_shrink import Shrinker

LIBRARIES = ("transformers", "timm", "diffusers")
_HEADS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "")
"""Kinds of head, the first that a model type has; the last stands for the model without one."""


@dataclass(frozen=True)
class Specimen:
    """A tiny model (float32, evaluation mode, four blocks a stack) and keyword inputs of one forward."""

    name: str
    """A model type of transformers, timm/… or diffusers/…"""
    model: nn.Module
    sample: dict[str, Tensor]
    """Batch first where there is a batch. A few forwards also take a plain number, list or mapping."""
    causal: bool = False
    """Built with the head of a causal language model."""
    note: str = ""
    """What the sample leaves out of the model, or that the forward draws random numbers; mostly empty."""


@cache
def data() -> dict[str, Any]:
    """What `zoo.yaml` says: rules of sizes, and per model what they can't tell."""
    return yaml.safe_load(resources.files("lamina.testing").joinpath("zoo.yaml").read_text(encoding="utf-8"))


def names(library: str = "transformers", *, causal: bool | None = None) -> tuple[str, ...]:
    """Names that `build` knows, of one library; those with a causal head, or those without.

    Some can't be built; `build` says why.
    """
    if library not in LIBRARIES:
        raise UnsupportedError(f"no zoo of {library!r}", hint=did_you_mean(library, LIBRARIES))
    if library != "transformers":
        return () if causal else tuple(f"{library}/{n}" for n in data()[library])
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as HEADS

    return tuple(n for n in CONFIG_MAPPING if causal is None or (n in HEADS) == causal)


def build(name: str, *, seed: int = 0) -> Specimen:
    """The tiny model of that name, the same for the same seed; the caller's random state is left alone.

    Raises UnsupportedError, with the reason, where it can't be built.
    """
    library = name.split("/", maxsplit=1)[0] if "/" in name else "transformers"
    known = names(library)
    if name not in known:
        raise UnsupportedError(f"no model named {name!r}", hint=did_you_mean(name, known))
    entry = _entry(name, library)
    if "skip" in entry:
        raise UnsupportedError(entry["skip"], where=name)
    given = entry.get("sample") or (timm_sample(entry) if library == "timm" else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = fill(_model(name, library, entry).eval(), seed)
            inputs = sample(model, given, seed)
        except Exception as error:
            raise UnsupportedError(_reason(error), where=name) from error
    return Specimen(name, model, inputs, name in names(causal=True), entry.get("towers") or entry.get("note", ""))


def config(name: str) -> Any:
    """The tiny config of a model type of transformers."""
    from transformers import CONFIG_MAPPING

    return _shrinker().shrink(CONFIG_MAPPING[name](**_entry(name, "transformers").get("start") or {}))


def _entry(name: str, library: str) -> dict[str, Any]:
    """What the data says of a model; a copy, as libraries change what they are given."""
    return copy.deepcopy(data()[library].get(name.removeprefix(f"{library}/")) or {})


def _shrinker() -> Shrinker:
    known = {n: e["config"] for n, e in data()["transformers"].items() if e.get("config")}
    return Shrinker(data()["sizes"], known)


def _reason(error: Exception) -> str:
    """One line; of a missing package, its name."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ImportError):
        missing = re.search(r"requires the (\w+) library|No module named '(\w+)", text)
        if missing:
            return f"needs the package {missing[1] or missing[2]}"
    return text if len(text) < 300 else text[:300] + "…"


def _model(name: str, library: str, entry: Mapping[str, Any]) -> nn.Module:
    plain = name.removeprefix(f"{library}/")
    if library == "timm":
        return timm_model(plain, entry)
    if library == "diffusers":
        return diffusers_model(plain, entry, _shrinker())
    tiny = config(name)
    kind = _class(name, tiny, entry.get("class"))
    if name in names(causal=True) and hasattr(tiny, "is_decoder") and "is_decoder" not in (entry.get("config") or {}):
        tiny.is_decoder = True
    return kind._from_config(_part(tiny, kind.config_class), dtype=torch.float32)


def _part(tiny: Any, kind: type | None) -> Any:
    """The config that a model class takes: `tiny`, or the one inside it that is of that class."""
    if kind is None or isinstance(tiny, kind):
        return tiny
    inner = [getattr(tiny, n, None) for n in type(tiny).sub_configs]
    return next((c for c in inner if isinstance(c, kind)), tiny)


def _class(name: str, tiny: Any, named: str | None) -> Any:
    """The model class: the one named, the first of a mapping, or the one of the module that takes the config."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for head in _HEADS:
        mapping = getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES")
        named = named or mapping.get(name)
    if isinstance(named, (list, tuple)):
        named = named[0]
    if named is None:
        return _taking(tiny)
    found = getattr(transformers, named, None) or getattr(_modeling(tiny), named, None)
    if found is None:
        raise LookupError(f"no class {named}")
    return found


def _modeling(tiny: Any) -> Any:
    """The module of models next to a config's own, None if there is none."""
    try:
        return importlib.import_module(type(tiny).__module__.replace(".configuration_", ".modeling_"))
    except ModuleNotFoundError:
        return None


def _taking(tiny: Any) -> Any:
    """The model class of a config's module that is made of this config: the shortest name, of those without a task."""
    from transformers import PreTrainedModel

    module = _modeling(tiny)
    kinds = (
        [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, PreTrainedModel)] if module else []
    )
    kinds = [k for k in kinds if k.__module__ == module.__name__ and "forward" in vars(k) and _takes(k) is type(tiny)]
    if not kinds:
        raise LookupError("no model class takes this config alone")
    return min(kinds, key=lambda k: ("For" in k.__name__, len(k.__name__)))


def _takes(kind: type) -> Any:
    """The config class that a model class takes: as its constructor's hint says, or its attribute."""
    hint = inspect.signature(kind.__init__).parameters.get("config")
    said = hint.annotation if hint is not None else None
    if isinstance(said, str):
        said = getattr(inspect.getmodule(kind), said, None)
    real = isinstance(said, type) and said is not inspect.Parameter.empty
    return said if real else getattr(kind, "config_class", None)
