"""Low-rank adapters on the linear layers of the blocks: put in, merged, taken out; the model's structure comes back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lamina.anatomy import Anatomy
from lamina.core.errors import UnsupportedError


def targets(anatomy: Anatomy) -> tuple[str, ...]:
    """Paths of the linear layers inside the blocks, in depth order; embeddings and output head are not among them.

    Raises UnsupportedError where there are none, or where blocks share them.
    """
    model = anatomy.model
    found: dict[str, nn.Module] = {}
    for stack in anatomy.stacks:
        for block in stack.blocks:
            for name, module in model.get_submodule(block.path).named_modules():
                if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear):
                    found[f"{block.path}.{name}" if name else block.path] = module
    if not found:
        raise UnsupportedError("the blocks have no linear layer to adapt", where=type(model).__name__)
    weights = [id(m.weight) for m in found.values()]
    if len(set(weights)) < len(weights):
        raise UnsupportedError("blocks share their linear layers", where=type(model).__name__)
    return tuple(found)


@contextmanager
def adapted(anatomy: Anatomy, *, rank: int, alpha: float, seed: int) -> Iterator[dict[str, Any]]:
    """Inside, the linear layers carry adapters in float32 (by path); afterwards they are the plain layers again.

    Only the adapters are trainable inside. Leaving does not merge: call `merge` for that.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model, paths = anatomy.model, targets(anatomy)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = set(vars(model))
    turned = isinstance(model.get_submodule(paths[0]), Conv1D)
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none"}
    settings = LoraConfig(target_modules=list(paths), fan_in_fan_out=turned, **options)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # peft then sets it right by itself
            torch.manual_seed(seed)
            inject_adapter_in_model(settings, model)
        layers = {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}
        if set(layers) != set(paths):
            missed = sorted(set(paths) ^ set(layers))
            raise UnsupportedError("peft adapted other layers than it was told", where=missed[0])
        for layer in layers.values():
            for parameter in adapter_of(layer):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        yield layers
    finally:
        for path in paths:
            layer = model.get_submodule(path)
            if isinstance(layer, LoraLayer):
                model.set_submodule(path, layer.get_base_layer())
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
            parameter.grad = None


def adapter_of(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """The two factors: [rank, in] and [out, rank]."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@torch.no_grad()
def merge(layers: dict[str, Any]) -> None:
    """Add each adapter to its layer's weight: summed in float32, rounded once to the weight's own type."""
    for layer in layers.values():
        weight = layer.get_base_layer().weight
        weight.copy_((weight.float() + layer.get_delta_weight("default").float()).to(weight.dtype))
