"""Models on disk: the same numbers as in memory, each block read once, and never the whole model."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from lamina.anatomy import Anatomy
from lamina.anatomy.trace import Flops
from lamina.core import registry
from lamina.core.documents import Step
from lamina.core.errors import CertificateError, InputError, LaminaError, UnsupportedError
from lamina.core.papers import Need
from lamina.core.scores import Scores
from lamina.core.sites import Kind
from lamina.exporters.hf import save_checkpoint
from lamina.lab import Lab
from lamina.lab import disk as disk_module
from lamina.lab._disk_weights import OnDisk, is_light
from lamina.lab.disk import anatomy_of, lending, open_streamed, streamed, weights_of
from lamina.lab.load import load_weights, quiet
from lamina.rewrites.drop import Drop
from lamina.testing.models import NanoGPT, lively, padded, text, tiny

NAMES = ("llama", "gpt2", "gpt_neox", "gemma2", "mixtral")
SHARD = "20KB"
FORWARD = [
    n
    for n in registry.MEASURES
    if registry.MEASURES.card(n).needs is Need.FORWARD and hasattr(registry.MEASURES.method(n), "tally")
]
TYPES = ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16))


def saved(model: Any, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder, max_shard_size=SHARD)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint of a tiny model, in shards, made once."""
    made: dict[Any, Path] = {}

    def give(name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = saved(tiny(name).to(dtype), tmp_path_factory.mktemp(name))
        return made[name, dtype]

    return give


@pytest.fixture
def own(folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that the test may spoil."""
    return Path(shutil.copytree(folder(), tmp_path / "own"))


def both(path: Path, dtype: torch.dtype = torch.float32, batches: Any = None) -> tuple[Lab, Lab]:
    """Labs on a checkpoint: loaded, and left on disk."""
    batches = text(5, 12) if batches is None else batches
    loaded, there = load_weights(path, dtype=dtype), open_streamed(path, dtype=dtype)
    return Lab(loaded, batches, batch_size=2), Lab(there, batches, anatomy=anatomy_of(there), batch_size=2)


def tallies(anatomy: Anatomy, names: Sequence[str] = FORWARD) -> list[Any]:
    return [registry.MEASURES.make(n).tally(anatomy) for n in names]


def expect_same(one: Scores, two: Scores) -> None:
    """To the last bit."""
    assert dict(one.missing) == dict(two.missing)
    for mine, yours in ((one.values, two.values), (one.stderr, two.stderr), (one.spans, two.spans)):
        assert list(mine) == list(yours)
        for key in mine:
            np.testing.assert_array_equal(mine[key], yours[key], err_msg=f"{one.measure} {key}")
    assert list(one.grids) == list(two.grids)
    for key, grid in one.grids.items():
        np.testing.assert_array_equal(grid.values, two.grids[key].values, err_msg=f"{one.measure} {key}")


def reads(lab: Lab) -> list[int]:
    """How often each block was read since last asked."""
    weights = weights_of(lab.model)
    assert weights is not None
    found = list(weights.block_reads().values())
    weights.reads.clear()
    return found


def whole(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not is_light(p))


def live(model: nn.Module) -> int:
    """Bytes of matrices in memory, counted by what the parameters are."""
    return sum(
        p.numel() * p.element_size() for p in model.parameters() if not isinstance(p, OnDisk) and not is_light(p)
    )


class Each:
    """A tally that calls a function at each site."""

    wants = frozenset[str]()

    def __init__(self, work: Callable[[Any, Any], None]) -> None:
        self.work = work

    def add(self, site: Any, taps: Any) -> None:
        self.work(site, taps)

    def merge(self, other: Any) -> Any:
        return other

    def scores(self) -> Scores:
        return Scores(measure="each", values={})


def refused(*words: str, kind: type[LaminaError] = InputError) -> Any:
    """Raises one line that holds all the words."""
    return pytest.raises(kind, match=r"(?s)^[^\n]*$" if not words else "".join(f"(?=.*{w})" for w in words) + "[^\n]*$")


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", NAMES)
def test_a_survey_gives_the_same_to_the_last_bit(folder: Callable[..., Path], name: str) -> None:
    """Every registered measure of one forward, text with padding; blocks are read once."""
    rows = [*text(3, 12), *text(2, 7, seed=1), *text(1, 4, seed=2)]
    memory, disk = both(folder(name), batches=padded(rows, 2))
    weights = weights_of(disk.model)
    assert weights is not None
    assert len(set(weights.block_reads())) == 4
    assert memory.anatomy.sites == disk.anatomy.sites
    assert [memory.anatomy.cost(s) for s in memory.anatomy.sites] == [disk.anatomy.cost(s) for s in disk.anatomy.sites]
    assert memory.anatomy.total() == disk.anatomy.total()
    found = reads(disk)  # by the certificate, and those of which the anatomy looks at one of each kind
    assert max(found) <= 3
    assert found[-1] == 1
    want = memory.stream(tallies(memory.anatomy))
    assert streamed(disk, []) == []
    assert reads(disk) == [1, 1, 1, 1]
    assert (disk.counts.blocks, disk.counts.heads) == (memory.counts.blocks, memory.counts.heads)
    for mine, yours in zip(streamed(disk, tallies(disk.anatomy)), want, strict=True):
        expect_same(mine, yours)
    bare = [n for n, t in zip(FORWARD, tallies(disk.anatomy), strict=True) if not getattr(t, "wants", ())]
    reads(disk)
    for measure, mine in zip(bare, streamed(disk, tallies(disk.anatomy, bare)), strict=True):
        expect_same(mine, want[FORWARD.index(measure)])
    assert reads(disk) == [1, 1, 1, 1]
    assert weights.live == live(disk.model) == 0


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize(("stored", "used"), TYPES)
def test_number_types(folder: Callable[..., Path], name: str, stored: torch.dtype, used: torch.dtype) -> None:
    memory, disk = both(folder(name, stored), used)
    with torch.no_grad():
        assert torch.equal(memory.model(text()).logits, disk.model(text()).logits)
    assert {p.dtype for p in disk.model.parameters()} == {used}
    names = ("cosine", "block-influence", "angular")
    for mine, yours in zip(
        streamed(disk, tallies(disk.anatomy, names)), memory.stream(tallies(memory.anatomy, names)), strict=True
    ):
        expect_same(mine, yours)


def test_an_encoder(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    path = saved(lively(BertForMaskedLM(config)), tmp_path)
    with quiet():
        loaded = BertForMaskedLM.from_pretrained(path)
    there = open_streamed(path, dtype=torch.float32)
    assert type(there) is BertForMaskedLM
    memory, disk = Lab(loaded, text(5, 12), batch_size=2), Lab(there, text(5, 12), batch_size=2)
    expect_same(
        streamed(disk, tallies(disk.anatomy, ("cosine",)))[0], memory.stream(tallies(memory.anatomy, ("cosine",)))[0]
    )
    assert live(there) == 0


def test_an_encoder_decoder(tmp_path: Path) -> None:
    """One stack after the other; its attentions hand a bias from block to block."""
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=4, num_heads=4)
    path = saved(lively(T5(config)), tmp_path / "model")
    with quiet():
        loaded = T5.from_pretrained(path)
    there = open_streamed(path, dtype=torch.float32)
    batches = [{"input_ids": text(2, 9, seed=s), "decoder_input_ids": text(2, 6, seed=s + 9)} for s in range(3)]
    anatomy = anatomy_of(there, batches[0])
    assert [len(k.blocks) for k in anatomy.stacks] == [3, 4]
    assert all(k.carries for k in anatomy.stacks)
    memory, disk = Lab(loaded, batches, anatomy=Anatomy.of(loaded, batches[0])), Lab(there, batches, anatomy=anatomy)
    reads(disk)
    want = memory.stream(tallies(memory.anatomy, ("cosine", "angular")))
    for scratch in (None, tmp_path):
        for mine, yours in zip(
            streamed(disk, tallies(anatomy, ("cosine", "angular")), scratch=scratch), want, strict=True
        ):
            expect_same(mine, yours)
        assert set(reads(disk)) == {1}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_all_else_works_on_it_slowly(folder: Callable[..., Path]) -> None:
    """Batch by batch, anatomy, certificate, decoding, units, ablation, copies: what a model in memory gives."""
    memory, disk = both(folder())
    plain = Anatomy.of(disk.model)
    assert plain.sites == memory.anatomy.sites
    assert plain.certify() == memory.anatomy.certify() == disk.anatomy.certify()
    kinds = (Kind.HEAD, Kind.KV_GROUP, Kind.NEURON, Kind.LINEAR)
    assert disk.anatomy.of_kind(*kinds) == memory.anatomy.of_kind(*kinds)
    assert "can't be changed" in disk.anatomy.refused_channels(disk.anatomy.stacks[0])  # for these, weights are changed
    states = torch.randn(5, 32)
    assert torch.equal(disk.decode(states), memory.decode(states))
    reads(disk)
    expect_same(
        disk.stream(tallies(disk.anatomy, ("cosine",)))[0], memory.stream(tallies(memory.anatomy, ("cosine",)))[0]
    )
    assert reads(disk) == [3, 3, 3, 3]  # once for each batch
    with disk.ablate(["block.1", "block.2.mlp"]), memory.ablate(["block.1", "block.2.mlp"]), torch.no_grad():
        assert torch.equal(disk.model(text()).logits, memory.model(text()).logits)
    assert reads(disk) == [1, 0, 1, 1]  # what does not run is not read
    for name, weight in memory.model.state_dict().items():
        assert torch.equal(disk.model.state_dict()[name], weight)
    site = disk.anatomy.linears("block.3.mlp")[0]
    assert torch.equal(disk.anatomy.weight(site), memory.anatomy.weight(site))
    copied = copy.deepcopy(disk.model)
    assert whole(copied) == live(copied)
    with torch.no_grad():
        assert torch.equal(copied(text()).logits, memory.model(text()).logits)
    assert live(disk.model) == 0


def test_weights_that_only_vectors_and_rows_are_kept_of(folder: Callable[..., Path]) -> None:
    """An embedding is not read, only its rows; vectors and what is computed are there."""
    there = open_streamed(folder("llama", torch.bfloat16), dtype=torch.float32)
    weights = weights_of(there)
    assert weights is not None
    assert all(isinstance(p, OnDisk) != is_light(p) for p in there.parameters())
    assert not any(b.is_meta for b in there.buffers())
    with torch.no_grad():
        there(text())
    assert weights.reads["model.embed_tokens.weight"] == 0
    assert weights.reads["lm_head.weight"] == 1
    assert there.training is False


# ---------------------------------------------------------------- never the whole model


def test_never_more_than_a_block(folder: Callable[..., Path]) -> None:
    seen: list[int] = []
    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        there = open_streamed(folder(), dtype=dtype)
        weights = weights_of(there)
        assert weights is not None
        lab = Lab(there, text(5, 12), anatomy=anatomy_of(there), batch_size=2)
        block = max(whole(there.get_submodule(b.path)) for b in lab.anatomy.stacks[0].blocks)
        assert block < whole(there) / 4
        assert weights.peak <= 2 * block
        streamed(lab, [Each(lambda *_, model=there: seen.append(live(model)))])
        lab.stream([Each(lambda *_, model=there: seen.append(live(model)))])
        assert set(seen) == {block}
        assert live(there) == 0


def test_borrowed_weights_are_given_back(folder: Callable[..., Path]) -> None:
    there = open_streamed(folder(), dtype=torch.float32)
    with torch.no_grad():
        right = there(text()).logits
        with lending(there):
            wrong = there(text()).logits
        assert not torch.equal(wrong, right)
        assert torch.equal(there(text()).logits, right)
        up, given = there.get_submodule("model.layers.2.mlp.up_proj"), torch.randn(3, 32)
        own = up(given)
        with lending(there):
            assert torch.equal(up(given), own)


def test_its_weights_cant_be_changed(folder: Callable[..., Path]) -> None:
    there = open_streamed(folder(), dtype=torch.float32)
    weight = there.get_parameter("lm_head.weight")
    with torch.no_grad(), refused("can't be changed", kind=UnsupportedError):
        weight.mul_(2)
    with torch.no_grad(), refused("can't be changed", kind=UnsupportedError):
        weight[0] = 0
    with refused("can't be changed", kind=UnsupportedError):
        weight.data = torch.zeros(weight.shape)
    with torch.no_grad(), refused("can't be changed", kind=UnsupportedError):
        torch.add(torch.ones(weight.shape), 1, out=weight)
    with refused("no gradients", kind=UnsupportedError):
        there(text())
    there.get_submodule("lm_head").to(torch.float32)  # which changes nothing
    assert live(there) == 0


# ---------------------------------------------------------------- scratch space


def test_states_in_a_file(folder: Callable[..., Path], tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        memory, disk = both(folder("llama", dtype), dtype, padded([*text(3, 12), *text(2, 7, seed=1)], 2))
        want = memory.stream(tallies(memory.anatomy, ("cosine", "angular")))
        got = streamed(disk, tallies(disk.anatomy, ("cosine", "angular")), scratch=tmp_path)
        for mine, yours in zip(got, want, strict=True):
            expect_same(mine, yours)
        assert list(tmp_path.iterdir()) == []


def test_the_room_is_taken_at_once(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, size: asked.append(size))
    disk = both(folder())[1]
    streamed(disk, [], scratch=tmp_path)
    assert asked == [5 * 12 * 32 * 4]


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line(folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = both(folder())[1]
    met: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", full)
    with refused("No space left", "GB are needed", str(tmp_path), "make room"):
        streamed(disk, [Each(lambda *_: met.append(1))], scratch=tmp_path)
    assert not met
    assert list(tmp_path.iterdir()) == []
    assert live(disk.model) == 0
    with refused("can't write here", "nowhere"):
        streamed(disk, [], scratch=tmp_path / "nowhere")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        done = 1
    if done:
        pytest.skip("can't mount a small disk here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(folder: Callable[..., Path], small: Path) -> None:
    disk = both(folder(), batches=text(16, 40))[1]
    with refused("No space left", str(small)):
        streamed(disk, [], scratch=small)
    assert list(small.iterdir()) == []
    disk = both(folder(), batches=text(4, 12))[1]
    streamed(disk, [], scratch=small)


@pytest.mark.parametrize("scratch", [True, False])
def test_an_interrupted_pass_leaves_nothing(folder: Callable[..., Path], tmp_path: Path, scratch: bool) -> None:
    place = folder()
    disk = both(place)[1]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in disk.model.modules()]
    descriptors = len(list(Path("/proc/self/fd").iterdir()))

    def stop(site: Any, taps: Any) -> None:
        assert live(disk.model) > 0
        if site.block == 2 and taps.rows.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed(disk, [Each(stop)], scratch=tmp_path if scratch else None)
    assert list(tmp_path.iterdir()) == []
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in disk.model.modules()] == hooks
    assert not any("forward" in vars(m) for m in disk.model.modules())
    assert live(disk.model) == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert str(place) not in Path("/proc/self/maps").read_text()
    with pytest.raises(KeyboardInterrupt):  # a forward, too: what it leaves goes when the next begins
        disk.stream([Each(stop)])
    streamed(disk, [])
    assert live(disk.model) == 0


def test_an_error_inside_a_forward_leaves_nothing(folder: Callable[..., Path]) -> None:
    there = open_streamed(folder(), dtype=torch.float32)

    def fail(*_: Any) -> None:
        raise ValueError("no")

    handle = there.get_submodule("model.layers.1.mlp").register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(ValueError, match="no"):
        there(text())
    handle.remove()
    assert live(there) == 0
    weights = weights_of(there)
    assert weights is not None
    weights.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in there.modules())
    with torch.no_grad():
        assert torch.equal(there(text()).logits, load_weights(folder(), dtype=torch.float32)(text()).logits)


def test_progress_and_an_empty_list(folder: Callable[..., Path]) -> None:
    disk, told = both(folder())[1], []
    disk.progress = lambda what, done, total: told.append((what, done, total))
    assert streamed(disk, []) == []
    assert told == [("survey", 5 * b + n, 20) for b in range(4) for n in (2, 4, 5)]


# ---------------------------------------------------------------- what can't be opened


def index(path: Path) -> dict[str, str]:
    return json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]


def shard(path: Path, name: str) -> Path:
    return path / index(path)[name]


def spoil(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def opening(path: Path) -> nn.Module:
    return open_streamed(path, dtype=torch.float32)


def test_a_missing_shard(own: Path) -> None:
    file = shard(own, "model.layers.2.mlp.up_proj.weight")
    file.unlink()
    with refused(file.name, "missing"):
        opening(own)


def test_a_truncated_shard(own: Path) -> None:
    file = shard(own, "model.layers.2.mlp.up_proj.weight")
    file.write_bytes(file.read_bytes()[:-7])
    with refused(file.name, "truncated"):
        opening(own)


def test_a_wrong_shape(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by what the headers say: nothing is read."""
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(shard(own, name), lambda t: t | {name: torch.zeros(63, 32)})
    monkeypatch.setattr("lamina.lab._disk_files.Stored.read", lambda *_, **__: pytest.fail("it was read"))
    with refused("another shape", name):
        opening(own)


def test_weights_that_are_missing_or_too_many(own: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(
        shard(own, name),
        lambda t: {("model.layers.1.mlp.sideways.weight" if k == name else k): v for k, v in t.items()},
    )
    with refused("1 weights are missing", name):
        opening(own)
    spoil(shard(own, name), lambda t: t | {name: torch.zeros(64, 32)})
    with refused("no place in the model", "sideways"):
        opening(own)


def test_a_wholly_other_config_takes_no_memory(own: Path) -> None:
    """What transformers would fill at random is refused before."""
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"hidden_size": 1 << 14, "num_hidden_layers": 40}))
    with refused("another shape"):
        opening(own)


