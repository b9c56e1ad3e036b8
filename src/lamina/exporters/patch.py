"""A patch: receipts and the tensors that they don't explain, by which anyone makes the thinned model from the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import FORMAT, Budget, Document, Receipts
from lamina.core.errors import InputError, LaminaError
from lamina.core.files import atomic, fingerprint, to_json
from lamina.core.registry import exporter
from lamina.exporters._problems import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.core.documents import Receipt

FILE = "patch.json"
TENSORS = "changed.safetensors"


@dataclass(frozen=True, kw_only=True)
class PatchFile(Document):
    """`patch.json`: what was done, and fingerprints of all tensors before and after, and of the file of tensors.

    `dtype` is the type in which the base is to be loaded: the fingerprints are of numbers in it.
    """

    lamina: int = field(default=FORMAT, metadata={"always": True})
    dtype: str
    before: str
    after: str
    tensors: str
    changed: int = field(metadata={"always": True})
    done: Receipts = field(metadata={"always": True})
    budget: Budget | None = None


@exporter("patch")
@dataclass(frozen=True, kw_only=True)
class Patch:
    """Write what `lamina apply BASE PATCH` makes the thinned model of: receipts, and only the tensors that changed."""

    tells: ClassVar[bool] = False
    """Whether `check` tells more than that the structure can be rebuilt."""

    def check(self, receipts: Sequence[Receipt], model: nn.Module | None = None) -> list[Problem]:
        """What can't be rebuilt."""
        from lamina.exporters.hf import HuggingFace

        return HuggingFace().check(receipts)

    def export(self, model: nn.Module, run: Any, to: Path, /) -> list[Path]:
        """Write the folder `to` and give its files.

        `run` has `dense`, the base as a module, `receipts` (a sequence, or the document), and may have `name` and
        `budget`. Raises InputError without the base.
        """
        from lamina.lab.load import module_fingerprint

        dense = getattr(run, "dense", None)
        if dense is None:
            raise InputError("a patch is made from the base, and the run does not give it", where=type(run).__name__)
        found = getattr(run, "receipts", ())
        receipts = tuple(getattr(found, "receipts", found))
        for problem in self.check(receipts):
            raise problem.error()
        to = Path(to)
        with atomic(to) as draft:
            draft.mkdir()
            rest = changed(dense, model, receipts)
            _save(rest, draft / TENSORS)
            data = PatchFile(
                dtype=str(next(dense.parameters()).dtype).removeprefix("torch."),
                before=mark_of(dense),
                after=mark_of(model),
                tensors=fingerprint(draft / TENSORS),
                changed=len(rest),
                done=found if isinstance(found, Receipts) else _document(run, receipts, module_fingerprint(dense)),
                budget=getattr(run, "budget", None),
            )
            (draft / FILE).write_text(to_json(data.to_data()), encoding="utf-8")
        return sorted(p for p in to.rglob("*") if p.is_file())


def _document(run: Any, receipts: tuple[Receipt, ...], mark: str) -> Receipts:
    from lamina.core.documents import ModelRef

    return Receipts(model=ModelRef(name=str(getattr(run, "name", "")), fingerprint=mark), plan="", receipts=receipts)


def changed(dense: nn.Module, model: nn.Module, receipts: Sequence[Receipt]) -> dict[str, Tensor]:
    """Name → those tensors of the thinned model that the base does not have after the receipts' structure steps."""
    import copy

    import torch

    with torch.random.fork_rng(devices=[]):
        start = structured(copy.deepcopy(dense), receipts).state_dict()
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        held, there = tensor.detach().cpu(), start.get(name)
        if there is None or there.dtype != held.dtype or not torch.equal(there.cpu(), held):
            found[name] = held.contiguous().clone()
    return found


def structured(model: Any, receipts: Sequence[Receipt]) -> Any:
    """A model of the dense structure after the receipts' steps, in place; what is new in it has chance numbers."""
    from lamina.core.documents import plain
    from lamina.rewrites.structure import replay

    return replay(model, [plain(step) for receipt in receipts for step in receipt.structure.get("steps", ())])


def mark_of(model: nn.Module) -> str:
    """`sha256:…` over all tensors of the state dict: name, type, shape, bytes; the class's name is left out."""
    import torch

    parts: list[object] = []
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts += [[name, str(tensor.dtype), list(tensor.shape)], raw.data]
    return fingerprint(*parts)


def read(folder: Path) -> PatchFile:
    """The patch of a folder. Raises InputError where there is none, or its tensors are not those that were written."""
    if not (folder / FILE).is_file():
        raise InputError(f"this is no patch: it has no {FILE}", where=folder, hint="lamina export RUN --format patch")
    found = PatchFile.load(folder / FILE)
    if not (folder / TENSORS).is_file():
        raise InputError(f"the patch has lost {TENSORS}", where=folder, hint="copy the whole folder again")
    if fingerprint(folder / TENSORS) != found.tensors:
        raise InputError("cut off or changed since it was written", where=folder / TENSORS, hint="copy it again")
    return found


def applied(base: nn.Module, patch: PatchFile, folder: Path, where: object) -> Any:
    """The thinned model, made of the base in place. Raises InputError for another base or another result.

    `where` names the base in messages.
    """
    from safetensors.torch import load_file

    if mark_of(base) != patch.before:
        hint = "the very revision is needed; see `done.model` in patch.json"
        raise InputError(f"not the base that this patch was made for: {patch.done.model.name}", where=where, hint=hint)
    tensors = load_file(folder / TENSORS)
    try:
        model = structured(base, patch.done.receipts)
        _fill(model, tensors)
    except LaminaError:
        raise
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the receipts don't fit the base: {line[:200]}", where=folder / FILE) from error
    if mark_of(model) != patch.after:
        raise InputError("what comes out is not what the patch says", where=folder / FILE, hint="copy it again")
    return model


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the numbers in, in their own type; what is shared stays shared."""
    state = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if name not in state:
            raise KeyError(f"{name} has no place in the result")
        if state[name].dtype != tensor.dtype:
            state[name].data = state[name].data.to(tensor.dtype)
    model.load_state_dict(dict(tensors), strict=False)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except Exception as error:
        if type(error).__name__ not in ("SafetensorError", "OSError"):
            raise
        raise InputError(f"can't write: {error}", where=path) from error
