"""Tiny models that are no causal language models: an encoder, an encoder-decoder, a vision tower, several towers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from lamina.anatomy import Anatomy
from lamina.core.documents import Receipt, Step
from lamina.rewrites.drop import Drop

LAYERS = 3
WIDTH: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
IMAGE = 98
"""The mark of a patch in a text."""


def text(rows: int = 2, tokens: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def picture(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    made = BertForMaskedLM(BertConfig(vocab_size=99, num_hidden_layers=LAYERS, **WIDTH))
    return made, {"input_ids": text()}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    made = ViTModel(ViTConfig(num_hidden_layers=LAYERS, image_size=16, patch_size=4, **WIDTH))
    return made, {"pixel_values": picture()}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = T5Config(
        vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=LAYERS, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config), {"input_ids": text(), "decoder_input_ids": text(tokens=7, seed=3)}


def bart() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes: dict[str, Any] = {
        f"{k}_{n}": v for k in ("encoder", "decoder") for n, v in (("ffn_dim", 32), ("attention_heads", 2))
    }
    config = BartConfig(vocab_size=99, d_model=16, encoder_layers=LAYERS, decoder_layers=LAYERS, **sizes)
    return BartForConditionalGeneration(config), {"input_ids": text(), "decoder_input_ids": text(tokens=7, seed=3)}


def swin() -> tuple[nn.Module, dict[str, Tensor]]:
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 3], num_heads=[2, 2], window_size=4)
    return SwinModel(config), {"pixel_values": picture()}


def llava() -> tuple[nn.Module, dict[str, Tensor]]:
    """Both towers are equally deep: only what is built tells which config counts which."""
    vision = CLIPVisionConfig(num_hidden_layers=LAYERS, image_size=16, patch_size=8, **WIDTH)
    words = LlamaConfig(vocab_size=99, num_hidden_layers=LAYERS, **WIDTH)
    config = LlavaConfig(vision_config=vision, text_config=words, image_token_index=IMAGE)
    ids = text(tokens=11)
    ids[:, 2:6] = IMAGE
    return LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": picture()}


KINDS = {"bert": bert, "vit": vit, "t5": t5, "bart": bart, "swin": swin, "llava": llava}


def kind(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model whose every branch matters, in evaluation mode, and the inputs of one forward."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, sample = KINDS[name]()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval(), sample


def drop(model: nn.Module, sample: Mapping[str, Tensor], *sites: str) -> Receipt:
    """Drop sites of a model that any inputs run."""
    bench: Any = SimpleNamespace(model=model, anatomy=Anatomy.of(model, sample), renew=lambda: None)
    return Drop().apply(Step(rewrite="drop", sites=sites), bench)
