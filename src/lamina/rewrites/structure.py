"""Rebuild a thinned network's structure, and load its checkpoint, with torch and transformers alone.

This file travels with the weights as `modeling_lamina.py`, so that `from_pretrained(path, trust_remote_code=True)` of
the Auto class that `config.json` names (`AutoModelForCausalLM`, `AutoModel`, …) works where lamina is not installed.
lamina itself uses the same functions: what is applied in memory is what is rebuilt from the checkpoint.
It knows no architecture: everything it does is spelt out in `config.json` under `lamina.structure`.
"""

import copy
import importlib
import json
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .lamina_parts import KINDS, Mapped, Passing, build, told

FORMAT = 1
FILES = {
    "modeling_lamina.py": "structure.py",
    **{f"lamina_{name}.py": f"lamina_{name}.py" for name in ("parts", "attention", "layouts")},
}
"""What travels with the weights → its name in lamina."""
PREFERRED = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModelForMaskedLM", "AutoModel",
)  # fmt: skip
GENERAL = ("AutoModelForMultimodalLM", "AutoModelForTextEncoding", "AutoModelForPreTraining")
"""Auto classes that are named before the others, and only where no other knows the class."""


class Gone(nn.Module):
    """Stands where a branch's core stood: adds zero, computes nothing, holds no parameters and no cache entry.

    `stream` is the position or keyword of the tokens, `returns` the (index, arity) of each nested tuple. `joins`: the
    core added to these tokens itself, so they are handed on, through the modules `keeps` (path → norm of the stream);
    `width`: how many features the zeros have, if not as many. `hands`: what the core returned as it was given, beside
    its result: (place in what it returns, position or keyword).
    """

    def __init__(self, stream=0, returns=(), joins=False, width=None, keeps=None, hands=()):
        super().__init__()
        self.stream, self.returns, self.joins, self.width = stream, tuple(map(tuple, returns)), joins, width
        self.hands = tuple(map(tuple, hands))
        self.keeps = tuple(keeps or ())
        for path, module in (keeps or {}).items():
            above, _, name = path.rpartition(".")
            holder = self
            for part in above.split(".") if above else ():
                if not hasattr(holder, part):
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.add_module(name, module)

    def forward(self, *args, **kwargs):
        """Zeros shaped like the tokens, in the structure that the core returned."""
        tokens = args[self.stream] if isinstance(self.stream, int) else kwargs[self.stream]
        width = tokens.shape[-1] if self.width is None else self.width
        out = (
            tokens if self.joins else torch.zeros((*tokens.shape[:-1], width), dtype=tokens.dtype, device=tokens.device)
        )
        for path in self.keeps:
            out = self.get_submodule(path)(out)
        for index, arity, *form in reversed(self.returns):
            made = (out if i == index else None for i in range(arity))
            out = list(made) if form else tuple(made)
        if self.hands:
            handed = {i: args[place] if isinstance(place, int) else kwargs[place] for i, place in self.hands}
            out = type(out)(handed.get(i, value) for i, value in enumerate(out))
        return out

    def extra_repr(self):
        """How it is built, for print(model)."""
        return f"stream={self.stream!r}, returns={self.returns}, joins={self.joins}, width={self.width}"


class Group(nn.ModuleList):
    """Blocks that count as one layer: one holds a cache entry, the others don't.

    So the config's number of layers, its per-layer lists and the cache all count what remains.
    Whatever else the model asks of a layer is answered by the block that holds the cache entry. `carries` are what
    each block hands to the next beside the stream: (place in what it returns, position or keyword).
    """

    def __init__(self, blocks, main, stream=0, carries=()):
        super().__init__(blocks)
        self.main, self.stream, self.carries = main, stream, tuple(map(tuple, carries))
        self.training = self[main].training

    def forward(self, *args, **kwargs):
        """Run the blocks in turn; what is returned beside the stream, and not carried, is the caching block's."""
        result, carried = None, {}
        for position, block in enumerate(self):
            out = block(*args, **kwargs)
            several = out if isinstance(out, (tuple, list)) else (out,)
            if position == self.main:
                result = out
            for index, place in ((0, self.stream), *self.carries):
                if index < len(several) and several[index] is not None:
                    carried[index] = several[index]
                    args, kwargs = _given(args, kwargs, place, several[index])
        if not isinstance(result, (tuple, list)):
            return carried[0]
        return tuple(carried.get(index, value) for index, value in enumerate(result))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("main", "stream") or "main" not in self.__dict__:
                raise
            return getattr(self[self.main], name)


