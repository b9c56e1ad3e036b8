"""GGUF files: checked, dequantised once by transformers, and kept as a Hugging Face folder in a cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.core.errors import InputError, LaminaError
from lamina.core.files import atomic
from lamina.lab.gguf_header import check_gguf

LAYOUT = 1
"""Raised when what is cached changes; older entries are then made anew."""
MANIFEST = "lamina.json"
log = logging.getLogger("lamina")


def cache_folder() -> Path:
    """Where converted models lie: $LAMINA_CACHE, or lamina/ in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("LAMINA_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(base) / "lamina").expanduser() / "gguf"


def load_gguf(path: Path, *, dtype: torch.dtype, sha256: str | None = None) -> tuple[nn.Module, Any, str]:
    """Model, tokenizer and fingerprint (the file's own sha256) of a GGUF file.

    The first load dequantises to float32 and fills the cache; a damaged entry is made anew. `sha256`, where
    given, is what the file must have.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 is not None and digest != sha256:
        raise InputError("not the file that was expected (sha256 differs)", where=path, hint="install it again")
    folder = cache_folder() / digest[:16]
    found = _cached(folder, digest, dtype)
    if found is None:
        check_gguf(path)
        converted = _convert(path)
        _keep(folder, digest, *converted)
        found = _cached(folder, digest, dtype) or _cast(*converted, dtype)
    model, tokenizer = found
    return model, tokenizer, f"sha256:{digest}"


def _convert(path: Path) -> tuple[Any, Any]:
    """Model (float32, as if never quantised) and tokenizer, by transformers."""
    from lamina.lab.load import load_weights

    with _parsed_once():
        model: Any = load_weights(path.parent, dtype=torch.float32, gguf_file=path.name)
        tokenizer = _tokenizer(path)
    model.is_quantized = False
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model, tokenizer


def _cast(model: Any, tokenizer: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Parameters in `dtype`; buffers (rotary frequencies) stay in float32, as when loaded in `dtype`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, tokenizer


def _tokenizer(path: Path) -> Any:
    """The tokenizer that stands in a GGUF, by transformers."""
    from transformers import AutoTokenizer

    from lamina.lab.load import quiet

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"transformers can't convert the tokenizer of this GGUF: {detail[:200]}"
        raise InputError(what, where=path) from error


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse the GGUF and build the table of tensor names once.

    It would do so for config, weights, tokenizer and every submodule anew. `gguf` is as it was afterwards.
    """
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(reader), functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def _cached(folder: Path, digest: str, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """What the cache holds, if it is whole and made by this transformers; None otherwise."""
    from lamina.lab.load import load_tokenizer, load_weights

    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest != _manifest(folder, digest):
            log.info("the cached %s is damaged or outdated; converting again", folder.name)
            return None
        return load_weights(folder, dtype=dtype), load_tokenizer(folder)
    except (OSError, ValueError, LaminaError):
        return None


def _keep(folder: Path, digest: str, model: Any, tokenizer: Any) -> None:
    """Save model and tokenizer in the cache; what goes wrong (a full disk) is logged and nothing more."""
    from lamina.lab.load import quiet

    need = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        if shutil.disk_usage(folder.parent).free < 1.1 * need:
            log.warning("not cached: %s has no room for %.0f MB", folder.parent, need / 1e6)
            return
        with atomic(folder) as draft, quiet():
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            (draft / MANIFEST).write_text(json.dumps(_manifest(draft, digest), indent=1), encoding="utf-8")
    except Exception as error:  # the disk's errors come from several libraries, under several names
        log.warning("the converted model could not be cached: %s", str(error).splitlines()[0] if str(error) else error)


def _sweep(cache: Path) -> None:
    """Remove what killed processes left; what is younger than an hour may be another process at work."""
    for left in cache.glob(".*.tmp"):
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)


def _manifest(folder: Path, digest: str) -> dict[str, Any]:
    """What a whole entry is: the GGUF it was made from, by which transformers, and each file's sha256."""
    import transformers

    files: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"layout": LAYOUT, "gguf": digest, "transformers": transformers.__version__, "files": files}
