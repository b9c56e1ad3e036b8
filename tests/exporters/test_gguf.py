"""GGUF files run by llama.cpp itself: the same tokens from the same text, and the same greedy continuation."""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, dequantize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig as Config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lamina.anatomy.families import llama_gguf as family
from lamina.core.documents import Receipt
from lamina.core.errors import CertificateError, InputError, UnsupportedError
from lamina.core.sites import Cost
from lamina.exporters._gguf_tensors import BlockWeights, extract
from lamina.exporters._gguf_vocab import pre_tokenizer_name
from lamina.exporters._gguf_write import write_gguf
from lamina.exporters.gguf import Gguf
from lamina.rewrites.structure import Gone, Group

TEXT = (
    "The capital of France is Paris, and the river that runs through it is the Seine. It's 1969: we've counted 12345 "
    "steps; they'll say déjà vu! def add(a, b):\n    return a + b\n\n\tNaïve café — 日本語 नमस्ते 🙂 ... WE'LL   see.  "
)
PROMPTS = (
    "The capital of France is", "Once upon a time there was", "def fibonacci(n):\n", "In 1969, the first men",
    "Water boils at 100 degrees", "My favourite food isn't", "The three laws of robotics are",
    "Dear Sir,\n\nI am writing", "She opened the door and", "2 + 2 =",
)  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


Blocks = tuple[int, ...]


def thin(model: Any, *, blocks: Blocks = (), attention: Blocks = (), mlp: Blocks = ()) -> Any:
    """Drop blocks and sublayers by hand, in lamina's structure."""
    kept: list[Any] = []
    waiting: list[Any] = []
    for index, layer in enumerate(model.model.layers):
        if index in blocks:
            continue
        if index in mlp:
            layer.mlp, layer.post_attention_layernorm = Gone(), nn.Identity()
        if index in attention:
            layer.self_attn, layer.input_layernorm = Gone("hidden_states", [(0, 2)]), nn.Identity()
            if not kept:
                waiting.append(layer)
                continue
            if not isinstance(kept[-1], Group):
                kept[-1] = Group([kept[-1]], 0)
            kept[-1].append(layer)
            continue
        layer.self_attn.layer_idx = len(kept)
        kept.append(Group([*waiting, layer], len(waiting)) if waiting else layer)
        waiting = []
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model


def tiny(kind: str = "llama", seed: int = 0, **options: Any) -> Any:
    """A random model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(Config.for_model(kind, **(TINY | options)))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "norm" in name else torch.randn_like(tensor) * 0.2)
    return model.eval()


def bpe(pre: Any, *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on TEXT."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer, core.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT, *PROMPTS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def pre_of(row: family.PreTokenizer) -> Any:
    """The pre-tokenizer that a row of the table describes."""
    build: dict[str, Callable[[Any], Any]] = {
        "bytes": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
        "digits": lambda each: pre_tokenizers.Digits(individual_digits=each),
        "split": lambda regex: pre_tokenizers.Split(Regex(regex), behavior="isolated"),
    }
    return pre_tokenizers.Sequence([build[kind](option) for kind, option in row.steps])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))


class LlamaCpp:
    """llama.cpp on one thread, float32 cache, greedy."""

    def __init__(self, path: Path) -> None:
        x = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed (pip install xllamacpp)")
        options = x.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.n_gpu_layers = 256, 1, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.cache_type_k = options.cache_type_v = x.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.warmup, options.fit_params, options.verbosity = False, False, -1
        self.server = x.Server(options)
        self.greedy([2], 1)  # a server that has completed nothing may hang when it is closed

    def _ask(self, what: str, body: dict[str, Any]) -> list[int]:
        data = json.dumps(body).encode()
        url = f"{self.server.listening_address}/{what}"
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
            return json.load(answer)["tokens"]

    def tokens(self, text: str) -> list[int]:
        return self._ask("tokenize", {"content": text, "add_special": True})

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        options = {"temperature": 0, "samplers": ["temperature"], "cache_prompt": False, "return_tokens": True}
        return self._ask("completion", {"prompt": prompt, "n_predict": n, **options})


def generate(model: Any, prompts: list[list[int]], n: int) -> list[list[int]]:
    """transformers' greedy continuations of all prompts, in one left-padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[1] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    return model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False)[:, longest:].tolist()