def _given(args, kwargs, place, value):
    """The arguments with another value at a position or keyword."""
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: value}


def grouped(element):
    """Whether this is a group of blocks, made by this file or by a checkpoint's copy of it."""
    return type(element).__name__ == "Group" and isinstance(element, nn.ModuleList)


def flat(stack):
    """The blocks of a stack, one by one, groups opened."""
    return [block for element in stack for block in (element if grouped(element) else (element,))]


def replay(model, steps):
    """Turn a model of the dense structure into the thinned one, in place; works on the meta device.

    Weights of what remains are untouched; what is dropped is no longer referenced.
    """
    for step in steps:
        if step.get("format", FORMAT) > FORMAT or step.get("kind") not in ("drop", *KINDS):
            raise ValueError(
                f"this file can't replay {step.get('kind')!r}, format {step.get('format')}: a newer one is needed"
            )
        ({"drop": _drop} | KINDS)[step["kind"]](model, step)
    told(model)
    return model


def _drop(model, step):
    stack = model.get_submodule(step["stack"])
    blocks = flat(stack)
    bare = {id(b) for b in stack if not grouped(b) and not holds_cache(b, step["cached"])}
    if len(blocks) != step["depth"]:
        raise ValueError(f"{step['stack']} has {len(blocks)} blocks, the receipt was made for {step['depth']}")
    for branch in step["branches"]:
        block = blocks[branch["block"]]
        widths = dict(branch.get("widths", ()))
        keeps = {p: block.get_submodule(f"{branch['core']}.{p}") for p in branch.get("keeps", ())}
        width = widths.get(branch["core"])
        joins, hands = branch.get("joins", False), branch.get("hands", ())
        if "map" in branch:
            map_ = build(branch["map"], block.get_submodule(branch["core"]))
            core = Mapped(map_, branch["stream"], branch["returns"], hands)
        else:
            core = Gone(branch["stream"], branch["returns"], joins, width, keeps, hands)
        block.set_submodule(branch["core"], core.train(block.training))
        for path in branch["own"] if branch.get("map", {}).get("type", "constant") == "constant" else ():
            gone = Gone(width=widths[path]) if path in widths else Passing(block.get_submodule(path))
            block.set_submodule(path, gone.train(block.training))
    gone = set(step["blocks"])
    blocks = [block for number, block in enumerate(blocks) if number not in gone]
    counted = [id(b) in bare or holds_cache(b, step["cached"]) for b in blocks]
    layers = _regroup(blocks, counted, step["stream"], step.get("carries", ()))
    strides = dict.fromkeys(step["index"], (1, 0)) | step.get("strides", {})
    _renumber(layers, strides, step.get("first", ()))
    for name in list(stack._modules):
        del stack._modules[name]
    for number, layer in enumerate(layers):
        stack.add_module(str(number), layer)
    for name, dim in step.get("sliced", {}).items():
        _slice(model, name, dim, step["kept"], step["depth"])
    if step["config"]:
        edit(_owned(model.config, step), step["config"], after=True)
    for path, edits in step.get("copies", {}).items():
        edit(model.get_submodule(path).config, edits, after=True)
    for path, edits in step.get("held", {}).items():
        edit(model.get_submodule(path), edits, after=True)


