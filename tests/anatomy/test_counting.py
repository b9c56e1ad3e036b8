"""Which field counts a stack is proved by building; copies of configs follow; what can't be said is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_kinds import LAYERS, WIDTH, drop, kind
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from lamina.anatomy import Anatomy
from lamina.anatomy.config import config_path, counts, owner_of, tree
from lamina.anatomy.counting import Change, change, twin
from lamina.anatomy.stacks import call
from lamina.anatomy.trial import ablated
from lamina.core.documents import Step
from lamina.core.errors import UnsupportedError
from lamina.rewrites.drop import Drop
from lamina.testing import zoo

COUNTS = {
    ("bert", "bert.encoder.layer"): ((), "num_hidden_layers"),
    ("vit", "layers"): ((), "num_hidden_layers"),
    ("t5", "encoder.block"): ((), "num_layers"),
    ("t5", "decoder.block"): ((), "num_decoder_layers"),
    ("bart", "model.encoder.layers"): ((), "encoder_layers"),
    ("bart", "model.decoder.layers"): ((), "decoder_layers"),
    ("llava", "model.vision_tower.encoder.layers"): (("vision_config",), "num_hidden_layers"),
    ("llava", "model.language_model.layers"): (("text_config",), "num_hidden_layers"),
}


@pytest.mark.parametrize(("name", "path"), COUNTS)
def test_the_field_that_counts_is_the_one_that_builds(name: str, path: str) -> None:
    model, _ = kind(name)
    before = copy.deepcopy(model.config.to_dict())
    found = change(model, path, [0, 2])
    where, key = COUNTS[name, path]
    assert found.path == where
    assert found.edits[key] == [LAYERS, 2]
    assert model.config.to_dict() == before, "the config itself is left alone"


def test_a_stage_s_depth_is_one_entry_of_a_list() -> None:
    model, _ = kind("swin")
    assert change(model, "encoder.layers.1.blocks", [0, 1]).edits["depths"] == [[1, 3], [1, 2]]


def test_a_module_s_own_copy_of_the_config_follows() -> None:
    model, _ = kind("t5")
    assert model.encoder.config is not model.config
    found = change(model, "decoder.block", [1])
    assert found.edits == {"num_decoder_layers": [LAYERS, 1]}
    assert found.copies["decoder"]["num_layers"] == [LAYERS, 1]
    assert "num_layers" not in found.copies.get("encoder", {})


def test_nothing_gone_changes_nothing() -> None:
    model, _ = kind("bart")
    assert change(model, "model.decoder.layers", [0, 1, 2]) == Change()


def test_a_stack_that_no_field_counts_is_refused() -> None:
    model, _ = kind("vit")
    model.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    with pytest.raises(UnsupportedError, match="more: no config counts this stack's layers"):
        change(model, "more", [0])


class Weighted(LlamaForCausalLM):
    """Ends with a sum of all layers' streams, each with its own weight, of which there are `more` than layers."""

    def __init__(self, config: Any, more: int = 0) -> None:
        super().__init__(config)
        self.mix = nn.Parameter(torch.linspace(0.5, 1.5, config.num_hidden_layers + more))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        states = self.model(input_ids, output_hidden_states=True, use_cache=False).hidden_states[1:]
        return {"logits": self.lm_head(sum(w * s for w, s in zip(self.mix, states, strict=False)))}


def weighted(more: int = 0) -> Weighted:
    return Weighted(LlamaConfig(num_hidden_layers=LAYERS, vocab_size=99, **WIDTH), more).eval()


def test_a_tensor_whose_size_follows_the_number_of_layers_otherwise_is_refused() -> None:
    class Longer(Weighted):
        def __init__(self, config: Any) -> None:
            super().__init__(config, more=1)

    model = Longer(LlamaConfig(num_hidden_layers=LAYERS, vocab_size=99, **WIDTH))
    with pytest.raises(UnsupportedError, match="mix has a size that depends on the number of layers"):
        change(model, "model.layers", [0])


def test_a_tensor_with_a_part_for_each_layer_is_cut() -> None:
    found = change(weighted(), "model.layers", [0, 2])
    assert found.sliced == {"mix": 0}
    assert found.edits == {"num_hidden_layers": [LAYERS, 2]}


