"""Models, from wherever they are: a folder, a hub id, a GGUF file, a name of the shelf, a module in memory."""

from __future__ import annotations

import contextlib
import errno
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lamina.core.errors import InputError, LaminaError, did_you_mean
from lamina.core.files import fingerprint
from lamina.lab.checkpoint import check_config, has_tokenizer, read_config, weight_files
from lamina.lab.shelf import find, shelf

Origin = Literal["folder", "hub", "gguf", "memory"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""How the system says that nothing more can be written."""
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "spiece.model", "*.txt"]


@dataclass
class Loaded:
    """A model ready for the lab. `path` is the folder it was read from (None for one in memory).

    For a GGUF `path` is the file; `tokenizer` is None where the source brings none.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    fingerprint: str
    source: Origin
    path: Path | None


def load(
    spec: str | Path | nn.Module,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    streamed: bool = False,
    any_kind: bool = False,
) -> Loaded:
    """Load a causal language model and its tokenizer, in evaluation mode; with `any_kind` also models of other kinds.

    `streamed`: a folder's weights stay on disk, and each block's are read when it runs.

    `dtype` is `auto` (bfloat16 where the device computes it fast, else float32), `float32` or `bfloat16`;
    a module in memory keeps its own. Raises InputError or UnsupportedError, one line, for anything amiss;
    a checkpoint with missing, unexpected or mismatched weights is refused, never filled at random.
    """
    if streamed and (isinstance(spec, nn.Module) or resolve(str(spec))[0] == "gguf"):
        hint = "give a Hugging Face folder of safetensors"
        where = type(spec).__name__ if isinstance(spec, nn.Module) else spec
        raise InputError("only a checkpoint folder can be streamed", where=where, hint=hint)
    if isinstance(spec, nn.Module):
        return _memory(spec, _tokenizer(tokenizer))
    kind = choose_dtype(dtype, device)
    origin, path, name = resolve(str(spec))
    if origin == "gguf":
        from lamina.lab.gguf_cache import load_gguf

        sha256 = shelf()[str(spec)].sha256 if str(spec) in shelf() else None
        model, found, mark = load_gguf(path, dtype=kind, sha256=sha256)
    else:
        if origin == "hub":
            path = download(str(spec), code=trust_remote_code)
        given: dict[str, Any] = {"dtype": kind, "trust_remote_code": trust_remote_code, "any_kind": any_kind}
        model, mark = (streamed_folder if streamed else load_folder)(path, **given)
        found = load_tokenizer(path, trust_remote_code=trust_remote_code) if tokenizer is None else None
    chosen = _tokenizer(tokenizer) if tokenizer is not None else found
    with _clear(f"can't use the device {device!r}"):
        model = model.to(device)
    return Loaded(model.eval(), chosen, name, mark, origin, path)


def resolve(spec: str) -> tuple[Origin, Path, str]:
    """What a name, path or id points at: its origin, where it lies, and the model's name.

    A name of the shelf wins over a folder of the same name; write `./name` for the folder.
    """
    if spec in shelf():
        return "gguf", find(spec), shelf()[spec].title
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return "folder", path, path.resolve().name
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return "gguf", path, path.stem
        hint = (
            "give the folder that holds it"
            if path.suffix in (".safetensors", ".json")
            else ("a model is a Hugging Face folder, a hub id, a .gguf file or one of: " + ", ".join(sorted(shelf())))
        )
        raise InputError("this file is not a model", where=path, hint=hint)
    if path.suffix.lower() == ".gguf" or spec.startswith((".", "/", "~")) or not HUB_ID.fullmatch(spec):
        raise InputError("no such file or folder", where=spec or "''", hint=did_you_mean(spec, shelf()))
    return "hub", path, spec


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """The torch dtype of `auto`, `float32` or `bfloat16` on a device."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype in known:
        return known[dtype]
    if dtype != "auto":
        raise InputError(f"unknown dtype {dtype!r}", hint=did_you_mean(dtype, ["auto", *known]))
    if device.startswith("cuda"):
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    else:
        fast = device == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    capabilities: Callable[[], dict[str, Any]] | None = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(probe() for name in probes if (probe := getattr(torch.cpu, name, None)))


def load_folder(
    path: Path, *, dtype: torch.dtype, trust_remote_code: bool = False, any_kind: bool = False
) -> tuple[nn.Module, str]:
    """The model of a Hugging Face folder and its fingerprint, over config.json and the weights."""
    config = read_config(path)
    check_config(config, path, trust_remote_code=trust_remote_code, any_kind=any_kind)
    files = weight_files(path)
    kind = named_class(config) if any_kind else None
    model = load_weights(path, dtype=dtype, trust_remote_code=trust_remote_code, kind=kind)
    return model, fingerprint(path / "config.json", *files)


def streamed_folder(
    path: Path, *, dtype: torch.dtype, trust_remote_code: bool = False, any_kind: bool = False
) -> tuple[nn.Module, str]:
    """The same with the weights left on disk; the fingerprint is over config.json and the headers of the weights."""
    from lamina.lab.checkpoint import check_safetensors
    from lamina.lab.disk import open_streamed

    check_config(read_config(path), path, trust_remote_code=trust_remote_code, any_kind=any_kind)
    mark = fingerprint(path / "config.json", *(dict(check_safetensors(f)) for f in weight_files(path)))
    return open_streamed(path, dtype=dtype, trust_remote_code=trust_remote_code), mark


def named_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that a config names, where it names one; else the auto class for causal LMs."""
    import transformers

    named = [str(a) for a in config.get("architectures") or ()]
    found = next((c for a in named if (c := getattr(transformers, a, None)) is not None), None)
    return found if found is not None else transformers.AutoModelForCausalLM


def load_weights(
    path: Path, *, dtype: torch.dtype, trust_remote_code: bool = False, kind: Any = None, **extra: Any
) -> nn.Module:
    """`from_pretrained` of a class (None: `AutoModelForCausalLM`), strict: weights and model must agree key by key."""
    from transformers import AutoModelForCausalLM

    kind = kind or AutoModelForCausalLM
    code = {"trust_remote_code": trust_remote_code} if kind is AutoModelForCausalLM else {}
    where = path / extra.get("gguf_file", "")
    with quiet(), _clear("transformers can't load this checkpoint", where):
        loaded: Any = kind.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            **code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they come back in `info`, and are refused below
            **extra,
        )
    model, info = loaded
    for what, keys in (
        ("weights have another shape than the config says", [k[0] for k in info["mismatched_keys"]]),
        ("weights are missing from the checkpoint", info["missing_keys"]),
        ("weights of the checkpoint have no place in the model", info["unexpected_keys"]),
    ):
        if keys:
            first = ", ".join(sorted(keys)[:2]) + (", …" if len(keys) > 2 else "")
            hint = "config.json and weights belong to different models, or one of them is stale"
            raise InputError(f"{len(keys)} {what}: {first}", where=where, hint=hint)
    return model


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, or None where it has none."""
    if not has_tokenizer(path):
        return None
    from transformers import AutoTokenizer

    with quiet(), _clear("transformers can't load this tokenizer", path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)


def download(hub_id: str, *, code: bool = False) -> Path:
    """The folder of a hub model: safetensors, config and tokenizer, from the hub or its cache on disk."""
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(hub_id, allow_patterns=[*HUB_FILES, *(["*.py"] if code else [])])
    except Exception as error:
        errors = huggingface_hub.errors
        if isinstance(error, errors.GatedRepoError):
            why = "the hub asks for a licence to be accepted first"
        elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            why = "no such folder, shelf name or hub model"
        else:
            why = "no folder or shelf name, and the hub can't be reached"
        names = shelf()
        close = did_you_mean(hub_id.rsplit("/", maxsplit=1)[-1].lower(), names)
        near = f"{close} Or " if close.startswith("did you mean") else ""
        hint = f"{near}give a local folder, a .gguf file or one of: {', '.join(sorted(names))}"
        raise InputError(why, where=hub_id, hint=hint) from None
    return Path(found)


def module_fingerprint(model: nn.Module) -> str:
    """`sha256:…` over the state dict in name order: name, dtype, shape, bytes. Any device, same bytes, same mark."""
    parts: list[object] = [type(model).__name__]
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise InputError("this module holds no weights (meta device)", where=name)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts += [[name, str(tensor.dtype), list(tensor.shape)], fingerprint(raw.data)]
    return fingerprint(*parts)


def _memory(model: nn.Module, tokenizer: Any) -> Loaded:
    if not callable(getattr(model, "forward", None)) or not hasattr(model, "config"):
        raise InputError(f"{type(model).__name__} has no config; lamina takes transformers' causal LMs")
    return Loaded(model.eval(), tokenizer, type(model).__name__, module_fingerprint(model), "memory", None)


def _tokenizer(given: Any) -> Any:
    """A tokenizer as it is, or read from the folder that holds it."""
    if not isinstance(given, str | Path):
        return given
    path = Path(given)
    if not (path.is_dir() and has_tokenizer(path)):
        raise InputError("no tokenizer in this folder", where=path)
    return load_tokenizer(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers without warnings and progress bars, and its settings back as they were afterwards."""
    from transformers.utils import logging

    gguf_utils: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    level, bars, bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), gguf_utils.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf_utils.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        gguf_utils.tqdm = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _clear(what: str, where: object = "") -> Iterator[None]:
    """Whatever a library raises, as one line; lamina's own errors and lack of memory pass."""
    try:
        yield
    except (LaminaError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            place = error.filename2 or error.filename or where
            raise InputError(f"can't write: {error.strerror}", where=place, hint="make room") from error
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{what}: {detail[:300]}", where=where) from error
