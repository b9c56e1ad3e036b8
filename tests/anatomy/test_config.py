"""Config surgery: lists filtered, indices remapped, counts set, the impossible refused; nothing edited in place."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lamina.anatomy.config import edits, index_attributes, owner_of, repeated
from lamina.testing.models import config, tiny


class Config:
    """A config with these fields."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def after(made: Any, depth: int, kept: list[int]) -> dict[str, Any]:
    found = edits(made, depth, kept)
    assert all(before == made.to_dict()[k] for k, (before, _) in found.items())
    return {k: new for k, (_, new) in found.items()}


def test_lists_of_layers_are_filtered() -> None:
    made = Config(num_hidden_layers=5, layer_types=list("abcde"), sizes=[1, 2, 3, 4, 5], other=[1, 2, 3])
    assert after(made, 5, [0, 2, 4]) == {"num_hidden_layers": 3, "layer_types": ["a", "c", "e"], "sizes": [1, 3, 5]}
    assert made.layer_types == list("abcde")


def test_lists_of_indices_are_remapped() -> None:
    made = Config(num_hidden_layers=6, mlp_only_layers=[1, 4], full_attn_idxs=[0], token_ids=[1, 2])
    assert after(made, 6, [0, 1, 3, 4]) == {"num_hidden_layers": 4, "mlp_only_layers": [1, 3], "full_attn_idxs": [0]}
    assert after(made, 6, [2, 3])["mlp_only_layers"] == []


def test_periodic_rules_are_found_unless_the_list_is_written_out() -> None:
    assert repeated(Config(num_hidden_layers=4, layer_pattern=2), 4) == ("layer_pattern", 2)
    assert repeated(Config(num_hidden_layers=4, layer_pattern=2, layer_types=list("abab")), 4) is None
    assert repeated(Config(num_hidden_layers=4, moe_layer_freq=1), 4) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", "num_hidden_layers"),
        ("gpt2", "n_layer"),
        ("falcon", "num_hidden_layers"),
        ("gemma3", "num_hidden_layers"),
    ],
)
def test_the_count_goes_under_its_own_name(name: str, key: str) -> None:
    assert after(config(name), 4, [0, 3])[key] == 2


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2", "qwen3"])
def test_layer_types_of_real_configs(name: str) -> None:
    made = config(name)
    types = list(made.layer_types)
    found = after(made, 4, [1, 3])
    assert found["layer_types"] == [types[1], types[3]]
    assert made.layer_types == types


def test_the_owner_counts_the_layers() -> None:
    assert owner_of(tiny("llama"), "model.layers", 4) == "model"
    assert owner_of(tiny("llama"), "model.layers", 3) is None
    assert owner_of(tiny("nanogpt"), "blocks", 4) is None


def numbered(*values: Any, name: str = "layer_idx") -> list[nn.Module]:
    blocks = []
    for value in values:
        block, inner = nn.Module(), nn.Module()
        block.inner = inner
        if value is not None:
            setattr(inner, name, value)
        blocks.append(block)
    return blocks


def test_index_attributes_count_those_that_have_one() -> None:
    assert index_attributes(numbered(0, 1, 2)) == ("inner.layer_idx",)
    assert index_attributes(numbered(None, 0, None, 1)) == ("inner.layer_idx",)
    assert index_attributes(numbered(None, 0, None)) == ("inner.layer_idx",)
    assert index_attributes(numbered(0)) == ("inner.layer_idx",)
    assert index_attributes(numbered(0, 2, 1)) == ()
    assert index_attributes(numbered(1, 2, 3)) == ()
    assert index_attributes(numbered(True, False)) == ()
    assert index_attributes(numbered(0, name="heads")) == ()
    assert index_attributes(numbered(0, 1, name="heads")) == ("inner.heads",)