def _slice(model, name, dim, kept, depth):
    """Keep the parts of the layers `kept` of a tensor that holds one for each of `depth` along `dim`."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, last)
    places = torch.tensor(kept, device=tensor.device)
    parts = tensor.detach().unflatten(dim, (depth, -1)).index_select(dim, places).flatten(dim, dim + 1)
    setattr(module, last, nn.Parameter(parts.contiguous(), requires_grad=tensor.requires_grad))


def holds_cache(block, cached):
    """Whether any of the block's caching modules is still there."""
    names = dict(block.named_modules())
    return any(path in names and type(names[path]).__name__ not in ("Gone", "Mapped") for path in cached)


def _regroup(blocks, counted, stream, carries):
    """One layer per block that counts; the others join the one before (the first ones, the one after)."""
    if all(counted):
        return blocks
    layers, waiting = [], []
    for block, counts in zip(blocks, counted, strict=True):
        if counts:
            layers.append([len(waiting), [*waiting, block]])
            waiting = []
        elif layers:
            layers[-1][1].append(block)
        else:
            waiting.append(block)
    if not layers:
        raise ValueError("no block that holds a cache entry is left")
    return [members[0] if len(members) == 1 else Group(members, main, stream, carries) for main, members in layers]


def _renumber(layers, strides, first):
    """Number the layers in order; but the cache's first entry goes to the first that has any of the modules `first`.

    Each attribute gets a · number + b by its `strides`: path → (a, b).
    """
    numbers = list(range(len(layers)))
    lead = next((n for n, layer in enumerate(layers) if any(holds_cache(b, first) for b in flat([layer]))), 0)
    numbers[0], numbers[lead] = numbers[lead], numbers[0]
    for number, layer in zip(numbers, layers, strict=True):
        for block in flat([layer]):
            modules = dict(block.named_modules())
            for key, (each, shift) in strides.items():
                path, _, name = key.rpartition(".")
                if path in modules and hasattr(modules[path], name):
                    setattr(modules[path], name, each * number + shift)


def edit(config, edits, *, after):
    """Set the fields (of a config, or of a module) to what they are after (or were before) the step."""
    for field, values in edits.items():
        setattr(config, field, copy.deepcopy(values[1 if after else 0]))


# What follows lets transformers load the checkpoint.


def _thin_config(data):
    """A config class of the dense model's kind, which writes and reads itself as a thinned checkpoint."""
    base = getattr(importlib.import_module(data["config_module"]), data["config_class"])

    class LaminaConfig(base):
        def to_dict(self):
            return {**super().to_dict(), "model_type": "lamina"}

        def to_diff_dict(self):
            return {**super().to_diff_dict(), "model_type": "lamina", "lamina": self.lamina, "auto_map": self.auto_map}

    LaminaConfig.model_type = base.model_type
    return LaminaConfig


