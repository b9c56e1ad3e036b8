"""Checkpoint folders, looked at before anything is loaded: which files, whole or not, and what they need."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.core.errors import InputError, UnsupportedError

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "consolidated*.pth")
HEADER_LIMIT = 100_000_000
"""The longest header that safetensors itself accepts, in bytes."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as plain data; a missing, empty or corrupt one is an InputError that names it."""
    path = folder / "config.json"
    if not path.is_file():
        hint = (
            "merge the adapter into its model first"
            if (folder / "adapter_config.json").is_file()
            else ("a Hugging Face folder has config.json, *.safetensors and a tokenizer")
        )
        raise InputError("no config.json in this folder", where=folder, hint=hint)
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else is an InputError that names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read: {error}", where=path) from None
    if not text.strip():
        raise InputError("the file is empty", where=path, hint="copy it again from where it came")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", where=path) from None
    if not isinstance(data, dict):
        raise InputError(f"a JSON object is needed, not {type(data).__name__}", where=path)
    return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder in name order, each checked whole. Pickles are refused."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise InputError("no weight_map in the index", where=index)
        files = [folder / name for name in sorted({str(v) for v in table.values()})]
        for file in files:
            if not file.is_file():
                raise InputError("the index names this file, but it is missing", where=file)
    else:
        files = sorted(folder.glob("*.safetensors"))
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles and not files:
            raise InputError(
                f"only pickled weights ({pickles[0]}); pickles can run code and are not loaded",
                where=folder,
                hint="convert them once: load with transformers, then save_pretrained writes safetensors",
            )
        if files:
            name = "model.safetensors or model.safetensors.index.json"
            raise InputError(f"no {name}, only {files[0].name}", where=folder, hint="rename or index the weights")
        raise InputError("no weights (*.safetensors) in this folder", where=folder)
    for file in files:
        check_safetensors(file)
    return files


def check_safetensors(path: Path) -> Mapping[str, Any]:
    """The header of a safetensors file, after checking it against the file's size."""
    size = path.stat().st_size
    again = "copy or download it again"
    if size < 10:
        raise InputError("the file is empty" if size == 0 else f"truncated: {size} bytes", where=path, hint=again)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > HEADER_LIMIT:
            raise InputError("not a safetensors file: its header can't be that long", where=path, hint=again)
        if length > size - 8:
            what = f"truncated: the header needs {length:,} bytes, the file has {size - 8:,}"
            raise InputError(what, where=path, hint=again)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [row["data_offsets"][1] for name, row in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise InputError("corrupt safetensors header", where=path, hint=again) from None
    need = 8 + length + max(ends, default=0)
    if need != size:
        word = "truncated" if need > size else "corrupt"
        raise InputError(f"{word}: the header promises {need:,} bytes, the file has {size:,}", where=path, hint=again)
    return header


def check_config(config: Mapping[str, Any], where: object, *, trust_remote_code: bool, any_kind: bool = False) -> None:
    """Refuse what lamina can't take: remote code unasked, quantised weights, and unless `any_kind` will do, models that
    are no causal LM.
    """
    remote = config.get("auto_map") or {}
    if remote and not trust_remote_code:
        raise InputError(
            "this checkpoint brings its own Python code (auto_map in config.json)",
            where=where,
            hint="read the code, then pass --trust-remote-code (trust_remote_code=True)",
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "") if isinstance(quantised, Mapping) else ""
        what = f"quantised weights ({method or 'quantization_config in config.json'})"
        raise UnsupportedError(what, where=where, hint="give the full-precision checkpoint, or a GGUF file")
    if "AutoModelForCausalLM" not in remote and not any_kind:
        _check_causal(config, where)


def _check_causal(config: Mapping[str, Any], where: object) -> None:
    """One clear line for encoders, encoder-decoders and unknown kinds of model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.get("model_type")
    if not kind:
        raise InputError("no model_type in config.json", where=where, hint="is this a Hugging Face checkpoint?")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(f"transformers does not know the model type {kind!r}", where=where)
    architectures = [str(a) for a in config.get("architectures") or ()]
    named = ", ".join(architectures) or kind
    decoder = any(a.endswith("ForCausalLM") for a in architectures) or bool(config.get("is_decoder"))
    if config.get("is_encoder_decoder") and not decoder:
        raise UnsupportedError(f"an encoder-decoder ({named}) where a causal LM is needed", where=where)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not decoder and (kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or not causal):
        raise UnsupportedError(f"an encoder ({named}) where a causal LM is needed", where=where)
    heads = [a for a in architectures if a.endswith(("Classification", "QuestionAnswering", "MultipleChoice"))]
    if heads:
        raise UnsupportedError(f"{heads[0]} where a causal LM is needed", where=where)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder brings a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
