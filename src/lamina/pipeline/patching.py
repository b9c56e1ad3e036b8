"""A patch applied to its base, by anyone: fingerprints before and after, then the reload contract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.files import atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ROWS, TOKENS = 2, 32
"""Of the random token ids on which the contract is kept."""


def apply_patch(
    base: str,
    patch: Path,
    to: Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write the thinned checkpoint that the patch makes of `base` (a folder, a hub id, …) to the folder `to`.

    Gives its files. Raises InputError for another base, a patch that was cut off or changed, a folder that holds
    things, and ReloadError where the checkpoint does not behave as the model in memory; nothing is written then.
    """
    from lamina.evaluators.reload import contract
    from lamina.exporters.hf import save_checkpoint
    from lamina.exporters.patch import applied, read
    from lamina.lab.load import load
    from lamina.pipeline.exporting import summary

    to = Path(to)
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise InputError("there is something here already", where=to, hint="choose a new folder")
    file = read(Path(patch))
    if file.dtype not in ("float32", "bfloat16"):
        raise UnsupportedError(f"the base can't be loaded in {file.dtype}", where=patch)
    say(f"loading {base}")
    found = load(base, dtype=file.dtype, device=device, trust_remote_code=trust_remote_code)
    say("applying the patch")
    model = applied(found.model, file, Path(patch), base)
    about: dict[str, Any] = {"name": file.done.model.name, "budget": file.budget, "healed": summary(file.done.healed)}
    with atomic(to) as draft:
        save_checkpoint(model, file.done.receipts, found.tokenizer, draft, **about)
        say("checking that the checkpoint reloads in a fresh process")
        contract(draft, model, _ids(model))
    return sorted(p for p in to.rglob("*") if p.is_file())


def _ids(model: Any) -> Tensor:
    """Token ids [rows, tokens], the same each time."""
    import torch

    rows = int(model.get_input_embeddings().weight.shape[0])
    return torch.randint(rows, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