class LaminaConfig(PreTrainedConfig):
    """Entry point for AutoConfig: gives a config of the dense model's class that carries the receipts."""

    model_type = "lamina"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Read config.json."""
        kwargs.pop("_from_auto", None)
        unused = kwargs.pop("return_unused_kwargs", False)
        data, kwargs = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(data, return_unused_kwargs=unused, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """A config of the dense class from the data of config.json."""
        data = {k: v for k, v in config_dict.items() if k != "model_type"}
        return _thin_config(data["lamina"]).from_dict(data, **kwargs)


class LaminaModel(PreTrainedModel):
    """Entry point for the Auto classes: builds the dense class's skeleton, replays the receipts, loads strictly."""

    config_class = LaminaConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load the checkpoint; a missing, unexpected or mismatched tensor is an error."""
        kwargs.pop("trust_remote_code", None)
        kwargs.pop("_from_auto", None)
        wanted = kwargs.pop("output_loading_info", False)
        if config is None or not hasattr(config, "lamina"):
            config = LaminaConfig.from_pretrained(pretrained_model_name_or_path)
        model, info = _thin_model(config, cls).from_pretrained(
            pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
        )
        wrong = {
            k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(k)
        }
        if wrong:
            raise ValueError(f"{pretrained_model_name_or_path} is not the checkpoint its receipts describe: {wrong}")
        return (model, info) if wanted else model

    @classmethod
    def from_config(cls, config, **kwargs):
        """The thinned structure with random weights."""
        return _thin_model(config, cls)._from_config(config, **kwargs)

    _from_config = from_config


def __getattr__(name):
    """The entry point under the name of a thinned checkpoint's class: `LaminaLlamaForCausalLM`.

    transformers looks in names of classes for the kind of loss and of cache, so that they hold the dense one's.
    The first checkpoints say `LaminaForCausalLM`.
    """
    if not name.startswith("Lamina"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (LaminaModel,), {"__module__": __name__})


def _thin_model(config, entry):
    data = config.lamina
    base = getattr(importlib.import_module(data["model_module"]), data["model_class"])

    def __init__(self, config, *args, **kwargs):
        for step in reversed(data["structure"]):
            edit(_owned(config, step), step.get("config", {}), after=False)
        base.__init__(self, config, *args, **kwargs)
        replay(self, data["structure"])

    auto = next((name for name in config.auto_map if name.startswith("AutoModel")), "AutoModel")
    names = {"__init__": __init__, "__module__": entry.__module__, "config_class": type(config)}
    if hasattr(base, "is_custom_code"):  # numbers that are not stored are made as the dense class makes them
        names["is_custom_code"] = classmethod(lambda _: base.is_custom_code())
    thin = type(f"Lamina{base.__name__}", (base,), names)
    thin._auto_class = auto
    return thin


def _owned(config, step):
    """The config that the step edits: the model's own, or one inside it."""
    for name in step.get("config_path", ()):
        config = getattr(config, name)
    return config


def auto_class(kind, default="AutoModel"):
    """The name of the Auto class that gives models of this class, `default` where none does."""
    known = [
        n for n, auto in vars(modeling_auto).items() if n.startswith("AutoModel") and kind.__name__ in _names(auto)
    ]
    order = {name: place for place, name in enumerate((*PREFERRED, *GENERAL))}
    return min(known, key=lambda n: order.get(n, len(PREFERRED) - 0.5), default=default)


def _names(auto):
    """The names of the classes that an Auto class gives."""
    for names in getattr(getattr(auto, "_model_mapping", None), "_model_mapping", {}).values():
        yield from (names,) if isinstance(names, str) else names


def checkpoint_config(model, steps, receipts):
    """`config.json` of a thinned model: the config as it is now, and under `lamina` all that the loader needs.

    What a model that was loaded from a thinned checkpoint already carries comes before.
    """
    data = json.loads(model.config.to_json_string(use_diff=False))
    earlier = getattr(model.config, "lamina", None) or {}
    dense = earlier.get("model_class", type(model).__name__)
    data["lamina"] = {
        "format": FORMAT,
        "model_module": earlier.get("model_module", type(model).__module__),
        "model_class": dense,
        "config_module": earlier.get("config_module", type(model.config).__module__),
        "config_class": earlier.get("config_class", type(model.config).__name__),
        "structure": [*earlier.get("structure", ()), *steps],
        "receipts": [*earlier.get("receipts", ()), *receipts],
    }
    auto = getattr(model, "_auto_class", None) or auto_class(type(model))
    data["architectures"] = [f"Lamina{dense}"]
    data["model_type"] = "lamina"
    data["auto_map"] = {"AutoConfig": "modeling_lamina.LaminaConfig", auto: f"modeling_lamina.Lamina{dense}"}
    data["transformers_version"] = transformers.__version__
    return data


def sources():
    """Name → text of the files that travel with the weights: this one, and the one beside it."""
    here = Path(__file__)
    return {name: here.with_name(file).read_text(encoding="utf-8") for name, file in FILES.items()}
