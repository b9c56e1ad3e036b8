"""NVIDIA Model-Optimizer: 2:4 masks by SparseGPT, and eight bits. Minitron's mode needs Megatron, and registers not."""

from __future__ import annotations

from common import given, opened, tokens, told

ARGS = given()


def work() -> None:
    """Its sparsify or quantize, then a plain save."""
    model, ids = opened(ARGS), tokens(ARGS)
    if ARGS.task == "sparsegpt-2:4":
        import modelopt.torch.sparsity as mts

        config = {
            "data_loader": [{"input_ids": r[None]} for r in ids],
            "collect_func": lambda batch: batch["input_ids"],
        }
        model = mts.sparsify(model, "sparsegpt", config=config)
        model = mts.export(model)
    else:
        import modelopt.torch.quantization as mtq

        model = mtq.quantize(model, mtq.INT8_WEIGHT_ONLY_CFG, forward_loop=lambda m: [m(r[None]) for r in ids])
        mtq.fold_weight(model)
    ARGS.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(ARGS.out)


told(work)