def agree(model: Any, tokenizer: Any, path: Path, *, n: int, stops: set[int]) -> int:
    """How many tokens transformers and llama.cpp agree on, greedily, over all prompts; fails on the first other one."""
    engine = LlamaCpp(path)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    total = 0
    for prompt, ids, ours in zip(PROMPTS, prompts, generate(model, prompts, n), strict=True):
        assert engine.tokens(prompt) == ids
        theirs = engine.greedy(ids, n)
        want, got = (list(itertools.takewhile(lambda t: t not in stops, row)) for row in (ours, theirs))
        assert got == want, prompt
        total += len(want)
    return total


def header(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("llama", {}, {}),
    "tied": ("llama", {}, {"tie_word_embeddings": True}),
    "blocks": ("llama", {"blocks": (1, 3)}, {}),
    "one block left": ("llama", {"blocks": (0, 1, 3, 4)}, {}),
    "attention": ("deci", {"attention": (2,)}, {}),
    "attention of block 0": ("deci", {"attention": (0,)}, {}),
    "attentions of blocks 0 and 1": ("deci", {"attention": (0, 1)}, {"tie_word_embeddings": True}),
    "attention of the last block": ("deci", {"attention": (3, 4)}, {}),
    "mlp": ("deci", {"mlp": (1,)}, {}),
    "mlps of the first and the last block": ("deci", {"mlp": (0, 4)}, {}),
    "everything": ("deci", {"blocks": (2,), "attention": (0, 3), "mlp": (1,)}, {}),
    "query, key and value biases": ("deci", {"attention": (1,)}, {"kind": "qwen2"}),
    "all biases": ("llama", {}, {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("deci", {"attention": (0, 2)}, {"kind": "qwen2", "head_dim": 32}),
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_llamacpp_continues_as_transformers_does(case: str, tokenizer: Any, tmp_path: Path) -> None:
    architecture, cuts, options = CASES[case]
    model = thin(tiny(**options), **cuts)
    assert Gguf().check((), model, tokenizer) == []
    (path,) = Gguf().export(model, tokenizer, tmp_path)
    assert header(path)["general.architecture"] == architecture
    assert agree(model, tokenizer, path, n=16, stops={1}) > 50


@pytest.mark.parametrize("kind", ROPES)
def test_static_rotary_scaling_is_exact(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    model = thin(tiny(rope_parameters={"rope_type": kind, **ROPES[kind]}), attention=(0, 2))
    (path,) = Gguf().export(model, tokenizer, tmp_path / "scaled.gguf")
    assert path == tmp_path / "scaled.gguf"
    agree(model, tokenizer, path, n=24, stops={1})


def test_header_says_what_is_gone(tokenizer: Any, tmp_path: Path) -> None:
    model = thin(tiny(), blocks=(2,), attention=(0, 3), mlp=(1,))
    (path,) = Gguf().export(model, tokenizer, tmp_path)
    said = header(path)
    assert said["deci.attention.head_count"] == [1, 4, 0, 4]
    assert said["deci.attention.head_count_kv"] == [1, 2, 0, 2]
    assert said["deci.feed_forward_length"] == [96, 32, 96, 96]
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    assert not tensors["blk.0.attn_output.weight"].any()
    assert not tensors["blk.1.ffn_down.weight"].any()
    assert not any(name.startswith("blk.2.attn") for name in tensors)
    assert len(said["tokenizer.ggml.tokens"]) == 512
    assert said["tokenizer.ggml.tokens"][-1] == "[PAD511]"


def test_uneven_heads_and_widths(tokenizer: Any, tmp_path: Path) -> None:
    """Blocks may differ in heads and neurons; the reference is the model with the cut parts at zero."""
    model = tiny()
    block, dim = model.model.layers[2], 16
    with torch.no_grad():
        block.self_attn.o_proj.weight[:, 2 * dim :] = 0
        block.mlp.down_proj.weight[:, 64:] = 0
    whole = extract(model)
    b = whole.blocks[2]
    cut = BlockWeights(
        attn_norm=b.attn_norm, q=b.q[: 2 * dim], k=b.k[:dim], v=b.v[:dim], o=b.o[:, : 2 * dim],  # type: ignore[index]
        ffn_norm=b.ffn_norm, gate=b.gate[:64], up=b.up[:64], down=b.down[:, :64],  # type: ignore[index]
    )  # fmt: skip
    blocks = (*whole.blocks[:2], cut, *whole.blocks[3:])
    path = tmp_path / "uneven.gguf"
    write_gguf(path, model.config, blocks, whole.embedding, whole.final_norm, whole.head, tokenizer)
    assert header(path)["deci.attention.head_count"] == [4, 4, 2, 4, 4]
    agree(model, tokenizer, path, n=16, stops={1})


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_sixteen_bits(dtype: str, tokenizer: Any, tmp_path: Path) -> None:
    model = thin(tiny(), attention=(0,), mlp=(2,))
    (path,) = Gguf(dtype=dtype).export(model, tokenizer, tmp_path)
    held = {t.name: t for t in GGUFReader(path).tensors}
    assert {t.tensor_type.name for t in held.values() if len(t.shape) > 1} == {dtype.upper()}
    up = held["blk.1.ffn_up.weight"]
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    want = model.model.layers[0][1].mlp.up_proj.weight.detach().to(kind).float()
    assert torch.equal(torch.from_numpy(dequantize(up.data, up.tensor_type)), want)
    prompt = tokenizer(PROMPTS[0]).input_ids
    assert len(LlamaCpp(path).greedy(prompt, 8)) == 8


@pytest.mark.parametrize("row", family.PRE_TOKENIZERS, ids=lambda row: row.name)
def test_text_is_split_as_llamacpp_splits_it(row: family.PreTokenizer, tmp_path: Path) -> None:
    tokenizer = bpe(pre_of(row), ignore_merges=row.ignore_merges)
    assert pre_tokenizer_name(json.loads(tokenizer.backend_tokenizer.to_str())) == row.name
    (path,) = Gguf().export(thin(tiny(), blocks=(1, 2, 3)), tokenizer, tmp_path)
    engine = LlamaCpp(path)
    for text in (TEXT, *PROMPTS, "it'S 'Twas\r\n\r\n  x\n \n99 1/2 a1b22 ¿Qué? e\u0301 ½ ٣٤", " \t ", "…!!\n\n'"):
        assert engine.tokens(text) == tokenizer(text).input_ids, text


def test_begin_token_and_template_travel(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = tiny()
    (first,) = Gguf().export(model, tokenizer, tmp_path / "first.gguf")
    assert header(first)["tokenizer.chat_template"] == tokenizer.chat_template
    assert LlamaCpp(first).tokens(PROMPTS[0]) == tokenizer(PROMPTS[0]).input_ids
    (second,) = Gguf().export(model, first, tmp_path / "second.gguf")
    names = [key for key in header(first) if key.startswith("tokenizer.")]
    assert {key: header(first)[key] for key in names} == {key: header(second)[key] for key in names}
    tokenizer.save_pretrained(tmp_path / "folder")
    (third,) = Gguf().export(model, tmp_path / "folder", tmp_path / "third.gguf")
    assert header(third)["tokenizer.ggml.tokens"] == header(first)["tokenizer.ggml.tokens"]


def test_same_input_same_bytes(tokenizer: Any, tmp_path: Path) -> None:
    files = [Gguf().export(tiny(), tokenizer, tmp_path / name / "m.gguf")[0] for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "QK-norm": ("qwen3", {"head_dim": 16}, "QK-norm"),
    "post norms": ("olmo2", {}, "QK-norm|norms after"),
    "experts": ("mixtral", {"num_local_experts": 2}, "mixture of experts"),
    "no blocks": ("gpt2", {}, "not a Llama-like"),
    "activation": ("llama", {"hidden_act": "gelu"}, "SiLU"),
    "window": ("mistral", {"sliding_window": 16}, "16 tokens"),
    "dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "length",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_hold_is_refused(case: str, tokenizer: Any, tmp_path: Path) -> None:
    kind, options, reason = REFUSED[case]
    model = tiny(kind, **options)
    problems = Gguf().check((), model)
    assert problems
    with pytest.raises(UnsupportedError, match=reason):
        Gguf().export(model, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_scales_are_measured(dtype: torch.dtype, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("granite", residual_multiplier=0.98).to(dtype)
    with pytest.raises(CertificateError, match="logits differ"):
        Gguf().export(model, tokenizer, tmp_path)


def words() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def endless() -> PreTrainedTokenizerFast:
    tokenizer = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.eos_token = None
    return tokenizer


VOCABULARIES: dict[str, Callable[[], Any]] = {
    "pre-tokenizer": lambda: bpe(pre_tokenizers.Whitespace()),
    "a space before": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "merges of whole words": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), ignore_merges=True),
    "WordLevel": words,
    "end-of-sequence": endless,
}


@pytest.mark.parametrize("reason", VOCABULARIES)
def test_tokenizers_that_llamacpp_would_split_differently(reason: str, tmp_path: Path) -> None:
    source = VOCABULARIES[reason]()
    assert [reason in problem.what for problem in Gguf().check((), None, source)] == [True]
    with pytest.raises(UnsupportedError, match=reason):
        Gguf().export(tiny(), source, tmp_path)


def test_nothing_is_half_written(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    (path,) = Gguf().export(model, tokenizer, tmp_path)
    before = path.read_bytes()
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[0, 0] = 1e6
    with pytest.raises(UnsupportedError, match="range of f16"):
        Gguf(dtype="f16").export(model, tokenizer, tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_receipts_are_judged_without_a_model() -> None:
    def receipt(rewrite: str, *sites: str) -> Receipt:
        return Receipt(rewrite=rewrite, sites=sites, before=Cost(), after=Cost())

    fine = (receipt("drop", "block.3", "block.5.attention", "block.0.mlp"), receipt("merge", "block.7"))
    assert Gguf().check(fine) == []
    for bad in (receipt("replace", "block.3.mlp"), receipt("drop", "block.1.moe"), receipt("unheard-of", "block.1")):
        (problem,) = Gguf().check((*fine, bad))
        assert problem.where == bad.sites[0]


def test_wrong_options_and_sources_are_told(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="f32, f16, bf16"):
        Gguf(dtype="q4")
    for source in (object(), tmp_path, __file__):
        with pytest.raises(InputError):
            Gguf().export(tiny(), source, tmp_path)


@pytest.mark.real
@pytest.mark.parametrize(
    ("cuts", "architecture"),
    [
        pytest.param({}, "llama", id="dense", marks=pytest.mark.slow),
        pytest.param({"blocks": (11, 20, 24)}, "llama", id="three blocks gone", marks=pytest.mark.slow),
        pytest.param({"attention": (10, 15, 21, 25)}, "deci", id="four attentions gone", marks=pytest.mark.slow),
    ],
)
def test_smollm2(cuts: dict[str, Any], architecture: str, tmp_path: Path) -> None:
    from lamina.lab.load import load

    loaded = load("smollm2-135m", dtype="float32")
    model: Any = thin(loaded.model, **cuts)
    (path,) = Gguf().export(model, loaded, tmp_path)
    assert header(path)["general.architecture"] == architecture
    assert agree(model, loaded.tokenizer, path, n=24, stops={0, 2}) > 100
