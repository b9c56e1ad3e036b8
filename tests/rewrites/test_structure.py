"""What is dropped is gone: structure, config, cache; rebuilt by the file that travels, which knows no lamina."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lamina.anatomy import Anatomy
from lamina.anatomy.stacks import call
from lamina.anatomy.trial import ablated
from lamina.core.documents import Receipt, Step, plain
from lamina.core.errors import UnsupportedError
from lamina.lab import Lab
from lamina.rewrites import structure
from lamina.rewrites.drop import Drop
from lamina.testing import zoo
from lamina.testing._coverage_reference import masked
from lamina.testing.bench import lab, text
from lamina.testing.models import BUILDERS, CONFIGS, tiny
from lamina.testing.rewrites import PLACES, logits, step_at

SHIMMED = [p for p in PLACES if any(i is not None for _, i in p)]
WHOLE = (((1, None),), ((0, None), (2, None)), ((3, None),))


def dropped(name: str, places: Any) -> tuple[Lab, Receipt]:
    bench = lab(name)
    return bench, Drop().apply(step_at(Drop, bench.anatomy, places), bench)


@torch.no_grad()
def cached(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids[:, :4], use_cache=True)
    parts = [out.logits]
    for at in range(4, ids.shape[1]):
        out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1)


def same(model: Any, other: Any) -> None:
    ids = text(2, 14)
    assert torch.equal(logits(other, ids), logits(model, ids))
    torch.testing.assert_close(cached(other, ids), logits(model, ids), rtol=0, atol=2e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(other.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("places", WHOLE, ids=str)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_whole_blocks_leave_a_stock_model(name: str, places: Any) -> None:
    """The stock class, built from the written config alone, takes the weights strictly and computes the same."""
    bench, receipt = dropped(name, places)
    model: Any = bench.model
    config = type(model.config).from_dict(json.loads(json.dumps(model.config.to_dict())))
    stock = type(model)(config).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    same(model, stock)
    assert config.num_hidden_layers == 4 - len(places)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and key in BUILDERS[name]().config.to_dict():  # type: ignore[union-attr]
            assert len(value) in (0, 1, config.num_hidden_layers), f"{key} = {value} is stale"
    assert not receipt.structure["steps"][0]["branches"]


def write(model: Any, receipts: list[Receipt], folder: Path) -> None:
    """A checkpoint by hand."""
    tied = model.config.tie_word_embeddings
    head = model.get_output_embeddings().weight.data_ptr()
    seen: set[int] = set()
    weights = {}
    for key, value in model.state_dict().items():
        if tied and value.data_ptr() == head and value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        weights[key] = value.contiguous().clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    steps = [s for r in receipts for s in r.structure["steps"]]
    data = structure.checkpoint_config(model, steps, [plain(r) for r in receipts])
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize("places", SHIMMED, ids=str)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_sublayers_reload_through_the_shim(name: str, places: Any, tmp_path: Path) -> None:
    bench, receipt = dropped(name, places)
    write(bench.model, [receipt], tmp_path)
    again = structure.LaminaForCausalLM.from_pretrained(tmp_path)
    same(bench.model, again)
    assert again.config.num_hidden_layers == bench.model.config.num_hidden_layers  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_two_receipts_reload(name: str, tmp_path: Path) -> None:
    bench, first = dropped(name, ((0, 0), (2, 1)))
    second = Drop().apply(step_at(Drop, bench.anatomy, ((1, None), (2, 0))), bench)
    write(bench.model, [first, second], tmp_path)
    same(bench.model, structure.LaminaForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("harm", ["missing", "unexpected", "shape"])
def test_another_checkpoint_s_weights_are_refused(harm: str, tmp_path: Path) -> None:
    bench, receipt = dropped("llama", SHIMMED[0])
    write(bench.model, [receipt], tmp_path)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model.safetensors")
    key = next(k for k in weights if "mlp" in k)
    if harm == "missing":
        del weights[key]
    elif harm == "unexpected":
        weights[key.replace("mlp", "mlq")] = weights[key].clone()
    else:
        weights[key] = weights[key][:-1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"mlp|mlq|mismatch"):
        structure.LaminaForCausalLM.from_pretrained(tmp_path)


def test_a_dropped_sublayer_costs_nothing() -> None:
    bench, _ = dropped("gemma2", ((1, 0), (2, 1)))
    attention, mlp = (bench.model.get_submodule(p) for p in ("model.layers.1", "model.layers.0.1"))
    names = {n for n, _ in bench.model.named_parameters()}
    assert not [n for n in names if "layers.0.1" in n and "attn" in n]
    gone = [m for m in bench.model.modules() if isinstance(m, structure.Gone)]
    assert len(gone) == 2
    assert all(not list(g.parameters()) and not list(g.buffers()) for g in gone)
    assert isinstance(bench.model.get_submodule("model.layers.0"), structure.Group)
    assert (type(mlp).__name__, type(attention).__name__) == ("Gemma2DecoderLayer", "Gemma2DecoderLayer")
    norms = [n for n in names if "norm" in n]
    assert len(norms) == 4 * 4 - 4 + 1


@pytest.mark.parametrize("name", list(CONFIGS))
def test_cache_numbers_count_what_remains(name: str) -> None:
    for places in PLACES:
        bench, receipt = dropped(name, places)
        (step,) = receipt.structure["steps"]
        found = []
        for block in bench.anatomy.stacks[0].blocks:
            for key in step["index"]:
                path, _, attribute = key.rpartition(".")
                if path in step["cached"] and any(b.cached for b in block.branches):
                    found.append(getattr(bench.model.get_submodule(f"{block.path}.{path}"), attribute))
        assert found == list(range(bench.model.config.num_hidden_layers)), f"{receipt.sites}: {found}"  # type: ignore[union-attr]


def test_layer_types_stay_with_their_attentions() -> None:
    """A sliding-window attention that remains goes on sliding, whatever left around it."""
    dense = tiny("gemma3")
    types = dense.config.layer_types  # type: ignore[union-attr]
    bench = Lab(tiny("gemma3", layer_types=["sliding_attention", "full_attention"] * 2), text(2, 9))
    Drop().apply(Step(rewrite="drop", sites=("block.0.attention", "block.2.mlp")), bench)
    assert bench.model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]  # type: ignore[union-attr]
    assert len(types) == 4


def test_the_dense_config_object_of_others_is_not_edited() -> None:
    model = tiny("qwen2")
    before = copy.deepcopy(model.config.to_dict())  # type: ignore[union-attr]
    shared = copy.deepcopy(model.config)
    Drop().apply(Step(rewrite="drop", sites=("block.1",)), Lab(model, text(2, 9)))
    assert shared.to_dict() == before  # type: ignore[union-attr]
    assert model.config.to_dict()["num_hidden_layers"] == 3  # type: ignore[union-attr]


def test_replay_refuses_what_it_does_not_know() -> None:
    _, receipt = dropped("llama", PLACES[0])
    (step,) = receipt.structure["steps"]
    with pytest.raises(ValueError, match="a newer one is needed"):
        structure.replay(tiny("llama"), [{**step, "format": 99}])
    with pytest.raises(ValueError, match="can't replay 'fold'"):
        structure.replay(tiny("llama"), [{**step, "kind": "fold"}])
    with pytest.raises(ValueError, match="has 3 blocks, the receipt was made for 4"):
        structure.replay(tiny("llama", num_hidden_layers=3), [step])


def test_a_config_that_can_not_say_it_is_refused_before_anything_changes() -> None:
    """Layers of two kinds in turn, told by a period."""
    model = zoo.build("jamba").model
    bench = Lab(model, text(2, 9))
    before = list(model.state_dict())
    with pytest.raises(UnsupportedError, match=r"expert_layer_period = 2 repeats over the layers"):
        Drop().apply(Step(rewrite="drop", sites=("block.1",)), bench)
    assert list(model.state_dict()) == before


def test_what_a_block_hands_on_beside_the_stream_goes_on() -> None:
    """T5's attentions hand on the position bias that the first one made: it can't go alone, the others can."""
    specimen = zoo.build("t5")
    model, anatomy = specimen.model, Anatomy.of(specimen.model, specimen.sample)
    stack = anatomy.stack("decoder.block.0")
    assert stack.carries == ((1, 2), (2, 5))
    assert [anatomy.branch(f"decoder.block.{n}.attention").tells for n in range(4)] == [True, False, False, False]
    assert anatomy.branch("decoder.block.1.attention").hands == ((1, "position_bias"),)
    (problem,) = Drop().check(Step(rewrite="drop", sites=("decoder.block.0.attention",)), anatomy)
    assert problem.what == "the next block reads what it computes beside the stream"
    gone = "decoder.block.1.attention"
    block = anatomy.block(gone)
    with masked(model, f"{block.path}.{anatomy.branch(gone).outlet}", 0):
        wanted = call(model, specimen.sample).logits
    with ablated(model, anatomy, [gone]):
        assert torch.equal(call(model, specimen.sample).logits, wanted)
    place: Any = SimpleNamespace(model=model, anatomy=anatomy, renew=lambda: None)
    Drop().apply(Step(rewrite="drop", sites=(gone,)), place)
    assert torch.equal(call(model, specimen.sample).logits, wanted)


def test_gone_returns_the_structure_of_the_branch() -> None:
    x = torch.ones(2, 3, 4)
    assert torch.equal(structure.Gone()(x), torch.zeros(2, 3, 4))
    nested = structure.Gone("hidden", [(1, 3), (0, 2)])(hidden=x)
    assert (nested[0], nested[2], nested[1][1]) == (None, None, None)
    assert torch.equal(nested[1][0], torch.zeros(2, 3, 4))


def test_a_group_is_one_layer() -> None:
    class Block(nn.Module):
        def __init__(self, by: int) -> None:
            super().__init__()
            self.by, self.attention_type = by, f"type {by}"

        def forward(self, x: torch.Tensor, extra: int = 0) -> tuple[torch.Tensor, int]:
            return x * self.by + extra, self.by

    group = structure.Group([Block(2), Block(3)], 1)
    out, which = group(torch.ones(1), extra=1)
    assert (out.item(), which) == (10.0, 3)
    assert group.attention_type == "type 3"
    with pytest.raises(AttributeError):
        _ = group.nothing
    assert structure.flat([group, Block(5)])[-1].by == 5
    assert len(structure.flat([group, Block(5)])) == 3

    class Keyed(nn.Module):
        def forward(self, *, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + 1

    keyed = structure.Group([Keyed(), Keyed()], 0, "hidden")
    assert keyed(hidden=torch.ones(1)).item() == 3.0
    carrying = structure.Group([Block(2), Block(3)], 0, carries=[(1, 1)])
    out, which = carrying(torch.ones(1), 1)
    assert (out.item(), which) == (11.0, 3), "the second block gets what the first returned, and so does the next layer"


def test_the_files_that_travel_need_torch_and_transformers_alone() -> None:
    trees = [ast.parse(text) for text in structure.sources().values()]
    nodes = [n for tree in trees for n in ast.walk(tree)]
    roots = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    assert {f"{n.module}.py" for n in froms if n.level} <= set(structure.FILES)
    roots |= {str(n.module).split(".")[0] for n in froms if not n.level}
    assert roots <= {"copy", "functools", "importlib", "json", "pathlib", "sys", "torch", "transformers"}
