"""Texts: every source comes in, the splits stay apart, and bad input is one clear line."""

from __future__ import annotations

import json
import lzma
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lamina.core.documents import Data
from lamina.core.errors import InputError
from lamina.lab import sources, texts
from lamina.lab.texts import Tokens, overlap, prepare

WORDS = [f"w{i}" for i in range(3000)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token for each word `w0` … `w2999`; 0 is unknown, 1 ends a document."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {w: i + 2 for i, w in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


def words(start: int, count: int) -> str:
    return " ".join(WORDS[i % len(WORDS)] for i in range(start, start + count))


def two(calibration: object, heldout: object, **more: Any) -> Data:
    more = {"length": 8, "sequences": 3, "heldout_sequences": 4} | more
    return Data(calibration=str(calibration), heldout=str(heldout), **more)


def refused(data: Data, tokenizer: Any, *parts: str) -> str:
    with pytest.raises(InputError) as caught:
        prepare(data, tokenizer)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line
    return line


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A held-out text that shares no run of words with what the tests calibrate on."""
    path = tmp_path / "other.txt"
    path.write_text(" ".join(WORDS[(i * 7) % 3000] for i in range(200)))
    return path


# ---------------------------------------------------------------- packing


def test_packed_blocks_are_the_text(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    for n, text in enumerate([words(0, 10), words(100, 13)]):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / f"{n}.txt").write_text(text)
    tokens = prepare(two(tmp_path / "docs", other), tokenizer)
    stream = [*range(2, 12), 1, *range(102, 115)]
    assert tokens.calibration.tolist() == [stream[0:8], stream[8:16], stream[16:24]]
    assert tokens.heldout.shape == (4, 8)
    assert tokens.calibration.dtype == torch.int64
    assert tokens.sources == ("calibration: docs/", "held-out: other.txt")
    assert tokens.warnings == ()


def test_few_sequences_cover_many_documents(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    rows = [json.dumps({"text": words(100 * n, 100)}) for n in range(20)]
    (tmp_path / "docs.jsonl").write_text("\n".join(rows))
    tokens = prepare(two(tmp_path / "docs.jsonl", other, sequences=10), tokenizer)
    documents = {int(block[-1] - 2) // 100 for block in tokens.calibration}
    assert len(documents) == 10


def test_same_seed_same_blocks(tokenizer: Any, tmp_path: Path, other: Path) -> None:
    (tmp_path / "long.txt").write_text(words(0, 2500))
    data = two(tmp_path / "long.txt", other)
    one, again, moved = (prepare(data, tokenizer, seed=s) for s in (0, 0, 1))
    assert one.fingerprint == again.fingerprint != moved.fingerprint
    assert torch.equal(one.calibration, again.calibration)


def test_long_sources_are_read_in_stretches(tokenizer: Any, tmp_path: Path, other: Path) -> None:
    rows = [json.dumps({"text": words(37 * n, 400)}) for n in range(60)]
    (tmp_path / "docs.jsonl").write_text("\n".join(rows))
    tokens = prepare(two(tmp_path / "docs.jsonl", other, sequences=2), tokenizer)
    assert tokens.calibration.shape == (2, 8)
    kept = texts._ample([words(0, 400)] * 60, 4000, 64, np.random.default_rng(0))
    assert 3000 < sum(map(len, kept)) < 5000
    assert len(kept) == 60
    kept = texts._ample([words(0, 400)] * 600, 4000, 64, np.random.default_rng(0))
    assert len(kept) == 63
    assert all(len(k) <= 64 for k in kept)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50), st.integers(1, 20000))
def test_level_fills_the_total(sizes: list[int], total: int) -> None:
    level = texts._level(np.array(sizes), total)
    held = sum(min(s, level) for s in sizes)
    assert held <= max(total, 0) or sum(sizes) < total
    assert held > total - len(sizes) or sum(sizes) <= total


def test_no_end_of_sequence_token(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    (tmp_path / "docs").mkdir()
    for n in range(2):
        (tmp_path / "docs" / f"{n}.txt").write_text(words(100 * n, 12))
    tokens = prepare(two(tmp_path / "docs", other), bare)
    assert 1 not in tokens.calibration.flatten().tolist()


# ---------------------------------------------------------------- sources


def test_every_kind_of_file(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    text = words(0, 24)
    (tmp_path / "a.md").write_text(text)
    (tmp_path / "a.py").write_text(text)
    (tmp_path / "noname").write_text(text)
    (tmp_path / "bom.txt").write_text(text, encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text, "id": 1}) + "\n\n")
    polars.DataFrame({"text": [text, None], "id": [1, 2]}).write_parquet(tmp_path / "a.parquet")
    save_file({"input_ids": torch.arange(2, 26, dtype=torch.int32)[None]}, tmp_path / "a.safetensors")
    marks = set()
    for name in ("a.md", "a.py", "noname", "bom.txt", "a.jsonl", "a.parquet", "a.safetensors"):
        tokens = prepare(two(tmp_path / name, other), tokenizer)
        marks.add(tokens.fingerprint)
    assert len(marks) == 1
    assert tokens.calibration.flatten().tolist() == list(range(2, 26))


def test_column(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": words(0, 24), "n": 3}))
    polars.DataFrame({"content": [words(0, 24)], "n": [3]}).write_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        prepare(two(tmp_path / name, other, column="content"), tokenizer)
        refused(two(tmp_path / name, other, column="contnet"), tokenizer, name, "did you mean content?")
        refused(two(tmp_path / name, other, column="n"), tokenizer, name, "'n' holds", "not text")


def test_folder(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    root = tmp_path / "docs"
    (root / "b" / ".hidden").mkdir(parents=True)
    (root / "b" / ".hidden" / "x.txt").write_text(words(500, 24))
    (root / "b" / "1.txt").write_text(words(8, 8))
    (root / "a.rst").write_text(words(0, 7))
    (root / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    tokens = prepare(two(root, other, sequences=2), tokenizer)
    assert tokens.calibration.flatten().tolist() == [*range(2, 9), 1, *range(10, 18)]
    assert tokens.warnings == ("docs/: 1 files that are not UTF-8 text were passed over",)


def test_token_files(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    path = tmp_path / "ids.safetensors"
    rows = torch.arange(2, 50).reshape(6, 8)
    save_file({"input_ids": rows}, path)
    assert torch.equal(prepare(two(other, path, heldout_sequences=6), tokenizer).heldout, rows)
    assert torch.equal(prepare(two(path, path, heldout_sequences=3), None).calibration, rows[:3])
    refused(two(other, path, length=9), tokenizer, "hold 8 tokens", "one sequence of 9")
    save_file({"input_ids": rows + 3000}, path)
    refused(two(other, path), tokenizer, "token ids from 3002 to 3049", "another tokenizer")
    save_file({"input_ids": rows.float()}, path)
    refused(two(other, path), tokenizer, "whole numbers", "float32")
    save_file({"input_id": rows}, path)
    refused(two(other, path), tokenizer, "did you mean input_id?")
    path.write_bytes(path.read_bytes()[:-8])
    refused(two(other, path), tokenizer, "truncated")


def test_hugging_face_data_set(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra lamina[datasets]")
    table = datasets.Dataset.from_dict({"text": [words(0, 12), "", words(100, 11)]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "many")
    marks = {
        prepare(two(spec, other), tokenizer).fingerprint
        for spec in (tmp_path / "one", f"hf:{tmp_path / 'one'}", tmp_path / "many", f"hf:{tmp_path / 'many'}:test")
    }
    assert len(marks) == 1
    refused(two(f"hf:{tmp_path / 'many'}:tets", other), tokenizer, "no split 'tets'", "did you mean test?")
    refused(two(tmp_path / "one", other, column="txt"), tokenizer, "did you mean text?")
    refused(two("hf:nobody/nothing", other), tokenizer, "hf:nobody/nothing: can't load this data set")
    refused(two("hf:a:b:c:d", other), tokenizer, "hf:NAME:CONFIG:SPLIT")


def test_data_sets_library_missing(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, other: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(two("hf:wikitext", other), tokenizer, "pip install 'lamina[datasets]'")


@pytest.mark.parametrize(
    ("rest", "parts"),
    [
        ("a/b", ("a/b", None, None)),
        ("a/b:en", ("a/b", "en", None)),
        ("a/b:test", ("a/b", None, "test")),
        ("a/b:train[:5%]", None),
        ("a/b:en:validation", ("a/b", "en", "validation")),
        ("a/b::train", ("a/b", None, "train")),
    ],
)
def test_data_set_names(rest: str, parts: Any) -> None:
    if parts:
        assert sources._parts(rest) == parts


# ---------------------------------------------------------------- bad input


def test_bad_files(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    for name, raw, part in (
        ("zero.txt", b"abc\0def", "zero bytes"),
        ("latin.txt", b"caf\xe9 au lait", "byte 3 is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not valid JSON"),
        ("list.jsonl", b"[1]\n", "a JSON object is needed"),
        ("bad.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("empty.parquet", b"", "not a readable Parquet file"),
        ("empty.txt", b"", "the text is empty"),
        ("blank.txt", b" \n\n ", "the text is empty"),
        ("empty.jsonl", b"", "the text is empty"),
    ):
        (tmp_path / name).write_bytes(raw)
        refused(two(tmp_path / name, other), tokenizer, name, part)


def test_nothing_there(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    refused(two(tmp_path / "missing", other), tokenizer, "no such file or folder")
    refused(two("defualt", other), tokenizer, "did you mean default?")
    refused(two("", other), tokenizer, "no such file or folder")
    (tmp_path / "bare").mkdir()
    refused(two(tmp_path / "bare", other), tokenizer, "no text file in this folder")
    refused(two(other, other, length=0), tokenizer, "data.length")
    refused(two(other, "default"), None, "no tokenizer")


def test_too_little_text(tmp_path: Path, tokenizer: Any, other: Path) -> None:
    (tmp_path / "short.txt").write_text(words(0, 7))
    refused(two(tmp_path / "short.txt", other), tokenizer, "one sequence takes 8 tokens, there are 7")
    (tmp_path / "short.txt").write_text(words(0, 17))
    tokens = prepare(two(tmp_path / "short.txt", other), tokenizer)
    assert tokens.warnings == ("calibration: the text fills 2 of 3 sequences of 8 tokens",)
    (tmp_path / "short.txt").write_text(words(0, 15))
    refused(two(tmp_path / "short.txt", tmp_path / "short.txt"), tokenizer, "it has one")


def test_the_most_that_is_read(monkeypatch: Any, tmp_path: Path, tokenizer: Any, other: Path) -> None:
    monkeypatch.setattr(sources, "MOST", 100)
    (tmp_path / "long.txt").write_text(words(0, 400))
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"text": words(0, 20)})] * 5))
    for name in ("long.txt", "rows.jsonl"):
        tokens = prepare(two(tmp_path / name, other, sequences=1, heldout_sequences=1), tokenizer)
        assert f"{name}: only its first 100 characters are used" in tokens.warnings


# ---------------------------------------------------------------- apart


def blocks_apart(tokens: Tokens) -> None:
    assert overlap(tokens.calibration, tokens.heldout) == 0
    assert not tokens.warnings


def test_one_source_is_parted_by_documents(tmp_path: Path, tokenizer: Any) -> None:
    rows = [json.dumps({"text": words(100 * n, 60)}) for n in range(12)]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(rows))
    data = two(path, tmp_path / "x" / ".." / "docs.jsonl", sequences=20, heldout_sequences=40)
    (tmp_path / "x").mkdir()
    tokens = prepare(data, tokenizer)
    blocks_apart(tokens)
    sides = [{(int(t) - 2) // 100 for t in side.flatten() if t > 1} for side in (tokens.calibration, tokens.heldout)]
    assert not sides[0] & sides[1]
    assert len(tokens.calibration) == 20
    assert len(tokens.heldout) == 40


def test_one_document_is_cut_in_two(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "book.txt"
    path.write_text(words(0, 64))
    tokens = prepare(two(path, path, sequences=4, heldout_sequences=4), tokenizer)
    assert torch.cat([tokens.calibration, tokens.heldout]).flatten().tolist() == list(range(2, 66))
    blocks_apart(tokens)


def test_overlap_of_two_sources_is_told(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text(words(0, 256))
    (tmp_path / "b.txt").write_text(words(128, 256))
    data = two(tmp_path / "a.txt", tmp_path / "b.txt", length=64, sequences=4, heldout_sequences=4)
    (warning,) = prepare(data, tokenizer).warnings
    assert warning.startswith("50.0% of the held-out runs of 13 tokens")


def brute_force(calibration: torch.Tensor, heldout: torch.Tensor, width: int) -> float:
    def runs(blocks: torch.Tensor) -> list[tuple[int, ...]]:
        return [tuple(row[i : i + width]) for row in blocks.tolist() for i in range(len(row) - width + 1)]

    known = set(runs(calibration))
    held = runs(heldout)
    return sum(r in known for r in held) / len(held)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 4))
def test_overlap_oracle(seed: int, width: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, two_ = (torch.randint(vocabulary, (3, 9), generator=generator) for _ in range(2))
    assert overlap(one, two_, width) == pytest.approx(brute_force(one, two_, width))


# ---------------------------------------------------------------- the shipped prose


def rows(split: str) -> list[dict[str, str]]:
    packed = resources.files("lamina.lab").joinpath("prose", f"{split}.jsonl.xz").read_bytes()
    return [json.loads(line) for line in lzma.decompress(packed).decode().splitlines()]


def test_prose_is_ample_and_small() -> None:
    folder = resources.files("lamina.lab").joinpath("prose")
    assert sum(len(folder.joinpath(f"{s}.jsonl.xz").read_bytes()) for s in ("calibration", "heldout")) < 1_200_000
    for split, least in (("calibration", 150_000), ("heldout", 100_000)):
        documents = rows(split)
        assert sum(len(d["text"].split()) for d in documents) > least
        assert len(documents) > 50
        assert {d["licence"] for d in documents} <= {"public domain", "PSF-2.0", "BSD-3-Clause", "MIT OR Apache-2.0"}
        assert len({d["text"] for d in documents}) == len(documents)


def test_prose_splits_share_no_run_of_words() -> None:
    """No eleven words, numbers and marks in a row. For word parts see the test with a real vocabulary below."""

    def runs(split: str) -> set[int]:
        found = set()
        for row in rows(split):
            pieces = re.findall(r"\w+|[^\w\s]", row["text"])
            found.update(hash(tuple(pieces[i : i + 11])) for i in range(len(pieces) - 10))
        return found

    assert not runs("calibration") & runs("heldout")
    assert not {r["name"] for r in rows("calibration")} & {r["name"] for r in rows("heldout")}


def test_default_needs_no_warning(tokenizer: Any) -> None:
    tokens = prepare(Data(length=32, sequences=2, heldout_sequences=2), tokenizer)
    assert tokens.sources == ("calibration: lamina's prose, calibration", "held-out: lamina's prose, heldout")
    assert tokens.warnings == ()


@pytest.mark.real
def test_prose_splits_share_no_run_of_tokens() -> None:
    from lamina.lab.load import load

    tokenizer = load("smollm2-135m").tokenizer
    ids = [
        torch.tensor([t for row in tokenizer(list(sources.shipped(s)))["input_ids"] for t in [*row, 2]])[None]
        for s in ("calibration", "heldout")
    ]
    assert ids[0].numel() > 150_000
    assert ids[1].numel() > 100_000
    assert overlap(ids[0], ids[1]) == 0
