"""The reload contract: what is right passes, and every corruption of a checkpoint is caught by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamina.core.documents import Evidence, Step
from lamina.core.errors import InputError, ReloadError
from lamina.evaluators import _reload_child as child
from lamina.evaluators.reload import CHECKS, contract, contracts
from lamina.exporters.hf import save_checkpoint
from lamina.lab import Lab
from lamina.rewrites.drop import Drop
from lamina.testing.models import tiny

BLOCK = ("block.1",)
MIXED = ("block.0.attention", "block.1.mlp", "block.3")
NAMED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "falcon", "olmo2", "mixtral",
)  # fmt: skip
Outcome = tuple[Evidence, ...] | ReloadError


def ids() -> torch.Tensor:
    return torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(1))


def thinned(name: str, sites: tuple[str, ...], folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    """A thinned tiny model and its checkpoint."""
    model = tiny(name)
    if name == "mixtral":
        sites = tuple(s.replace("mlp", "moe") for s in sites)
    receipt = Drop().apply(Step(rewrite="drop", sites=sites), Lab(model, ids()))
    for parameter in model.parameters():  # buffers stay, as when a checkpoint is loaded in that type
        parameter.data = parameter.data.to(dtype)
    save_checkpoint(model, [receipt], None, folder)
    return model, folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_code(folder: Path, old: str, new: str) -> None:
    path = folder / "modeling_lamina.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def nudge(tensors: dict[str, torch.Tensor]) -> None:
    """One number that no token of the text reads."""
    tensors["model.embed_tokens.weight"][98, 0] += 0.25


def rotated(data: dict[str, Any]) -> None:
    data["layer_types"] = data["layer_types"][1:] + data["layer_types"][:1]


def lost(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def edit_config(folder: Path, **changes: Any) -> None:
    edit_json(folder / "config.json", lambda data: data.update(changes))


def longer(data: dict[str, Any]) -> None:
    data["layer_types"] = ["sliding_attention", *data["layer_types"]]


OWN_STAYS = ('for path in branch["own"] if', "for path in () if")
NEEDS_LAMINA = ("import transformers\n", "import transformers\nimport lamina\n")
NO_ROOM = ("FORMAT = 1\n", "raise MemoryError('no room')\n")
RENUMBER = ('    _renumber(layers, strides, step.get("first", ()))\n', "")
CORRUPTIONS: dict[str, tuple[str, tuple[str, ...], Callable[[Path], Any], str]] = {
    "one tensor perturbed": ("llama", BLOCK, lambda f: edit_weights(f, nudge), r"embed_tokens.weight .* up to 0.25"),
    "one tensor perturbed, shim": ("llama", MIXED, lambda f: edit_weights(f, nudge), r"embed_tokens.* up to 0.25"),
    "one tensor missing": (
        "llama", BLOCK, lambda f: edit_weights(f, lost), r"missing keys: model.norm.weight",
    ),
    "one tensor missing, shim": (
        "llama", MIXED, lambda f: edit_weights(f, lost), r"missing_keys.*model.norm.weight",
    ),
    "one tensor too many": (
        "llama", BLOCK, lambda f: edit_weights(f, lambda t: t.update(odd=torch.ones(1))), r"unexpected keys: odd",
    ),
    "another type": (
        "llama", BLOCK, lambda f: edit_config(f, dtype="bfloat16"), r"bfloat16.*float32",
    ),
    "stale num_hidden_layers": (
        "llama", BLOCK, lambda f: edit_config(f, num_hidden_layers=4), r"missing keys: .*layers\.3",
    ),
    "num_hidden_layers too low": (
        "llama", BLOCK, lambda f: edit_config(f, num_hidden_layers=2), r"unexpected keys: .*layers\.2",
    ),
    "stale layer_types": ("gemma2", BLOCK, lambda f: edit_json(f / "config.json", longer), r"does not load"),
    "layer_types of other layers": (
        "gemma2", BLOCK, lambda f: edit_json(f / "config.json", rotated), r"layer_types is .*, in memory",
    ),
    "another rope base": (
        "llama", BLOCK,
        lambda f: edit_config(f, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}), r"rope_parameters",
    ),
    "forgotten layer_idx": ("llama", ("block.0.attention",), lambda f: edit_code(f, *RENUMBER), r"fresh process"),
    "norm left in": ("llama", MIXED, lambda f: edit_code(f, *OWN_STAYS), r"missing_keys.*norm"),
    "needs lamina": (
        "llama", MIXED, lambda f: edit_code(f, *NEEDS_LAMINA), r"not found in.*: lamina|can't be",
    ),
    "out of memory": (
        "llama", MIXED, lambda f: edit_code(f, *NO_ROOM), r"MemoryError: no room",
    ),
    "no weights": ("llama", BLOCK, lambda f: (f / "model.safetensors").unlink(), r"model.safetensors"),
    "generates otherwise": (
        "llama", BLOCK,
        lambda f: edit_json(f / "generation_config.json", lambda d: d.update(suppress_tokens=list(range(3, 60)))),
        r"greedy tokens .* in memory",
    ),
}  # fmt: skip
GOOD = [(name, sites) for name in ("llama", "gemma2", "gpt2") for sites in (BLOCK, MIXED)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Outcome]:
    """All checkpoints, right and wrong, through one fresh process."""
    root = tmp_path_factory.mktemp("reload")
    keys: list[Any] = []
    cases = []
    torch.set_num_threads(1)
    for number, (name, sites) in enumerate(GOOD):
        model, folder = thinned(name, sites, root / f"good_{number}")
        cases.append((folder, model, ids()))
        keys.append((name, sites))
    model, folder = thinned("llama", MIXED, root / "half", torch.bfloat16)
    cases.append((folder, model, ids()))
    keys.append("bfloat16")
    for number, (key, (name, sites, spoil, _)) in enumerate(CORRUPTIONS.items()):
        model, folder = thinned(name, sites, root / f"bad_{number}")
        spoil(folder)
        cases.append((folder, model, ids()))
        keys.append(key)
    return dict(zip(keys, contracts(cases), strict=True))


@pytest.mark.parametrize("key", [*GOOD, "bfloat16"], ids=str)
def test_what_is_right_passes(key: Any, outcomes: dict[Any, Outcome]) -> None:
    found = outcomes[key]
    assert not isinstance(found, ReloadError), found
    assert [e.name for e in found] == list(CHECKS)
    for e in found:
        assert e.of == "contract"
        assert e.high is not None
        assert e.value <= e.high
    assert found[0].value == 0.0, "the same computation on the same machine gives the same bits"
    assert found[-1].value == 1.0


@pytest.mark.parametrize("key", CORRUPTIONS)
def test_every_corruption_is_caught(key: str, outcomes: dict[Any, Outcome]) -> None:
    found = outcomes[key]
    assert isinstance(found, ReloadError), found
    assert "\n" not in str(found)
    assert found.where.startswith("/")
    assert re.search(CORRUPTIONS[key][3], str(found)), str(found)


def test_a_model_whose_layers_are_not_renumbered_fails_in_memory(tmp_path: Path) -> None:
    model, folder = thinned("llama", BLOCK, tmp_path / "a")
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number + (number > 0)
    with pytest.raises(ReloadError, match="in memory"):
        contract(folder, model, ids())


def test_a_no_op_in_the_first_cache_entry_fails_in_memory(tmp_path: Path) -> None:
    """As others leave it out: the module is silent, but the cache still counts its entry."""
    model, folder = thinned("llama", BLOCK, tmp_path / "a")

    class Silent(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            return torch.zeros_like(hidden_states), None

    model.model.layers[0].self_attn = Silent()
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ReloadError, match="in memory already, cached decoding"):
            contract(folder, model.to(dtype), ids())


def test_a_process_that_dies_is_one_line(tmp_path: Path) -> None:
    model, folder = thinned("llama", MIXED, tmp_path / "a")
    die = "import os, sys\nsys.stderr.write('first\\nlast words\\n')\nsys.stderr.flush()\nos._exit(3)\n"
    edit_code(folder, "FORMAT = 1\n", f"FORMAT = 1\n{die}")
    with pytest.raises(ReloadError, match=r"ended with 3: last words$"):
        contract(folder, model, ids())


def test_a_process_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    model, folder = thinned("llama", BLOCK, tmp_path / "a")
    with pytest.raises(ReloadError, match=r"no answer from the fresh process after 0\.1 s"):
        contract(folder, model, ids(), timeout=0.1)


def test_a_text_of_one_token_is_refused(tmp_path: Path) -> None:
    model, folder = thinned("llama", BLOCK, tmp_path / "a")
    with pytest.raises(InputError, match="token ids"):
        contract(folder, model, ids()[:, :1])


def test_exact_computes_in_float32_and_leaves_the_weights_alone() -> None:
    model = tiny("mixtral").to(torch.bfloat16)
    before = child.digests(model)
    wide = tiny("mixtral").to(torch.bfloat16).float()
    with torch.no_grad(), child.exact(model):
        inside = child.full(model, ids())
    with torch.no_grad():
        assert torch.equal(inside, child.full(wide, ids()))
        assert child.full(model, ids()).dtype == torch.bfloat16
    assert child.digests(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_row_is_padded_against_a_shorter_copy_of_itself() -> None:
    batch, mask, lengths = child.ragged(torch.tensor([[5, 6, 7, 8, 9]]))
    assert lengths == [5, 2]
    assert batch.tolist() == [[5, 6, 7, 8, 9], [0, 0, 0, 5, 6]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


@pytest.mark.slow
def test_all_named_architectures_keep_the_contract(tmp_path: Path) -> None:
    cases, labels = [], []
    for name in NAMED:
        for number, sites in enumerate((BLOCK, MIXED, ("block.0.attention",), ("block.1.attention", "block.2"))):
            model, folder = thinned(name, sites, tmp_path / f"{name}_{number}")
            cases.append((folder, model, ids()))
            labels.append((name, sites))
    failed = {k: str(v) for k, v in zip(labels, contracts(cases), strict=True) if isinstance(v, ReloadError)}
    assert not failed
