"""A transformers model of a folder, its weights left on disk: which tensors of which files each parameter is made of.

The names and the conversions are transformers' own.
"""

from __future__ import annotations

import copy
import importlib
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamina.core.errors import InputError, LaminaError, UnsupportedError
from lamina.lab._disk_files import Stored, stored, unmapped
from lamina.lab._disk_weights import Recipe, Weights, is_light
from lamina.lab.checkpoint import read_config, weight_files
from lamina.lab.load import quiet


@dataclass
class Draft:
    """Parameters that are made together: of tensors of the checkpoint, by pattern, name and place."""

    first: str
    converter: Any = None
    sources: list[tuple[str, str, Stored]] = field(default_factory=list[tuple[str, str, Stored]])

    def make(self, config: Any, model: Any, read: Callable[[Stored], Tensor]) -> dict[str, Tensor]:
        """The parameters by name, as transformers makes them of what `read` gives."""
        if self.converter is None:
            return {self.first: read(self.sources[0][2])}
        converter = copy.deepcopy(self.converter)
        for pattern, key, source in self.sources:
            converter.add_tensor(self.first, key, pattern, partial(read, source))
        made = converter.convert(self.first, model=model, config=config)
        return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}


def open_folder(path: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> tuple[nn.Module, Weights]:
    """See `lamina.lab.disk.open_streamed`."""
    path = Path(path)
    _expect_readable(read_config(path), path, trust_remote_code=trust_remote_code)
    tensors = stored(weight_files(path))
    with quiet(), _clear("transformers can't build this model", path):
        skeleton = _skeleton(path, dtype, trust_remote_code=trust_remote_code)
        drafts = _drafts(skeleton, tensors)
    with quiet(), _clear("transformers can't convert these weights", path):
        targets = _targets(skeleton, drafts)
    _expect_whole(skeleton, targets, path)
    apart = _twice(skeleton, targets, tensors)
    with quiet(), _clear("transformers can't load this checkpoint", path):
        model, info = _hollow(skeleton, dtype, tensors, apart)
    _expect_agreed(info, path)
    model.config.name_or_path = str(path)
    return model, _filled(model, targets)


def _expect_readable(config: Mapping[str, Any], path: Path, *, trust_remote_code: bool) -> None:
    if config.get("auto_map") and not trust_remote_code:
        raise InputError(
            "this checkpoint brings its own Python code (auto_map in config.json)",
            where=path,
            hint="read the code, then pass --trust-remote-code (trust_remote_code=True)",
        )
    if config.get("quantization_config"):
        raise UnsupportedError("quantised weights", where=path, hint="give the full-precision checkpoint")


def _skeleton(path: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """The model without any numbers: of the class that the config names, else of that for causal language models."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    name = next(iter(config.architectures or ()), "")
    named = None if own else getattr(transformers, name, None) or _beside(config, name)
    with torch.device("meta"):
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named._from_config(config, dtype=dtype)
        auto = transformers.AutoModelForCausalLM
        return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _beside(config: Any, name: str) -> Any:
    """The class of that name in the module of models that belongs to a config's."""
    place = type(config).__module__.replace(".configuration_", ".modeling_")
    with suppress(ImportError):
        return getattr(importlib.import_module(place), name, None)
    return None


def _drafts(skeleton: Any, tensors: Mapping[str, Stored]) -> list[Draft]:
    """What transformers' loading would make of these tensors; those that it has no place for are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    steps = get_model_conversion_mapping(skeleton)
    renamings = [s for s in steps if isinstance(s, WeightRenaming)]
    converters = [s for s in steps if isinstance(s, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    prefix, known = skeleton.base_model_prefix, skeleton.state_dict()
    drafts: dict[str, Draft] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name in known:
            draft = drafts.setdefault(name, Draft(name, by_pattern[pattern] if pattern is not None else None))
            draft.sources.append((pattern or key, key, tensors[key]))
    return list(drafts.values())


def _targets(skeleton: Any, drafts: list[Draft]) -> dict[str, tuple[Draft, tuple[int, ...]]]:
    """Parameter's or buffer's name → what makes it, and the shape that it then has."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    found: dict[str, tuple[Draft, tuple[int, ...]]] = {}
    for draft in drafts:
        if draft.converter is None:
            found[draft.first] = draft, draft.sources[0][2].shape
            continue
        with mode:
            made = draft.make(skeleton.config, skeleton, lambda s: torch.empty(s.shape, dtype=s.dtype))
        for name, tensor in made.items():
            found[name] = draft, tuple(tensor.shape)
    return found


def _expect_whole(skeleton: Any, targets: Mapping[str, tuple[Draft, tuple[int, ...]]], path: Path) -> None:
    """Nothing of another shape, and nothing but what transformers itself lets be missing: before anything is made."""
    known = skeleton.state_dict(keep_vars=True)
    wrong = [n for n, (_, shape) in targets.items() if n in known and tuple(known[n].shape) != shape]
    there = {id(known[n]) for n in targets if n in known}
    free = [re.compile(p) for p in getattr(skeleton, "_keys_to_ignore_on_load_missing", None) or ()]
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
    missing = [n for n, t in known.items() if id(t) not in there and not any(p.search(n) for p in free)]
    missing = [n for n in missing if n not in tied]
    _expect_agreed({"mismatched_keys": [(n,) for n in wrong], "missing_keys": missing, "unexpected_keys": ()}, path)


def _expect_agreed(info: Mapping[str, Any], where: Path) -> None:
    for what, keys in (
        ("weights have another shape than the config says", [k[0] for k in info["mismatched_keys"]]),
        ("weights are missing from the checkpoint", info["missing_keys"]),
        ("weights of the checkpoint have no place in the model", info["unexpected_keys"]),
    ):
        if keys:
            first = ", ".join(sorted(keys)[:2]) + (", …" if len(keys) > 2 else "")
            hint = "config.json and weights belong to different models, or one of them is stale"
            raise InputError(f"{len(keys)} {what}: {first}", where=where, hint=hint)


def _twice(
    skeleton: Any, targets: dict[str, tuple[Draft, tuple[int, ...]]], tensors: dict[str, Stored]
) -> dict[str, float]:
    """Weights that the config ties though the checkpoint holds both: where they are the same, one is left out.

    Else transformers does not tie them; what is returned has different numbers for both.
    """
    apart: dict[str, float] = {}
    for name, other in (getattr(skeleton, "all_tied_weights_keys", None) or {}).items():
        if name not in targets or other not in targets:
            continue
        mine, yours = targets[name][0], targets[other][0]
        if mine.converter is not None or yours.converter is not None:
            raise UnsupportedError(f"the tied weights {name} and {other} are both stored, in another form")
        if mine.sources[0][2].same(yours.sources[0][2]):
            del tensors[targets.pop(name)[0].sources[0][1]]
        else:
            apart |= {mine.sources[0][1]: 0.0, yours.sources[0][1]: 1.0}
    return apart


class _Lazy:
    """Stands for a stored tensor where transformers takes it up: it has a shape and a type and no numbers."""

    def __init__(self, source: Stored, make: Callable[[Stored], Tensor]) -> None:
        self.source, self.make = source, make

    def __getitem__(self, _: Any) -> Tensor:
        return self.make(self.source)


def _hollow(
    skeleton: Any, dtype: torch.dtype, tensors: Mapping[str, Stored], apart: Mapping[str, float]
) -> tuple[Any, Mapping[str, Any]]:
    """The model as `from_pretrained` builds it, with tensors that hold no numbers for those of the checkpoint.

    Buffers that are computed are there; weights are tied.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)  # some models compute what they would start from

    def fake(source: Stored) -> Tensor:
        with mode:
            return torch.empty(source.shape, dtype=source.dtype)

    state: dict[str, Any] = {k: _Lazy(s, fake) for k, s in tensors.items()}
    for key, number in apart.items():  # transformers compares their numbers
        state[key] = _Lazy(tensors[key], lambda s, n=number: torch.full((1,), n, dtype=dtype).expand(s.shape))
    with _in_turn():
        return type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )


@contextmanager
def _in_turn() -> Iterator[None]:
    """Inside, transformers loads tensor after tensor, without threads."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _filled(model: nn.Module, targets: Mapping[str, tuple[Draft, tuple[int, ...]]]) -> Weights:
    """The model's parameters on disk in the place of the hollow ones; vectors and buffers are read once and stay."""
    hollow = [(m, k, n, t) for m, k, n, t in _tensors(model) if n in targets]
    dtypes = {n: t.dtype for _, _, n, t in hollow}
    mine: dict[int, nn.Parameter] = {}
    recipes: dict[int, Recipe] = {}
    for module, key, name, tensor in hollow:
        draft = targets[name][0]
        if id(draft) not in recipes:
            recipes[id(draft)] = _recipe(model, draft, targets, dtypes)
        if key in module._buffers:
            module._buffers[key] = unmapped(recipes[id(draft)].make()[name])
            continue
        made = unmapped(recipes[id(draft)].make()[name]) if is_light(tensor) else _nothing(tensor)
        mine[id(tensor)] = module._parameters[key] = nn.Parameter(made, requires_grad=tensor.requires_grad)
    for module, key, _, tensor in _tensors(model):  # those that are tied to one of them
        if key in module._parameters:
            module._parameters[key] = mine.get(id(tensor), tensor)
    del hollow  # until now, so that no other tensor got the place of one of them
    large = {n for n, p in model.named_parameters(remove_duplicate=False) if not is_light(p)}
    return Weights(model, [r for r in recipes.values() if large.intersection(r.targets)])


def _tensors(model: nn.Module) -> list[tuple[nn.Module, str, str, Any]]:
    """All parameters and buffers: their module, their key in it, their name and themselves."""
    return [
        (module, key, f"{path}.{key}" if path else key, tensor)
        for path, module in model.named_modules()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]


def _nothing(tensor: Tensor) -> Tensor:
    return torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)


def _recipe(
    model: nn.Module,
    draft: Draft,
    targets: Mapping[str, tuple[Draft, tuple[int, ...]]],
    dtypes: Mapping[str, torch.dtype],
) -> Recipe:
    names = tuple(n for n, (d, _) in targets.items() if d is draft)
    owner, config = weakref.ref(model), model.config
    wanted = dtypes[draft.first] if draft.first in dtypes else dtypes[names[0]]

    def make() -> dict[str, Tensor]:
        made = draft.make(config, owner(), lambda s: s.read(wanted))
        return {n: made[n].to(dtypes[n]) for n in names if n in dtypes}

    return Recipe(names, tuple(s for _, _, s in draft.sources), make, plain=draft.converter is None)


@contextmanager
def _clear(what: str, where: object) -> Iterator[None]:
    """Whatever a library raises, as one line."""
    try:
        yield
    except (LaminaError, MemoryError):
        raise
    except Exception as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{what}: {detail[:300]}", where=where) from error
