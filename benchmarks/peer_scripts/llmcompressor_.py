"""llm-compressor: SparseGPT masks, and GPTQ to 4 bits in groups of 64."""

from __future__ import annotations

from common import given, opened, tokens, told
from datasets import Dataset
from llmcompressor import oneshot

ARGS = given()


def recipe() -> object:
    """The modifier of the task."""
    if ARGS.task == "gptq":
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.quantization import GPTQModifier

        weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    try:
        from llmcompressor.modifiers.pruning import SparseGPTModifier
    except ImportError:
        from llmcompressor.modifiers.obcq import SparseGPTModifier

    pattern = "2:4" if ARGS.task == "sparsegpt-2:4" else "0:0"
    return SparseGPTModifier(sparsity=0.5, mask_structure=pattern, targets=["Linear"], ignore=["re:.*lm_head"])


def work() -> None:
    """One `oneshot` over the calibration tokens."""
    model = opened(ARGS)
    rows = [{"input_ids": r.tolist(), "attention_mask": [1] * len(r)} for r in tokens(ARGS)]
    data = Dataset.from_list(rows)
    oneshot(model=model, dataset=data, recipe=recipe(), num_calibration_samples=len(rows), max_seq_length=512)
    model.save_pretrained(ARGS.out, save_compressed=ARGS.task == "gptq")


told(work)
