"""A DeciLM (Nemotron-NAS) checkpoint in transformers: Llama whose blocks may lack a sublayer or have own widths.

This file travels with the weights as `modeling_decilm.py`. vLLM and TensorRT-LLM bring their own model and read
`DeciLMConfig` alone; `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)` uses both.
It needs torch and transformers.
"""

import copy
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

MULTIPLE = 256


@dataclass
class AttentionConfig:
    """One block's attention: whether it is there, and how many query heads share a KV head."""

    no_op: bool = False
    replace_with_linear: bool = False
    sparsify: list | None = None
    n_heads_in_group: int | None = None
    window_length: int | None = None
    num_sink_tokens: int | None = None
    use_prefill_window_in_sink_attention: bool = False
    unshifted_sink: bool = False


@dataclass
class FFNConfig:
    """One block's MLP: whether it is there, and how wide it is."""

    no_op: bool = False
    replace_with_linear: bool = False
    sparsify: list | None = None
    ffn_mult: float | None = None


@dataclass
class BlockConfig:
    """One block."""

    attention: AttentionConfig
    ffn: FFNConfig


def _block(data):
    return BlockConfig(AttentionConfig(**data["attention"]), FFNConfig(**data["ffn"]))


class DeciLMConfig(LlamaConfig):
    """Llama's config with `block_configs`, one for each block, read as objects."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        self.block_configs = [b if isinstance(b, BlockConfig) else _block(b) for b in block_configs or ()]
        super().__init__(**kwargs)

    def to_dict(self):
        """Plain data, as config.json has it."""
        plain = [asdict(b) if isinstance(b, BlockConfig) else b for b in self.block_configs]
        return {**super().to_dict(), "block_configs": plain}


class Absent(nn.Module):
    """Stands where a sublayer would be: adds zero. Of a pair if `pair`, as an attention returns it."""

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states, **_):
        """Zeros like the stream."""
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.pair else zeros


def width_of(ffn_mult, hidden):
    """Neurons of an MLP."""
    exact = int(2 * ffn_mult * hidden / 3)
    return -(-exact // MULTIPLE) * MULTIPLE


class DeciLMForCausalLM(LlamaForCausalLM):
    """Llama with blocks built one by one. Attentions are numbered as they come, so that the cache has no gaps."""

    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        stack = next(m for m in self.modules() if isinstance(m, nn.ModuleList))
        entry = 0
        for number, (layer, asked) in enumerate(zip(list(stack), config.block_configs, strict=True)):
            stack[number] = self._built(type(layer), config, asked, entry)
            entry += not asked.attention.no_op
        self.post_init()

    def _built(self, kind, config, asked, entry):
        own = copy.copy(config)
        if not asked.attention.no_op:
            own.num_key_value_heads = config.num_attention_heads // asked.attention.n_heads_in_group
        if not asked.ffn.no_op:
            own.intermediate_size = width_of(asked.ffn.ffn_mult, config.hidden_size)
        qkv_bias = getattr(config, "qkv_bias", config.attention_bias)
        own.attention_bias = qkv_bias or config.attention_bias
        layer = kind(own, entry)
        attention, mlp, before, between = (name for name, _ in layer.named_children())
        if qkv_bias != config.attention_bias:
            *inner, outer = (m for m in layer.get_submodule(attention).children() if isinstance(m, nn.Linear))
            for linear in inner if config.attention_bias else [outer]:
                linear.register_parameter("bias", None)
        gone = [(attention, before, True)] * asked.attention.no_op + [(mlp, between, False)] * asked.ffn.no_op
        for core, norm, pair in gone:
            setattr(layer, core, Absent(pair))
            setattr(layer, norm, nn.Identity())
        return layer