def test_corrupt_headers(own: Path) -> None:
    file = shard(own, "model.layers.1.mlp.up_proj.weight")
    raw = file.read_bytes()
    for old, new, words in ((b'"F32"', b'"F33"', "F33"), (b"[64,32]", b"[64,31]", "corrupt")):
        assert old in raw
        file.write_bytes(raw.replace(old, new))
        with refused(file.name, words):
            opening(own)


def test_a_file_that_changes_under_it(own: Path) -> None:
    there = opening(own)
    file = shard(own, "model.layers.1.mlp.up_proj.weight")
    os.utime(file, ns=(1, 1))
    with torch.no_grad(), refused(file.name, "changed"):
        there(text())
    file.unlink()
    with torch.no_grad(), refused(file.name, "can't read"):
        there(text())
    assert live(there) == 0


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "a.B"}}, "Python code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"model_type": "nothing-known"}, "can't build"),
    ],
)
def test_configs_that_are_refused(own: Path, entry: dict[str, Any], words: str) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | entry))
    with refused(words, kind=LaminaError):
        opening(own)


@pytest.mark.parametrize("alike", [True, False])
def test_tied_weights_that_are_stored_twice(tmp_path: Path, alike: bool) -> None:
    path = saved(tiny("llama", tie_word_embeddings=True), tmp_path)
    file = shard(path, "model.embed_tokens.weight")
    weight = load_file(file)["model.embed_tokens.weight"]
    save_file({"lm_head.weight": weight if alike else weight.flip(0)}, path / "head.safetensors")
    found = json.loads((path / "model.safetensors.index.json").read_text())
    found["weight_map"]["lm_head.weight"] = "head.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(found))
    loaded, there = load_weights(path, dtype=torch.float32), opening(path)
    tied = there.get_parameter("lm_head.weight") is there.get_parameter("model.embed_tokens.weight")
    assert tied == alike
    with torch.no_grad():
        assert torch.equal(there(text()).logits, loaded(text()).logits)
    assert Anatomy.of(there).total() == Anatomy.of(loaded).total()


