"""DeciLM (Nemotron-NAS): the names of its tensors, and what the engines that load it can hold.

Plain data. Sources: `nemotron_nas.py` of vLLM's model executor; of TensorRT-LLM `models/nemotron_nas` (config, convert)
and `_torch/models/modeling_nemotron_nas.py`.
"""

from __future__ import annotations

from lamina.anatomy.families import llama_gguf

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
BLOCK = "model.layers.{}.{}"
PARTS = {field: name for name, field in llama_gguf.PARTS.items()}
"""Field of `BlockWeights` → parameter of a block. A sublayer that is no-op has none, and no norm."""

ARCHITECTURE = "DeciLMForCausalLM"
MODEL_TYPE = "nemotron-nas"
FILE = "modeling_decilm.py"
"""The file of code that travels with the weights."""
MULTIPLE = 256
"""The loaders round the width of an MLP, two thirds of `ffn_mult` times the hidden size, up to a multiple of this."""
ROPES = frozenset({"default", "linear", "llama3"})
"""Rotary types that every engine computes as transformers does; yarn's scale of the logits is read differently."""
ENGINES = ("vllm", "tensorrt-llm")
