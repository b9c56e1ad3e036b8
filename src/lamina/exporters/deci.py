"""DeciLM (Nemotron-NAS), which vLLM and TensorRT-LLM serve: Llama whose blocks may lack a sublayer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.errors import LaminaError, UnsupportedError
from lamina.core.files import atomic, to_json
from lamina.core.registry import exporter
from lamina.exporters._problems import Problem

if TYPE_CHECKING:
    from torch import nn

    from lamina.core.documents import Receipt
    from lamina.exporters._gguf_tensors import Weights

SHARD = "5GB"


@exporter("deci")
@dataclass(frozen=True, kw_only=True)
class Deci:
    """Write a DeciLM folder (Nemotron-NAS): Llama-like causal LMs with blocks, attentions or MLPs gone, for vLLM."""

    engine: str = "vllm"
    """Whose rules are held: `vllm` or `tensorrt-llm`."""

    def __post_init__(self) -> None:
        from lamina.anatomy.families.decilm import ENGINES

        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")

    def check(self, receipts: Sequence[Receipt], model: nn.Module | None = None) -> list[Problem]:
        """Why the engine can't load what these receipts made, and, where it is given, this model.

        Receipts alone show whether the rewrites fit; the model, whether it is Llama-like and its widths can be said.
        """
        from lamina.exporters._gguf_tensors import extract, inspect
        from lamina.exporters.gguf import receipt_problems

        found = [_reworded(p) for receipt in receipts for p in receipt_problems(receipt)]
        if model is None:
            return found
        found += [_reworded(p) for p in inspect(model)]
        if found:
            return found
        from lamina.exporters._deci_rules import problems

        try:
            return problems(_whole(extract(model)), self.engine)
        except LaminaError as error:
            return [Problem(error.where, error.what, error.hint)]

    def export(self, model: nn.Module, run: Any, to: Path, /) -> list[Path]:
        """Write the folder `to`: config, weights, the file of code, tokenizer, generation config; give its files.

        Raises UnsupportedError where the rules of the engine are not kept, and CertificateError where the model
        computes something else than Llama does from the same tensors.
        """
        from lamina.exporters._gguf_certify import certify
        from lamina.exporters._gguf_tensors import extract

        found = getattr(run, "receipts", ())
        for problem in self.check(tuple(getattr(found, "receipts", found)), model):
            raise problem.error()
        weights = _whole(extract(model))
        certify(model, weights)
        to = Path(to)
        with atomic(to) as draft:
            draft.mkdir()
            _write(draft, model, weights)
            tokenizer = getattr(run, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
        return sorted(p for p in to.rglob("*") if p.is_file())


def _whole(weights: Weights) -> Weights:
    """Without the blocks that have lost both sublayers: they do nothing."""
    import dataclasses

    return dataclasses.replace(weights, blocks=tuple(b for b in weights.blocks if (b.q, b.gate) != (None, None)))


def _reworded(problem: Problem) -> Problem:
    what = problem.what.replace("`llama` and `deci`", "DeciLM").replace("neither `llama` nor `deci`", "not DeciLM")
    return Problem(problem.where, what.replace("llama.cpp", "the engine").replace("GGUF", "DeciLM"), problem.hint)


def _write(folder: Path, model: Any, weights: Weights) -> None:
    from huggingface_hub import save_torch_state_dict

    from lamina.anatomy.families import decilm as family
    from lamina.exporters._deci_rules import disagreements

    data = _config(model, weights)
    state = _state(weights)
    for odd in disagreements(data, {name: tuple(t.shape) for name, t in state.items()}):
        raise odd.error()
    (folder / "config.json").write_text(to_json(data), encoding="utf-8")
    save_torch_state_dict(state, folder, max_shard_size=SHARD, metadata={"format": "pt"})
    code = Path(__file__).with_name("_deci_model.py").read_text(encoding="utf-8")
    (folder / family.FILE).write_text(code, encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")


def _state(weights: Weights) -> dict[str, Any]:
    """The tensors by the names that the loaders read."""
    from lamina.anatomy.families import decilm as family

    found = {family.EMBEDDING: weights.embedding, family.FINAL_NORM: weights.final_norm}
    if weights.head is not None:
        found[family.HEAD] = weights.head
    for number, block in enumerate(weights.blocks):
        for field, name in family.PARTS.items():
            if (tensor := getattr(block, field)) is not None:
                found[family.BLOCK.format(number, name)] = tensor
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}


COPIED = (
    "hidden_size", "rms_norm_eps", "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
"""Fields of the model's config that mean the same here."""


def _config(model: Any, weights: Weights) -> dict[str, Any]:
    """The data of config.json. The rotary embedding is told in the words of transformers 5 and in those before."""
    from lamina.anatomy.families import decilm as family
    from lamina.exporters._deci_rules import block_config
    from lamina.exporters._gguf_tensors import rope_base

    old, dim, blocks = model.config, weights.head_dim, weights.blocks
    base, kind = rope_base(old)
    heads = max(b.heads(dim) for b in blocks)
    if int(old.hidden_size) % heads:
        raise UnsupportedError(f"{heads} query heads do not divide the hidden size {old.hidden_size}", where="config")
    table = dict(getattr(old, "rope_parameters", None) or getattr(old, "rope_scaling", None) or {})
    scaling = {k: v for k, v in table.items() if k not in ("rope_theta", "type")} | {"rope_type": kind}
    dtype = str(weights.embedding.dtype).removeprefix("torch.")
    attends, feeds = [b for b in blocks if b.q is not None], [b for b in blocks if b.gate is not None]
    return {
        "architectures": [family.ARCHITECTURE],
        "model_type": family.MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{family.FILE[:-3]}.DeciLMConfig",
            "AutoModelForCausalLM": f"{family.FILE[:-3]}.DeciLMForCausalLM",
        },
        **{name: value for name in COPIED if (value := getattr(old, name, None)) is not None},
        "vocab_size": int(weights.embedding.shape[0]),
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads,
        "num_key_value_heads": max(b.kv_heads(dim) for b in attends),
        "head_dim": dim,
        "intermediate_size": max((b.width for b in feeds), default=family.MULTIPLE),
        "hidden_act": "silu",
        "attention_bias": any(b.o_bias is not None for b in attends),
        "qkv_bias": any(b.q_bias is not None for b in attends),
        "mlp_bias": any(b.gate_bias is not None for b in feeds),
        "tie_word_embeddings": weights.head is None,
        "rope_theta": base,
        "rope_scaling": None if kind == "default" else scaling,
        "rope_parameters": scaling | {"rope_theta": base},
        "block_configs": [block_config(b, dim, int(old.hidden_size)) for b in blocks],
        "dtype": dtype,
        "torch_dtype": dtype,
    }
