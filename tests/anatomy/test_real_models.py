"""Real checkpoints of several kinds: found, certified, thinned, and reloaded.

`python tools/real_models.py FOLDER` makes them; LAMINA_REAL_MODELS names the folder. The GGUF among them is dequantised
once, into a cache beside them.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.anatomy.trial import ablated
from lamina.core.documents import Receipt, Step
from lamina.evaluators.reload import contract
from lamina.exporters.hf import save_checkpoint
from lamina.lab.load import load, quiet
from lamina.rewrites.drop import Drop
from lamina.testing._coverage_reference import Outputs, expect_equal, handed_on, masked, outputs

FOLDER = os.environ.get("LAMINA_REAL_MODELS")
pytestmark = [
    pytest.mark.real_models,
    pytest.mark.skipif(not FOLDER, reason="LAMINA_REAL_MODELS names no folder (tools/real_models.py makes it)"),
    pytest.mark.timeout(900),
]
ENCODER, DECODER = ("attention", "mlp"), ("attention", "cross_attention", "mlp")
STACKS = {
    "mpnet": {"": (12, ENCODER)},
    "minilm": {"": (6, ENCODER)},
    "dinov2-small": {"": (12, ENCODER)},
    "whisper-base": {"encoder": (6, ENCODER), "decoder": (6, DECODER)},
    "gemma3-270m": {"": (18, ENCODER)},
}
"""Model → stack → (how many blocks, the kinds of sublayers that each has)."""
CLASSES = {
    "mpnet": "MPNetModel",
    "minilm": "BertModel",
    "dinov2-small": "Dinov2Model",
    "whisper-base": "WhisperForConditionalGeneration",
    "albert": "AlbertForMaskedLM",
}
GGUF = {"gemma3-270m": "gemma-3-270m-q4_k_m.gguf"}
PASSES = 12
DECODING = {
    "whisper-base": ["reload_cache"],
    "gemma3-270m": ["reload_cache", "reload_padding", "reload_generate"],
}
"""What else the reload contract asks of models that generate."""


def text(vocabulary: int, rows: int = 2, tokens: int = 24) -> dict[str, Tensor]:
    """Token ids; a third of the last row is padding."""
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, -tokens // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)) / 2


SAMPLES = {
    "mpnet": lambda: text(30_000),
    "minilm": lambda: text(30_000),
    "dinov2-small": lambda: {"pixel_values": noise(2, 3, 112, 112)},
    "whisper-base": lambda: {
        "input_features": noise(1, 80, 3000),
        "decoder_input_ids": torch.tensor([[50258, 50259, 50359, 50363, 440, 2068, 307, 257]]),
    },
    "albert": lambda: text(590),
    "gemma3-270m": lambda: {"input_ids": text(200_000)["input_ids"]},
}


@dataclass(frozen=True)
class Real:
    name: str
    model: Any
    sample: dict[str, Tensor]
    anatomy: Anatomy
    dense: Outputs


def read(name: str) -> Any:
    """The model in float32; the test is skipped where the folder does not hold it."""
    folder = Path(FOLDER or "") / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in LAMINA_REAL_MODELS: python tools/real_models.py FOLDER {name}")
    if name in GGUF:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LAMINA_CACHE", str(folder.parent / "cache"))
            return load(folder / GGUF[name], dtype="float32").model
    with quiet():
        model, info = getattr(transformers, CLASSES[name]).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module", params=list(STACKS))
def real(request: pytest.FixtureRequest) -> Real:
    torch.set_num_threads(1)
    model, sample = read(request.param), SAMPLES[request.param]()
    return Real(request.param, model, sample, Anatomy.of(model, sample), outputs(model, sample))


def drop(model: nn.Module, anatomy: Anatomy, site: str) -> Receipt:
    """Drop the site from the model, which is the anatomy's own or a copy of it."""
    found = copy.copy(anatomy)
    found.model = model
    bench: Any = SimpleNamespace(model=model, anatomy=found, renew=lambda: None)
    return Drop().apply(Step(rewrite="drop", sites=(site,)), bench)


