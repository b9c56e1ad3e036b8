"""Hugging Face checkpoints: a plain one where whole blocks are gone, one with a generic shim file otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lamina.core.documents import Receipt, plain
from lamina.core.errors import InputError, LaminaError, UnsupportedError
from lamina.core.files import atomic, to_json
from lamina.core.registry import exporter
from lamina.exporters._hf_card import Facts, card
from lamina.exporters._problems import Problem

if TYPE_CHECKING:
    from torch import nn

SHARD = "5GB"
"""Larger checkpoints are split into files of at most this size, with an index, as transformers does."""
KINDS = frozenset({"drop", "swap", "narrow", "share", "attend", "layout", "resize"})
"""The kinds of structure steps that the shim file can replay."""


@exporter("hf", status="stable")
@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """Write a folder that `from_pretrained` loads; stock classes where only whole blocks are gone."""

    shard: str = SHARD

    def check(self, receipts: Sequence[Receipt], /) -> list[Problem]:
        """Why transformers could not load what these receipts made; empty where it can."""
        return [
            Problem(", ".join(receipt.sites), f"the loader can't replay {step.get('kind')!r}", "update lamina")
            for receipt in receipts
            for step in receipt.structure.get("steps", ())
            if step.get("kind") not in KINDS
        ]

    def export(self, model: nn.Module, run: Any, to: Path, /) -> list[Path]:
        """Write the folder `to` and give its files.

        `run` names what was done, by attributes: `receipts` (a sequence, or the receipts document), and where there
        are any `tokenizer`, `name` (of the dense model), `budget` (or `plan` that has one).
        """
        found = getattr(run, "receipts", None)
        if found is None:
            raise InputError("no receipts: what was done to the model is not known", where=type(run).__name__)
        receipts = tuple(getattr(found, "receipts", found))
        for problem in self.check(receipts):
            raise problem.error()
        budget = getattr(run, "budget", None) or getattr(getattr(run, "plan", None), "budget", None)
        name = str(getattr(run, "name", "") or getattr(getattr(found, "model", None), "name", ""))
        healed = getattr(found, "healed", None) or {}
        tokenizer = getattr(run, "tokenizer", None)
        return save_checkpoint(
            model, receipts, tokenizer, to, name=name, budget=budget, healed=healed, shard=self.shard
        )


def form(model: nn.Module, receipts: Sequence[Receipt]) -> Literal["stock", "shim"]:
    """Whether the model's own class can load the checkpoint, or the shim file is needed.

    The class itself will do where whole blocks are gone and it builds, from the config as it is now, the same layers.
    """
    steps = [step for receipt in receipts for step in receipt.structure.get("steps", ())]
    cut = any(step.get("branches") or step["kind"] in ("swap", "share", "attend", "layout") for step in steps)
    stands = any(type(m).__name__ in ("Gone", "Group") for m in model.modules())
    return "shim" if cut or stands or _earlier(model) or (steps and not _rebuilt(model, steps)) else "stock"


def _rebuilt(model: nn.Module, steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the class builds the same from the model's config: tensors' shapes, and the plain numbers of layers.

    Where it can't be built here, the config is taken at its word.
    """
    from lamina.anatomy.counting import shapes, twin

    other = twin(model)
    if other is None:
        return True
    stacks = tuple(f"{step['stack']}." if "stack" in step else "" for step in steps)
    layers = {path: module for path, module in model.named_modules() if path.startswith(stacks)}
    others = dict(other.named_modules())
    return shapes(model) == shapes(other) and all(
        path in others and _numbers(module) == _numbers(others[path]) for path, module in layers.items()
    )


def _numbers(module: nn.Module) -> dict[str, Any]:
    """The plain numbers that a module holds."""
    found = {k: v for k, v in vars(module).items() if type(v) in (int, float, bool, str) and not k.startswith("_")}
    return {k: v for k, v in found.items() if k not in ("training", "gradient_checkpointing")}


