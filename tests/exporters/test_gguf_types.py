"""Rounded maps in GGUF files: bit for bit what is in memory, and llama.cpp computes with the very same numbers."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFReader, LlamaFileType, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig as Config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lamina.core.documents import ModelRef, Receipt, Receipts, Step
from lamina.core.errors import UnsupportedError
from lamina.core.registry import REWRITES
from lamina.exporters._gguf_tensors import interleave
from lamina.exporters.gguf import Gguf
from lamina.lab import Lab
from lamina.maths.grids import BLOCK, SIMPLE, blocks_of
from lamina.maths.kquants import KGRIDS

GRIDS = {grid.name: grid for grid in SIMPLE}
TINY = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
PLACES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
HEAD = 16
LETTER = 34
"""The token of "A": two special tokens, then the bytes from "!" on."""
PROMPTS = ("The capital of France", "Once upon a time", "def f(n):", "In 1969, the", "Water boils", "2 + 2 =")


def tiny(**options: Any) -> Any:
    """A random Llama whose norms have weights of their own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Config.for_model("llama", **(TINY | options)))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(PROMPTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def lab(model: Any) -> Lab:
    return Lab(model, torch.randint(2, 300, (4, 24), generator=torch.Generator().manual_seed(0)))


def round_all(bench: Lab, kind: str = "mixed", rewrite: str = "round") -> Receipt:
    """All maps rounded to one type, or each to another ("mixed")."""
    sites = [s.id for s in bench.anatomy.linears()]
    types = {s: list(GRIDS)[n % 5] for n, s in enumerate(sites)} if kind == "mixed" else kind
    return REWRITES.make(rewrite).apply(Step(rewrite=rewrite, sites=tuple(sites), options={"type": types}), bench)


def run(tokenizer: Any, *receipts: Receipt) -> SimpleNamespace:
    return SimpleNamespace(tokenizer=tokenizer, receipts=receipts, name="tiny")


def tensors(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Name → its type in the file and what it reads as, rows in transformers' order."""
    found = {}
    for t in GGUFReader(path).tensors:
        read = torch.from_numpy(dequantize(t.data, t.tensor_type).copy())
        if ".attn_q." in t.name or ".attn_k." in t.name:
            places = interleave(torch.arange(len(read)), HEAD)
            read = torch.empty_like(read).index_copy(0, places, read)
        found[t.name] = (t.tensor_type.name, read)
    return found


def type_at(receipt: Receipt, site: str) -> str:
    kind = receipt.options["type"]
    return kind if isinstance(kind, str) else kind[site]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize(
    ("rewrite", "kind"),
    [*((r, k) for r in ("round", "gptq") for k in (*GRIDS, "mixed")), ("rsq", "mixed"), ("sliderquant", "mixed")],
)
def test_the_file_holds_what_memory_holds(kind: str, rewrite: str, dtype: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    bench = lab(model)
    receipt = round_all(bench, kind, rewrite)
    exporter = Gguf(dtype=dtype)
    assert exporter.check((receipt,), model, tokenizer) == []
    (path,) = exporter.export(model, run(tokenizer, receipt), tmp_path)
    held = tensors(path)
    for n in range(4):
        for name, place in PLACES.items():
            got, read = held[f"blk.{n}.{name}.weight"]
            site = f"block.{n}.{'attention' if place.startswith('self') else 'mlp'}.{place.partition('.')[2]}"
            assert got == type_at(receipt, site), site
            assert torch.equal(read, model.get_submodule(f"model.layers.{n}.{place}").weight), site
    rest = {t for name, (t, read) in held.items() if not any(p in name for p in PLACES) and read.ndim > 1}
    assert rest == {dtype.upper()}


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8}


@pytest.mark.parametrize(("kind", "rewrite"), [*((k, "round") for k in KGRIDS), ("each", "round"), ("each", "gptq")])
def test_types_with_two_levels(kind: str, rewrite: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(**WIDE, num_hidden_layers=2)
    bench = lab(model)
    sites = [s.id for s in bench.anatomy.linears()]
    several = (*KGRIDS, "Q8_0", "Q4_1")
    types = {s: several[n % len(several)] for n, s in enumerate(sites)} if kind == "each" else kind
    step = Step(rewrite=rewrite, sites=tuple(sites), options={"type": types})
    receipt = REWRITES.make(rewrite).apply(step, bench)
    (path,) = Gguf().export(model, run(tokenizer, receipt), tmp_path)
    held = tensors(path)
    for n in range(2):
        for name, place in PLACES.items():
            got, read = held[f"blk.{n}.{name}.weight"]
            site = f"block.{n}.{'attention' if place.startswith('self') else 'mlp'}.{place.partition('.')[2]}"
            assert got == type_at(receipt, site), site
            assert torch.equal(read, model.get_submodule(f"model.layers.{n}.{place}").weight), site
    server, prompts = engine(path), [tokenizer(p).input_ids for p in PROMPTS[:4]]
    assert max(errors(server, model, prompts)) < 8e-2
    if kind in KGRIDS:
        with torch.no_grad():
            for site in bench.anatomy.linears():
                model.get_submodule(site.path).register_forward_pre_hook(lambda _, args: eight_bits(args[0]))
        assert min(errors(server, model, prompts)) < 1e-5


def eight_bits(x: Tensor) -> Tensor:
    """What enters a product with a type of two levels, as ggml rounds it: 256 inputs to a step."""
    cut = x.unflatten(-1, (-1, 256))
    top = cut.gather(-1, cut.abs().argmax(-1, keepdim=True))
    inverse = -127 / top
    return ((inverse * cut).round().clamp_max(127) / inverse).flatten(-2)


def test_the_file_takes_the_bytes_that_the_receipt_says(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    bench = lab(model)
    (dense,) = Gguf().export(model, run(tokenizer), tmp_path / "dense.gguf")
    receipt = round_all(bench)
    (path,) = Gguf().export(model, run(tokenizer, receipt), tmp_path / "rounded.gguf")
    saved = receipt.before.bytes - receipt.after.bytes
    assert abs(dense.stat().st_size - path.stat().st_size - saved) < 2048  # padding


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_models_in_bfloat16(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny().bfloat16()
    receipt = round_all(lab(model), kind, "gptq")
    (path,) = Gguf(dtype="bf16").export(model, run(tokenizer, receipt), tmp_path)
    held = tensors(path)
    for name, place in PLACES.items():
        got, read = held[f"blk.2.{name}.weight"]
        assert got == kind
        assert torch.equal(read, model.get_submodule(f"model.layers.2.{place}").weight.float()), name


def test_a_part_of_the_maps(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    bench = lab(model)
    sites = tuple(s.id for s in bench.anatomy.linears("block.1"))
    receipt = REWRITES.make("round").apply(Step(rewrite="round", sites=sites, options={"type": "Q5_0"}), bench)
    document = Receipts(model=ModelRef(name="x", fingerprint="sha256:0"), plan="sha256:0", receipts=(receipt,))
    made = SimpleNamespace(tokenizer=tokenizer, receipts=document, name="tiny")
    (path,) = Gguf().export(model, made, tmp_path / "a.gguf")
    typed = {name for name, (kind, _) in tensors(path).items() if kind == "Q5_0"}
    assert typed == {f"blk.1.{name}.weight" for name in PLACES}
    (bare,) = Gguf().export(model, tokenizer, tmp_path / "b.gguf")
    assert {kind for kind, _ in tensors(bare).values()} == {"F32"}


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("Q4_1", "MOSTLY_Q4_1"),
        ("Q8_0", "MOSTLY_Q8_0"),
        ("Q4_K", "MOSTLY_Q4_K_S"),
        ("Q6_K", "MOSTLY_Q6_K"),
        (None, "ALL_F32"),
    ],
)
def test_header_names_the_type(kind: str | None, wanted: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(**(WIDE if kind in KGRIDS else {}))
    receipts = () if kind is None else (round_all(lab(model), kind),)
    (path,) = Gguf().export(model, run(tokenizer, *receipts), tmp_path)
    (field,) = (f for k, f in GGUFReader(path).fields.items() if k == "general.file_type")
    assert LlamaFileType(field.contents()).name == wanted


def test_rounded_and_then_dropped(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    bench = lab(model)
    rounded = round_all(bench, "Q4_0")
    dropped = REWRITES.make("drop").apply(Step(rewrite="drop", sites=("block.1", "block.2.attention")), bench)
    (path,) = Gguf().export(bench.model, run(tokenizer, rounded, dropped), tmp_path)
    held = tensors(path)
    assert {kind for name, (kind, _) in held.items() if name.startswith("blk.1.ffn") and "norm" not in name} == {"Q4_0"}
    assert not any(name.startswith(("blk.1.attn", "blk.3.")) for name in held)
    assert len([kind for kind, _ in held.values() if kind == "Q4_0"]) == 7 + 3 + 7


def test_masks_are_written_and_other_attentions_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    bench = lab(model)
    sites = tuple(s.id for s in bench.anatomy.linears("block.1"))
    masks = [
        REWRITES.make(n).apply(Step(rewrite=n, sites=sites, options={"pattern": "2:4"}), bench)
        for n in ("magnitude", "wanda", "sparsegpt")
    ]
    (path,) = Gguf().export(model, run(tokenizer, *masks), tmp_path)
    assert float((tensors(path)["blk.1.ffn_up.weight"][1] == 0).double().mean()) >= 0.5
    for name, options in (("window", {"window": 4}), ("linear-attention", {"ridge": 0})):
        receipt = REWRITES.make(name).apply(Step(rewrite=name, sites=("block.2.attention",), options=options), bench)
        (problem,) = Gguf().check((receipt,), model)
        assert "alone" in problem.what


@pytest.mark.parametrize("what", ["trained", "one number"])
def test_maps_that_changed_since_are_told(what: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    receipt = round_all(lab(model), "Q4_0")
    weight = model.model.layers[2].mlp.up_proj.weight
    with torch.no_grad():
        if what == "trained":
            weight += 1e-4 * torch.randn_like(weight)
        else:
            weight[5, 40] = torch.nextafter(weight[5, 40], torch.tensor(9.0))
    with pytest.raises(UnsupportedError, match=r"1 of 28 rounded maps do not lie on the grid of Q4_0.*round them last"):
        Gguf().export(model, run(tokenizer, receipt), tmp_path)
    assert not list(tmp_path.iterdir())


def engine(path: Path) -> Any:
    """llama.cpp on one thread."""
    x = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed (pip install xllamacpp)")
    options = x.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.n_gpu_layers = 128, 1, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = x.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.warmup, options.fit_params, options.verbosity = False, False, -1
    return x.Server(options)


def engine_logits(server: Any, ids: list[int]) -> Tensor:
    """Log-probabilities [vocabulary] of the token after these."""
    body = {"prompt": ids, "n_predict": 1, "n_probs": TINY["vocab_size"], "temperature": 0, "cache_prompt": False}
    body["logit_bias"] = [[LETTER, 1000.0]]  # an answer that is its end, or half a letter, comes without probabilities
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        rows = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
    out = torch.full((int(TINY["vocab_size"]),), float("nan"))
    for row in rows:
        out[row["id"]] = row["logprob"]
    return out


@torch.no_grad()
def torch_logits(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


class AsGgml(nn.Module):
    """A map as ggml computes it: its input is rounded to Q8_0; a lowest value meets the block's sum, in float16."""

    def __init__(self, weight: Tensor, kind: str) -> None:
        super().__init__()
        grid = GRIDS[kind]
        scales = grid.found(blocks_of(weight))
        assert scales is not None
        self.low, self.offset = scales.low.squeeze(-1), grid.offset
        self.rest = weight - scales.low.expand(-1, -1, BLOCK).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q8, cut = GRIDS["Q8_0"], blocks_of(x)
        scales = q8.scales(cut)
        out = functional.linear(q8.nearest(cut, scales).flatten(-2), self.rest)
        if not self.offset:
            return out
        step = cut.abs().amax(-1) / 127
        return out + (step * q8.codes(cut, scales).sum(-1)).half().float() @ self.low.T


def errors(server: Any, model: Any, prompts: list[list[int]]) -> list[float]:
    """Largest difference over largest logit, prompt by prompt."""
    found = []
    for ids in prompts:
        wanted = torch_logits(model, ids)
        found.append(float((engine_logits(server, ids) - wanted).abs().max() / (wanted - wanted.mean()).abs().max()))
    return found


@pytest.mark.parametrize("kind", ["mixed", *GRIDS])
def test_llamacpp_computes_with_the_same_numbers(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """llama.cpp rounds what enters a product to eight bits: that is all that sets it apart from torch.

    Where torch does the same they agree to float32's last digits, unless an input lies just between two codes.
    """
    model = tiny()
    bench = lab(model)
    receipt = round_all(bench, kind)
    (path,) = Gguf().export(model, run(tokenizer, receipt), tmp_path)
    assert tokenizer("A").input_ids == [LETTER]
    prompts = [tokenizer(p).input_ids for p in PROMPTS]
    server = engine(path)
    plain = errors(server, model, prompts)
    with torch.no_grad():
        for site in bench.anatomy.linears():
            module = model.get_submodule(site.path)
            model.set_submodule(site.path, AsGgml(module.weight, type_at(receipt, site.id)))
    same = errors(server, model, prompts)
    assert max(plain) < 4e-2
    assert max(same) < 3e-2
    assert min(same) < 1e-5


@pytest.mark.real
def test_smollm2_is_on_the_grid_of_its_file() -> None:
    """It comes as Q4_1: what was read from the file is written as the file's own bytes, whoever chose them."""
    from lamina.lab.load import load

    loaded = load("smollm2-135m", dtype="float32")
    assert loaded.path is not None
    held = {t.name: t for t in GGUFReader(loaded.path).tensors}
    for n in (0, 13, 29):
        for name, place in PLACES.items():
            theirs = held[f"blk.{n}.{name}.weight"]
            assert theirs.tensor_type.name == "Q4_1"
            weight = loaded.model.get_submodule(f"model.layers.{n}.{place}").weight.detach()
            turned = interleave(weight, 64) if name in ("attn_q", "attn_k") else weight
            written = GRIDS["Q4_1"].written(turned)
            assert written is not None
            assert torch.equal(written.reshape(-1), torch.from_numpy(theirs.data.copy()).reshape(-1)), theirs.name
