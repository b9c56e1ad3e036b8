"""Torch-Pruning: a quarter of every MLP's neurons, by Taylor importance on calibration text."""

from __future__ import annotations

import torch_pruning as tp
from common import given, opened, tokens, told

ARGS = given()


def work() -> None:
    """Gradients of the loss, then its pruner over the gate and up projections."""
    model, ids = opened(ARGS), tokens(ARGS)
    model.float()
    for row in ids[:, :256].split(1):
        model(row, labels=row).loss.backward()
    roots = {layer.mlp.gate_proj: 0.25 for layer in model.model.layers}
    others = [m for m in model.modules() if type(m).__name__ == "Linear" and m not in roots]
    kept = [m for m in others if m.out_features != model.config.intermediate_size]
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs={"input_ids": ids[:1, :32]},
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=roots,
        ignored_layers=[m for m in kept if m.in_features != model.config.intermediate_size],
        root_module_types=[type(model.lm_head)],
        output_transform=lambda out: out.logits,
    )
    pruner.step()
    model.zero_grad()
    widths = {layer.mlp.gate_proj.out_features for layer in model.model.layers}
    assert len(widths) == 1
    model.config.intermediate_size = widths.pop()
    model.bfloat16().save_pretrained(ARGS.out)


told(work)
