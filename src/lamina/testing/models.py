"""Tiny models with random weights, built from config classes alone: 4 blocks, 32 wide, a vocabulary of 99.

Their weights are scaled so that every branch matters: a mistake in any of them shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 99
WIDTH = 32
DEPTH = 4
LENGTH = 512
"""Positions that they have."""
WINDOW = 6
"""Of the sliding-window attentions: shorter than the texts, so that it matters."""

_BASE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_GEMMA = {**_GQA, "head_dim": 8, "sliding_window": WINDOW}
_GPT2 = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": LENGTH, "vocab_size": VOCABULARY}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", _GQA),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", _GQA),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 8}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "gpt2": ("GPT2Config", {**_GPT2, **_IDS}),
    "gpt_neox": ("GPTNeoXConfig", _BASE),
    "phi": ("PhiConfig", _BASE),
    "falcon": ("FalconConfig", _BASE),
    "falcon_new": ("FalconConfig", {**_BASE, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "olmo2": ("Olmo2Config", _GQA),
    "mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 4, "sliding_window": None}),
    "granite": ("GraniteConfig", {**_GQA, "residual_multiplier": 0.3}),
    "cohere": ("CohereConfig", {**_GQA, "logit_scale": 1.0}),
}
"""Name → config class of transformers, and its settings."""

SERIAL = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "olmo2", "mixtral", "granite")
"""Models whose MLP reads what the attention added; in the others both read the block's input."""


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.mixes = nn.LayerNorm(width), _Attention(width, heads)
        self.between = nn.LayerNorm(width)
        self.feeds = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixes(self.before(x))
        return x + self.feeds(self.between(x))


class NanoGPT(nn.Module):
    """A decoder that is no transformers model: no config, no cache, no mask; token ids in, logits out."""

    def __init__(self, *, depth: int = DEPTH, width: int = WIDTH, heads: int = 4, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary]."""
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def config(name: str, **changes: Any) -> Any:
    """The transformers config of a tiny model, with some settings changed."""
    import transformers

    kind, settings = CONFIGS[name]
    return getattr(transformers, kind)(**{**settings, **changes})


def _causal(name: str) -> Callable[..., nn.Module]:
    def build(**changes: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config(name, **changes))

    return build


BUILDERS: dict[str, Callable[..., nn.Module]] = {**{name: _causal(name) for name in CONFIGS}, "nanogpt": NanoGPT}
"""Name → function that builds the model with its library's own random weights."""

NAMES = tuple(BUILDERS)
"""All tiny models."""


def tiny(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model in evaluation mode, the same for the same seed; the caller's random state is left alone.

    `changes` are settings of its config (of `NanoGPT`, its arguments).
    """
    if name not in BUILDERS:
        raise KeyError(f"no tiny model named {name!r}; known: {', '.join(NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loud = 0.25 if name.startswith("gemma") else 0.5  # these multiply their embeddings by √width
        return lively(BUILDERS[name](**changes), seed, loud).eval()


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0, loud: float = 0.5) -> nn.Module:
    """Fill a model's parameters with numbers that make every branch matter; ties of weights stay.

    `loud` is the standard deviation of the embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator).to(p.dtype)
        if id(p) in embeddings:
            p.copy_(loud * noise)
        elif p.ndim > 1:
            p.copy_(noise / WIDTH**0.5)
        else:
            p.add_(0.1 * noise)
    return model


def text(sequences: int = 4, tokens: int = 12, *, seed: int = 0) -> Tensor:
    """Random token ids [sequences, tokens] without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (sequences, tokens), generator=generator)


@torch.no_grad()
def own_text(model: nn.Module, sequences: int = 8, tokens: int = 16, *, seed: int = 0) -> Tensor:
    """Token ids [sequences, tokens] drawn from the model itself.

    On its own text no change of the model lowers the expected loss: what a site does can't do harm. Token 0, which
    pads, is not drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = text(sequences, 1, seed=seed)
    extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    for _ in range(tokens - 1):
        out = model(ids, **extra)
        logits = out if isinstance(out, Tensor) else out.logits
        drawn = 1 + torch.multinomial(logits[:, -1, 1:].float().softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], 1)
    return ids


def padded(rows: list[Tensor], size: int, *, side: str = "right", filler: int = 0) -> list[dict[str, Tensor]]:
    """Batches of `size` rows of unequal length, padded on one side, as a model takes them.

    A batch of equal rows has a mask too; `position_ids` count each row's own tokens.
    """
    batches = []
    for first in range(0, len(rows), size):
        group = rows[first : first + size]
        longest = max(len(r) for r in group)
        ids = torch.full((len(group), longest), filler)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(group):
            place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            ids[i, place], mask[i, place] = row, 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        batches.append({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    return batches