def test_weights_lie_where_safetensors_has_them(folder: Callable[..., Path]) -> None:
    """Kernels add up in another order where numbers are aligned otherwise."""
    loaded, there = load_weights(folder(), dtype=torch.float32), opening(folder())
    for name, weight in loaded.named_parameters():
        mine: Any = there.get_parameter(name)
        numbers = mine.numbers() if isinstance(mine, OnDisk) else mine
        assert numbers.data_ptr() % 64 == weight.data_ptr() % 64, name
        assert mine.requires_grad == weight.requires_grad


def test_one_file_without_an_index(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    with quiet():
        model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(opening(tmp_path)(text()).logits, model(text()).logits)


def test_a_checkpoint_with_code_of_its_own(tmp_path: Path) -> None:
    """A thinned one: some sublayers are gone, which its config alone can't say."""
    model: Any = tiny("llama")
    receipt = Drop().apply(Step(rewrite="drop", sites=("block.0.attention", "block.2.mlp")), Lab(model, text()))
    save_checkpoint(model, [receipt], None, tmp_path / "out")
    with refused("Python code"):
        opening(tmp_path / "out")
    there = open_streamed(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(there(text()).logits, model(text()).logits)
    memory = Lab(model, text(5, 12), batch_size=2)
    disk = Lab(there, text(5, 12), anatomy=anatomy_of(there), batch_size=2)
    expect_same(
        streamed(disk, tallies(disk.anatomy, ("cosine",)))[0], memory.stream(tallies(memory.anatomy, ("cosine",)))[0]
    )


# ---------------------------------------------------------------- what can't be surveyed block by block


def test_passes_of_one_module(tmp_path: Path) -> None:
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = AlbertConfig(vocab_size=99, num_hidden_layers=3, **sizes)
    there = opening(saved(lively(AlbertForMaskedLM(config)), tmp_path))
    lab = Lab(there, text(), anatomy=anatomy_of(there))
    with refused("passes of one module", kind=UnsupportedError):
        streamed(lab, [])


class Nosy(NanoGPT):
    """Its blocks are told something of what the one before gave."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            block.loud = 1 + x.mean()
            x = block(x)
        return self.head(self.norm(x))


def test_a_model_whose_blocks_depend_on_others_is_found_out() -> None:
    model = lively(Nosy(), loud=0.5).eval()
    for block in model.blocks:
        block.feeds.register_forward_hook(lambda _, __, out, block=block: out * block.loud)
    lab = Lab(model, text(), anatomy=Anatomy.of(model, {"input_ids": text(1, 7)}))
    with refused("depends on those before", kind=UnsupportedError):
        streamed(lab, [])


def test_a_model_in_memory_may_be_streamed_too() -> None:
    model = tiny("nanogpt")
    lab = Lab(model, text(5, 12), batch_size=2)
    expect_same(streamed(lab, tallies(lab.anatomy, ("cosine",)))[0], lab.stream(tallies(lab.anatomy, ("cosine",)))[0])
    assert weights_of(model) is None


def test_a_proof_that_borrowed_weights_spoil_is_made_again(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = open_streamed(folder(), dtype=torch.float32)
    weights, right, tried = weights_of(there), disk_module.prove, list[bool]()
    assert weights is not None

    def spoilt(anatomy: Anatomy, given: Any) -> None:
        tried.append(weights._lent is not None)
        if tried[-1]:
            raise UnsupportedError("infinite")
        right(anatomy, given)

    monkeypatch.setattr(disk_module, "prove", spoilt)
    lab = Lab(there, text(), anatomy=anatomy_of(there))
    streamed(lab, [])
    assert tried == [True, True, False]
    streamed(lab, [])
    assert len(tried) == 3


@pytest.mark.parametrize("why", ["products", "certificate"])
def test_where_weights_decide_what_is_computed_nothing_is_borrowed(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """As if, with borrowed weights, more was computed, or the certificate did not hold afterwards."""
    there, certify = open_streamed(folder(), dtype=torch.float32), Anatomy.certify
    weights = weights_of(there)
    assert weights is not None
    count = iter([1, 0])

    class Odd(Flops):
        def __init__(self) -> None:
            super().__init__()
            self.total = next(count)

    def failing(self: Anatomy, sample: Any = None) -> Any:
        monkeypatch.setattr(Anatomy, "certify", certify)
        raise CertificateError("off")

    if why == "products":
        monkeypatch.setattr(disk_module, "Flops", Odd)
    else:
        monkeypatch.setattr(Anatomy, "certify", failing)
    anatomy = anatomy_of(there)
    assert anatomy.total() == Anatomy.of(load_weights(folder(), dtype=torch.float32)).total()
    assert min(weights.block_reads().values()) > 2
