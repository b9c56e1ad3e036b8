"""The ladder: which engine loads a thinned checkpoint, why not where it does not, and whether it was run here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lamina.core.documents import FORMAT, Document
from lamina.exporters._problems import Problem

if TYPE_CHECKING:
    from torch import nn

    from lamina.core.documents import Receipt

FILE = "ladder.json"
TARGETS = {
    "transformers": "transformers, stock class",
    "shim": "transformers, with the shim file",
    "vllm": "vLLM, by DeciLM",
    "tensorrt-llm": "TensorRT-LLM, by DeciLM",
    "llama.cpp": "llama.cpp, by GGUF",
    "ollama": "Ollama, by GGUF",
    "onnxruntime": "ONNX Runtime",
}
"""What is asked → how it is called, in the order in which they are shown."""
FORMATS = {
    "transformers": "hf", "shim": "hf", "vllm": "deci", "tensorrt-llm": "deci", "llama.cpp": "gguf", "ollama": "gguf",
    "onnxruntime": "onnx",
}  # fmt: skip
"""Target → the exporter that writes for it."""


@dataclass(frozen=True, kw_only=True)
class Rung(Document):
    """One target: whether it loads what the run made, why in one line, and the nearest plan that it would load.

    `ran`: whether the target itself ran a file of this run on this machine, and gave the model's own numbers.
    """

    target: str
    ok: bool = field(metadata={"always": True})
    why: str
    nearest: str = ""
    ran: bool = field(default=False, metadata={"always": True})


@dataclass(frozen=True, kw_only=True)
class Ladder(Document):
    """`ladder.json`: the rungs, and the fingerprint of the receipts that they are of."""

    lamina: int = field(default=FORMAT, metadata={"always": True})
    receipts: str
    rungs: tuple[Rung, ...] = field(metadata={"always": True})

    def with_rung(self, rung: Rung) -> Ladder:
        """With this rung in the place of the target's other one."""
        rest = {r.target: r for r in self.rungs} | {rung.target: rung}
        return dataclasses.replace(self, rungs=tuple(rest[t] for t in TARGETS if t in rest))


def ladder(
    receipts: Sequence[Receipt], model: nn.Module, tokenizer_source: Any, ran: Mapping[str, bool] | None = None
) -> list[Rung]:
    """A rung for each target, without nearest plans. Runs the model on a dozen tokens, to see whether it is a Llama."""
    found: list[Rung] = []
    odd = _arithmetic(model, receipts)
    for target in TARGETS:
        problems, why = _asked(target, receipts, model, tokenizer_source, odd)
        first = problems[0] if problems else None
        line = why if first is None else f"{first.where + ': ' if first.where else ''}{first.what}"
        found.append(Rung(target=target, ok=first is None, why=line, ran=bool((ran or {}).get(target))))
    return found


def _asked(
    target: str, receipts: Sequence[Receipt], model: nn.Module, tokenizer_source: Any, odd: Sequence[Problem]
) -> tuple[list[Problem], str]:
    """What stands in the way of one target; and where nothing does, how it goes."""
    from lamina.exporters.deci import Deci
    from lamina.exporters.gguf import Gguf
    from lamina.exporters.hf import HuggingFace, form

    if target in ("transformers", "shim"):
        stock = form(model, receipts) == "stock"
        if target == "transformers":
            return ([] if stock else [_unlike(receipts)]), "a plain checkpoint"
        shim = "trust_remote_code=True; modeling_lamina.py travels with the weights"
        return HuggingFace().check(receipts), "not needed: the stock class loads it" if stock else shim
    if target in ("vllm", "tensorrt-llm"):
        found = Deci(engine=target).check(receipts, model) or list(odd)
        return found, "a DeciLM folder; --trust-remote-code, for the config alone"
    if target in ("llama.cpp", "ollama"):
        found = Gguf().check(receipts, model, tokenizer_source) or list(odd)
        kind = "" if found else _architecture(model)
        return found, f"GGUF of architecture `{kind}`" + (", with a Modelfile" if target == "ollama" else "")
    from lamina.exporters.onnx import Onnx

    return Onnx().check(receipts, model), "logits of whole texts, without a cache; compared before it is published"


def _unlike(receipts: Sequence[Receipt]) -> Problem:
    """The first thing by which the checkpoint is no longer its class's."""
    for receipt in receipts:
        for step in receipt.structure.get("steps", ()):
            parts = [s for s in receipt.sites if "." in s.partition("block.")[2]]
            if step.get("branches"):
                return Problem(parts[0] if parts else receipt.sites[0], "the class has no block without this sublayer")
            if step["kind"] != "drop":
                return Problem(receipt.sites[0], f"the class can't build what {receipt.rewrite} makes")
    return Problem("", "the class does not build these layers from its config")


def _arithmetic(model: nn.Module, receipts: Sequence[Receipt]) -> list[Problem]:
    """What is wrong if plain Llama does not give the model's logits; nothing where the tensors don't fit at all."""
    from lamina.core.errors import LaminaError
    from lamina.exporters._gguf_certify import certify
    from lamina.exporters._gguf_tensors import extract, inspect, typed

    if inspect(model):
        return []
    try:
        certify(model, typed(extract(model), receipts))
    except LaminaError as error:
        return [Problem(error.where, error.what, error.hint)]
    return []


def _architecture(model: nn.Module) -> str:
    """The architecture of the GGUF file."""
    from lamina.exporters._gguf_tensors import extract, fill
    from lamina.exporters._gguf_write import layout_of

    weights = extract(model)
    return layout_of(fill(weights.blocks, weights.config.hidden_size, weights.head_dim), weights.head_dim).architecture


def lines(rungs: Sequence[Rung]) -> Iterator[tuple[str, str, str, str]]:
    """The cells of the table: target, yes or no, whether it ran here, why; and below that the nearest plan."""
    for rung in rungs:
        here = "ran here" if rung.ran else "not run here"
        near = f"\nnearest plan: {rung.nearest}" if rung.nearest else ""
        yield TARGETS[rung.target], "yes" if rung.ok else "no", here, rung.why + near