def test_a_part_that_serves_when_its_layer_is_gone_is_not_the_layer_s() -> None:
    model = weighted()
    anatomy = Anatomy.of(model, {"input_ids": torch.arange(3, 10)[None]})
    (problem,) = Drop().check(Step(rewrite="drop", sites=("block.1",)), anatomy)
    assert (problem.where, problem.what) == ("model.layers", "mix has no part of its own for each layer")


def specimen(name: str) -> tuple[Any, Any]:
    made = zoo.build(name)
    return made.model, made.sample


@pytest.mark.parametrize("gone", [["block.1"], ["block.0", "block.2"], ["block.1.mlp"]])
def test_embeddings_for_each_layer_go_with_it(gone: list[str]) -> None:
    """Gemma's, which hold a part for each layer side by side."""
    model, sample = specimen("gemma4_text")
    anatomy = Anatomy.of(model, sample)
    width = model.model.embed_tokens_per_layer.embedding_dim
    with ablated(model, anatomy, gone):
        wanted = call(model, sample).logits
    drop(model, sample, *gone)
    assert torch.equal(call(model, sample).logits, wanted)
    blocks = sum(site.count(".") == 1 for site in gone)
    table = model.model.embed_tokens_per_layer
    assert table.embedding_dim == table.weight.shape[1] == width * (4 - blocks) // 4
    assert model.model.per_layer_model_projection.out_features == width * (4 - blocks) // 4


def test_a_part_for_each_layer_needs_whole_blocks_or_a_cache_entry_that_stays() -> None:
    model, sample = specimen("gemma4_text")
    anatomy = Anatomy.of(model, sample)
    (problem,) = Drop().check(Step(rewrite="drop", sites=("block.1.attention",)), anatomy)
    assert problem.what.endswith("has a part for each layer, cache entry or not")


def test_words_repeated_over_the_layers_are_spelt_out() -> None:
    model, _ = specimen("recurrent_gemma")
    found = change(model, "model.layers", [0, 2, 3])
    assert found.edits.pop("num_hidden_layers") == [4, 3]
    assert found.edits == {"block_types": [["recurrent", "attention"], ["recurrent", "recurrent", "attention"]]}


@pytest.mark.parametrize(("gone", "outputs"), [("block.1", [1, 3]), ("block.3", None)])
def test_a_backbone_s_outputs_stay_where_they_were(gone: str, outputs: list[int] | None) -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 4, "out_indices": [2, 4] if outputs else [3, 4]}
    model = Dinov2Model(
        Dinov2Config(image_size=16, patch_size=4, hidden_size=16, num_attention_heads=2, **sizes)
    ).eval()
    sample = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if outputs is None:
        (problem,) = Drop().check(Step(rewrite="drop", sites=(gone,)), Anatomy.of(model, sample))
        assert problem.what == "two of the outputs [3, 4] would be one"
        return
    drop(model, sample, gone)
    assert model.config.out_indices == outputs
    assert model.config.out_features == ["stage1", "stage3"]
    assert model.config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert twin(model) is not None


def test_a_rule_that_repeats_must_still_hold() -> None:
    """Jamba's layers take turns: two that follow one another may go, one may not."""
    model, sample = specimen("jamba")
    (problem,) = Drop().check(Step(rewrite="drop", sites=("block.1",)), Anatomy.of(model, sample))
    assert problem.what == "config field expert_layer_period = 2 repeats over the layers"
    drop(model, sample, "block.1", "block.2")
    assert model.config.num_hidden_layers == 2


def test_lists_of_layers_may_count_from_one() -> None:
    """Which it is, the modules that are built tell."""
    model, _ = specimen("qwen4_exp_text")
    holding = [n + 1 for n, layer in enumerate(model.model.layers) if layer.ple is not None]
    assert model.config.ple_layer_ids == holding
    kept = [n for n in range(4) if n + 1 not in holding[:1]]
    found = change(model, "model.layers", kept)
    wanted = [new + 1 for new, old in enumerate(kept) if old + 1 in holding]
    assert found.edits["ple_layer_ids"] == [holding, wanted]