def thinned(real: Real, site: str) -> nn.Module:
    """A copy without the site, which computes what the dense model does when the site is taken away on trial.

    And what it does by plain torch: with the block passed over, or the branch's outlet at zero.
    """
    thin = copy.deepcopy(real.model)
    drop(thin, real.anatomy, site)
    got, block = outputs(thin, real.sample), real.anatomy.block(site)
    with ablated(real.model, real.anatomy, [site]):
        expect_equal(got, outputs(real.model, real.sample), real.dense)
    if block.site.id == site:
        blocks = real.anatomy.stack(site).blocks
        plain = handed_on(real.model, real.sample, [b.path for b in blocks], blocks.index(block))
    else:
        branch = real.anatomy.branch(site)
        plain = masked(real.model, f"{block.path}.{branch.outlet}", branch.outlet_index)
    with plain:
        expect_equal(got, outputs(real.model, real.sample), real.dense)
    return thin


def test_the_stacks_are_found_and_certified(real: Real) -> None:
    found = {k.name: [tuple(str(x.site.kind) for x in b.branches) for b in k.blocks] for k in real.anatomy.stacks}
    assert found == {name: [kinds] * blocks for name, (blocks, kinds) in STACKS[real.name].items()}
    certificate = real.anatomy.certify(real.sample)
    assert certificate.holds
    assert len(certificate.errors) == sum(blocks for blocks, _ in STACKS[real.name].values())


def test_a_dropped_block_is_a_block_passed_over(real: Real) -> None:
    """The first one too: MPNet's `position_bias` is made once, ahead of it, and handed to every block."""
    for stack in real.anatomy.stacks:
        for number in (0, len(stack.blocks) // 2):
            thinned(real, stack.blocks[number].site.id)


def test_a_dropped_sublayer_adds_nothing(real: Real) -> None:
    for stack in real.anatomy.stacks:
        for branch in stack.blocks[1].branches:
            thinned(real, branch.site.id)


def test_a_thinned_checkpoint_reloads(real: Real, tmp_path: Path) -> None:
    for stack in real.anatomy.stacks:
        thin = copy.deepcopy(real.model)
        folder = tmp_path / (stack.name or "only")
        save_checkpoint(thin, [drop(thin, real.anatomy, stack.blocks[1].site.id)], None, folder)
        found = contract(folder, thin, real.sample, dense=real.model)
        assert [e.name for e in found] == ["reload_logits", *DECODING.get(real.name, [])]
        assert all(e.high is not None and e.value <= e.high for e in found), found


def test_mpnet_without_its_first_block_hands_on_the_same_position_bias() -> None:
    model, sample = read("mpnet"), SAMPLES["mpnet"]()
    seen: list[Tensor] = []

    def note(_: nn.Module, args: Any) -> None:
        seen.append(args[2])

    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(note)
    outputs(model, sample)
    before = list(seen)
    drop(model, Anatomy.of(model, sample), "block.0")
    seen.clear()
    outputs(model, sample)
    assert (len(before), len(seen)) == (12, 11)
    assert all(torch.equal(bias, before[0]) for bias in seen)


def test_a_dropped_block_of_albert_is_one_pass_fewer(tmp_path: Path) -> None:
    model, sample = read("albert"), SAMPLES["albert"]()
    passes: list[nn.Module] = []
    dense = outputs(model, sample)
    anatomy = Anatomy.of(model, sample)
    assert [len(k.blocks) for k in anatomy.stacks] == [PASSES]
    thin = copy.deepcopy(model)
    receipt = drop(thin, anatomy, "block.5")
    (group,) = thin.albert.encoder.albert_layer_groups
    handle = group.register_forward_hook(lambda module, *_: passes.append(module))
    made = outputs(thin, sample)
    handle.remove()
    assert len(passes) == PASSES - 1
    model.config.num_hidden_layers -= 1
    expect_equal(made, outputs(model, sample), dense)
    save_checkpoint(thin, [receipt], None, tmp_path)
    contract(tmp_path, thin, sample)