def save_checkpoint(
    model: nn.Module,
    receipts: Sequence[Receipt],
    tokenizer: Any,
    to: Path,
    *,
    name: str = "",
    budget: Any = None,
    healed: Mapping[str, Any] | None = None,
    shard: str = SHARD,
) -> list[Path]:
    """Write model, tokenizer and model card to the folder `to`, whole or not at all; give its files in name order.

    A folder that is there already is replaced. Raises InputError where it can't be written and UnsupportedError
    where the model can't be saved.
    """
    from lamina.anatomy.config import config_of

    if not hasattr(model, "save_pretrained") or config_of(model) is None:
        raise UnsupportedError(f"{type(model).__name__} is no transformers model", hint="give a PreTrainedModel")
    kind = form(model, receipts)
    to = Path(to)
    with atomic(to) as draft:
        draft.mkdir()
        _weights(model, draft, to, max_shard_size=shard, save_original_format=kind == "stock")
        if kind == "shim":
            _shim(model, receipts, draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        loader = _loader(model, kind)
        facts = Facts(
            name, type(model).__name__, kind, tuple(receipts), budget, healed or {}, tokenizer is not None, loader
        )
        (draft / "README.md").write_text(card(facts), encoding="utf-8")
        settle(draft)
    return sorted(p for p in to.rglob("*") if p.is_file())


def _weights(model: Any, draft: Path, to: Path, **options: Any) -> None:
    """Config, generation config and safetensors, as `save_pretrained` writes them.

    The stock class takes its hub format back (experts apart, older names); behind the shim, names are those in memory,
    since transformers finds some of its conversions by the class's name.
    """
    from lamina.lab.load import quiet

    with quiet(), _as_it_was(model), _plain_generation(model) as generation:
        try:
            model.save_pretrained(draft, **options)
        except (LaminaError, MemoryError, OSError):
            raise
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            kind = InputError if type(error).__name__ == "SafetensorError" else UnsupportedError
            raise kind(f"can't write the weights: {line}", where=to) from error
        if generation is not None:
            (draft / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")


def _shim(model: Any, receipts: Sequence[Receipt], draft: Path) -> None:
    """The config that carries the receipts, and the one file that replays them."""
    from lamina.rewrites.structure import checkpoint_config, sources

    steps = [plain(step) for receipt in receipts for step in receipt.structure.get("steps", ())]
    data = checkpoint_config(model, steps, [plain(r) for r in receipts])
    if data["lamina"]["model_module"].startswith("transformers_modules"):
        hint = "drop whole blocks, or use a model that transformers itself has"
        raise UnsupportedError(f"{type(model).__name__} is remote code, which a shim can't build on", hint=hint)
    data["dtype"] = str(model.dtype).removeprefix("torch.")
    dropped = {"quantization_config", "torch_dtype", "_name_or_path"}
    data = {k: v for k, v in data.items() if k not in dropped}
    (draft / "config.json").write_text(to_json(data), encoding="utf-8")
    for name, text in sources().items():
        (draft / name).write_text(text, encoding="utf-8")


def _loader(model: Any, kind: str) -> str:
    """The name of the Auto class that loads the checkpoint; the model's own class where none knows it."""
    from lamina.rewrites.structure import auto_class

    default = type(model).__name__ if kind == "stock" else "AutoModel"
    return getattr(model, "_auto_class", None) or auto_class(type(model), default)


def _earlier(model: Any) -> dict[str, Any]:
    """What a model that was loaded from a thinned checkpoint already carries."""
    return dict(getattr(getattr(model, "config", None), "lamina", None) or {})


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Inside, the model saves as one that was never quantised; afterwards model and config are as they were."""
    config = model.config
    held = {k: config.__dict__[k] for k in ("architectures", "dtype", "quantization_config") if k in config.__dict__}
    marks = {k: model.__dict__[k] for k in ("hf_quantizer", "is_quantized") if k in model.__dict__}
    if held.get("quantization_config") is not None or marks.get("hf_quantizer") is not None:
        if not all(p.is_floating_point() for p in model.parameters()):
            raise UnsupportedError("the weights are quantised", hint="load them in full precision first")
        held_config = config.__dict__.pop("quantization_config", None)
        model.hf_quantizer, model.is_quantized = None, False
        if held_config is not None:
            held["quantization_config"] = held_config
    try:
        yield
    finally:
        for key in ("architectures", "dtype"):
            config.__dict__.pop(key, None)
        config.__dict__.update(held)
        for key in ("hf_quantizer", "is_quantized"):
            model.__dict__.pop(key, None)
        model.__dict__.update(marks)


@contextmanager
def _plain_generation(model: Any) -> Iterator[Any]:
    """Gives the generation config where transformers would refuse to save it as it is, else None."""
    held = getattr(model, "generation_config", None)
    if held is None:
        yield None
        return
    try:
        held.validate(strict=True)
    except ValueError:
        model.generation_config = type(held)()
        try:
            yield held
        finally:
            model.generation_config = held
    else:
        yield None


def settle(folder: Path) -> None:
    """One access mode for all files (safetensors are written owner-only), that of the README, and all on the disk."""
    mode = (folder / "README.md").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