def test_a_block_with_two_cache_entries_numbers_them_in_turn() -> None:
    model, sample = specimen("longcat_flash")
    (stack,) = Anatomy.of(model, sample).stacks
    assert stack.strides == {"self_attn.0.layer_idx": (2, 0), "self_attn.1.layer_idx": (2, 1)}
    drop(model, sample, "block.1")
    layers = model.model.layers
    assert [[a.layer_idx for a in layer.self_attn] for layer in layers] == [[0, 1], [2, 3], [4, 5]][: len(layers)]


def test_numbers_that_modules_took_from_the_config_follow() -> None:
    class Told(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.full_layers = config.full_layers
            self.model.layer_count = config.num_hidden_layers
            self.tap_indexes = tuple(config.tap_indexes)
            self.width = LAYERS

    given = {"full_layers": [2], "tap_indexes": [0, 2]}
    model = Told(LlamaConfig(num_hidden_layers=LAYERS, vocab_size=99, **given, **WIDTH))
    found = change(model, "model.layers", [0, 2])
    assert found.edits["full_layers"] == [[2], [1]]
    held = {"full_layers": [[2], [1]], "tap_indexes": [[0, 2], [0, 1]]}
    assert found.held == {"": held, "model": {"layer_count": [LAYERS, 2]}}


def test_a_list_that_is_as_long_by_chance_is_left_alone() -> None:
    class Wide(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.heads = nn.ModuleList(nn.Linear(w, 1) for w in config.head_widths)

    model = Wide(LlamaConfig(num_hidden_layers=LAYERS, head_widths=[1, 2, 3], vocab_size=99, **WIDTH))
    assert change(model, "model.layers", [0, 1]).edits == {"num_hidden_layers": [LAYERS, 2]}


def test_a_class_that_can_not_be_built_is_taken_by_name() -> None:
    class Closed(LlamaForCausalLM):
        def __init__(self, config: Any, key: int = 0) -> None:
            if not key:
                raise ValueError("no key")
            super().__init__(config)

    model = Closed(LlamaConfig(num_hidden_layers=LAYERS, vocab_size=99, **WIDTH), 1)
    assert twin(model) is None
    assert change(model, "model.layers", [0, 1]).edits == {"num_hidden_layers": [LAYERS, 2]}


def test_nested_configs_are_found_at_any_depth() -> None:
    model, _ = kind("llava")
    paths = [p for p, _ in tree(model.config)]
    assert {(), ("text_config",), ("vision_config",)} <= set(paths)
    assert config_path(model, model.config.vision_config) == ["vision_config"]
    inner, outer = copy.deepcopy(model.config), model.config
    outer.text_config.deeper = inner
    assert config_path(model, inner.vision_config) == ["text_config", "deeper", "vision_config"]
    with pytest.raises(UnsupportedError, match="not part of the model's config"):
        config_path(model, copy.deepcopy(inner))


def test_counts_name_the_standard_field_first() -> None:
    model, _ = kind("t5")
    assert counts(model.config, LAYERS)[0] == ("num_layers", None)
    assert ("num_decoder_layers", None) in counts(model.config, LAYERS)
    assert owner_of(model, "decoder.block", LAYERS) == "decoder"


def test_what_something_else_reads_may_not_go() -> None:
    """Here the model itself takes the first block's stream to the end."""

    class Skipping(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            states = self.model(input_ids, output_hidden_states=True, use_cache=False).hidden_states
            return {"logits": self.lm_head(states[-1] + states[1])}

    model = Skipping(LlamaConfig(num_hidden_layers=LAYERS, vocab_size=99, **WIDTH)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    with pytest.raises(UnsupportedError, match=r"block\.0: dropped, it gives an output .* off that of the model"):
        drop(model, {"input_ids": torch.arange(3, 10)[None]}, "block.0")


def test_an_output_that_becomes_nan_is_refused() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            logits = super().forward(input_ids, use_cache=False).logits
            return {"logits": logits if len(self.model.layers) == LAYERS else logits * float("nan")}

    model = Scaled(LlamaConfig(num_hidden_layers=LAYERS, vocab_size=99, **WIDTH)).eval()
    with pytest.raises(UnsupportedError, match=r"block\.1: dropped, it gives an output nan"):
        drop(model, {"input_ids": torch.arange(3, 10)[None]}, "block.1")
