"""GGUF for llama.cpp: `llama` where whole blocks are gone, `deci` (Nemotron-NAS) where sublayers are.

Facts of llama.cpp that this rests on (src/models/deci.cpp, load_hparams): a block with head_count 0 skips its
attention; one with feed_forward_length 0 is skipped whole, its attention too; head width and rotary dimensions
are read only where block 0 has heads; q and k are rotated in neighbouring pairs.

Maps that were rounded to the grid of a GGUF type are written in that type, to the last number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.errors import InputError
from lamina.core.registry import exporter
from lamina.exporters._problems import Problem

if TYPE_CHECKING:
    from torch import nn

    from lamina.core.documents import Receipt

DTYPES = ("f32", "f16", "bf16")


@exporter("gguf", None, status="stable")
@dataclass(frozen=True, kw_only=True)
class Gguf:
    """Write a GGUF file that stock llama.cpp runs: Llama-like causal LMs with blocks, attentions or MLPs gone."""

    dtype: str = "f32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    def check(
        self, receipts: Sequence[Receipt], model: nn.Module | None = None, tokenizer_source: Any = None
    ) -> list[Problem]:
        """Why llama.cpp can't run what these receipts made, and, where given, this model with this tokenizer.

        Empty where it can. Only the model itself can show that it is Llama-like, so an empty list for receipts
        alone says that the rewrites fit.
        """
        from lamina.core.errors import LaminaError
        from lamina.exporters._gguf_tensors import inspect
        from lamina.exporters._gguf_vocab import read_vocabulary

        found = [problem for receipt in receipts for problem in receipt_problems(receipt)]
        if model is not None:
            found += inspect(model)
        if tokenizer_source is not None:
            try:
                read_vocabulary(tokenizer_of(tokenizer_source))
            except LaminaError as error:
                found.append(Problem(error.where, error.what, error.hint))
        return found

    def export(self, model: nn.Module, run: Any, to: Path, /) -> list[Path]:
        """Write `to` (a .gguf file, or a folder for model.gguf) and give its path.

        `run` names the tokenizer: see `tokenizer_of`; by its `receipts`, if it has any, rounded maps are known. Raises
        UnsupportedError where the structure does not fit, or maps that were rounded have changed since, and
        CertificateError where the model computes something else than Llama does from the same tensors.
        """
        from lamina.exporters._gguf_certify import certify
        from lamina.exporters._gguf_tensors import extract, typed
        from lamina.exporters._gguf_write import write_gguf

        path = to if to.suffix == ".gguf" else to / "model.gguf"
        found = getattr(run, "receipts", ())
        weights = typed(extract(model), tuple(getattr(found, "receipts", found)))
        certify(model, weights)
        write_gguf(
            path,
            weights.config,
            weights.blocks,
            weights.embedding,
            weights.final_norm,
            weights.head,
            tokenizer_of(run),
            self.dtype,
            rope=weights.rope,
            name=str(getattr(run, "name", "")),
        )
        return [path]


def tokenizer_of(run: Any) -> Any:
    """The tokenizer's source: a path or a tokenizer as it is; of a loaded model its GGUF file, else its tokenizer."""
    if isinstance(run, str | Path) or hasattr(run, "backend_tokenizer"):
        return run
    if getattr(run, "source", None) == "gguf" and getattr(run, "path", None) is not None:
        return run.path
    if getattr(run, "tokenizer", None) is not None:
        return run.tokenizer
    raise InputError("no tokenizer to write into the GGUF file", where=type(run).__name__)


def receipt_problems(receipt: Receipt) -> list[Problem]:
    """Why GGUF's `llama` and `deci` can't hold what this receipt's rewrite makes; empty where they can."""
    from lamina.anatomy.families import llama_gguf as family

    if receipt.rewrite not in family.REWRITES:
        where = ", ".join(receipt.sites)
        return [Problem(where, f"no rule says whether GGUF holds what {receipt.rewrite!r} makes")]
    if reason := family.REWRITES[receipt.rewrite]:
        return [Problem(", ".join(receipt.sites), f"{receipt.rewrite}: {reason}")]
    return [
        Problem(site, family.KINDS[part]) for site in receipt.sites for part in site.split(".") if part in family.KINDS
    ]
