"""Which field counts a stack is proved by building; copies of configs follow; what can't be said is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tiny_kinds import LAYERS, WIDTH, kind
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lamina.anatomy.config import config_path, counts, owner_of, tree
from lamina.anatomy.counting import Change, change, twin
from lamina.core.errors import UnsupportedError

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


def test_a_tensor_as_wide_as_there_are_layers_is_refused() -> None:
    class Weighted(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.mix = nn.Parameter(self.lm_head.weight.new_ones(config.num_hidden_layers))

    model = Weighted(LlamaConfig(num_hidden_layers=LAYERS, vocab_size=99, **WIDTH))
    with pytest.raises(UnsupportedError, match="mix has a size that depends on the number of layers"):
        change(model, "model.layers", [0])


def test_numbers_that_modules_took_from_the_config_follow() -> None:
    class Told(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.full_layers = config.full_layers
            self.model.layer_count = config.num_hidden_layers
            self.width = LAYERS

    model = Told(LlamaConfig(num_hidden_layers=LAYERS, full_layers=[2], vocab_size=99, **WIDTH))
    found = change(model, "model.layers", [0, 2])
    assert found.edits["full_layers"] == [[2], [1]]
    assert found.held == {"": {"full_layers": [[2], [1]]}, "model": {"layer_count": [LAYERS, 2]}}


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
