"""A tokenizer as GGUF's `tokenizer.*` keys: copied from a GGUF file, or built from a fast tokenizer's JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, Keys, TokenType

from lamina.anatomy.families import llama_gguf as family
from lamina.core.errors import InputError, UnsupportedError

STRING, ARRAY, INT32, UINT32, BOOL, FLOAT32 = (
    GGUFValueType.STRING,
    GGUFValueType.ARRAY,
    GGUFValueType.INT32,
    GGUFValueType.UINT32,
    GGUFValueType.BOOL,
    GGUFValueType.FLOAT32,
)
_WHERE = "tokenizer"


@dataclass(frozen=True)
class Entry:
    """One key of a GGUF header; `items` is the type of an array's items."""

    key: str
    value: Any
    type: GGUFValueType
    items: GGUFValueType | None = None


def read_vocabulary(source: Any, rows: int | None = None) -> list[Entry]:
    """The `tokenizer.*` keys for an embedding of `rows` rows; None: as many as the tokenizer has.

    `source`: a GGUF file, a folder with tokenizer.json, or a fast tokenizer of transformers.
    Raises UnsupportedError with the reason where llama.cpp would split text differently.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_file():
            return _padded(_copied(path), rows)
        source = _loaded(path)
    if not hasattr(source, "backend_tokenizer"):
        raise InputError("not a fast tokenizer: it has no tokenizer.json form", where=type(source).__name__)
    return _padded(_built(source), rows)


def _copied(path: Path) -> list[Entry]:
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError) as error:
        raise InputError(f"not a GGUF file: {error}", where=path) from None
    found = [
        Entry(key, field.contents(), field.types[0], field.types[-1] if field.types[0] == ARRAY else None)
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.")
    ]
    if not any(entry.key == Keys.Tokenizer.LIST for entry in found):
        raise InputError("this GGUF file holds no vocabulary", where=path)
    return found


def _loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise InputError("no tokenizer.json here", where=folder, hint="save the tokenizer with save_pretrained")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _padded(entries: list[Entry], rows: int | None) -> list[Entry]:
    """Unused tokens for the embedding's spare rows."""
    filler = {Keys.Tokenizer.TOKEN_TYPE: int(TokenType.UNUSED), Keys.Tokenizer.SCORES: -10000.0}
    size = len(next(entry for entry in entries if entry.key == Keys.Tokenizer.LIST).value)
    rows = size if rows is None else rows
    if size > rows:
        raise UnsupportedError(f"the tokenizer has {size} tokens and the embedding {rows} rows", where=_WHERE)
    if size == rows:
        return entries
    return [
        replace(e, value=[*e.value, *(f"[PAD{i}]" for i in range(size, rows))])
        if e.key == Keys.Tokenizer.LIST
        else replace(e, value=[*e.value, *([filler[e.key]] * (rows - size))])
        if e.key in filler
        else e
        for e in entries
    ]


def _built(tokenizer: Any) -> list[Entry]:
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(f"a {model.get('type')} vocabulary; only byte-level BPE is written", where=_WHERE)
    added = data.get("added_tokens") or []
    name = pre_tokenizer_name(data)
    tokens, types = _tokens(model["vocab"], added)
    entries = [
        Entry(Keys.Tokenizer.MODEL, "gpt2", STRING),
        Entry(Keys.Tokenizer.PRE, name, STRING),
        Entry(Keys.Tokenizer.LIST, tokens, ARRAY, STRING),
        Entry(Keys.Tokenizer.TOKEN_TYPE, types, ARRAY, INT32),
        Entry(Keys.Tokenizer.MERGES, _merges(model.get("merges") or []), ARRAY, STRING),
    ]
    return entries + _specials(tokenizer)


def pre_tokenizer_name(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json; UnsupportedError where it has none here."""
    _check_model(data["model"])
    _check_normalizer(data.get("normalizer"))
    steps = tuple(_steps(data.get("pre_tokenizer")))
    ignore = bool(data["model"].get("ignore_merges"))
    for row in family.PRE_TOKENIZERS:
        if row.steps == steps and row.ignore_merges == ignore:
            return row.name
    if ignore and any(row.steps == steps for row in family.PRE_TOKENIZERS):
        raise UnsupportedError(
            "it skips the merges of whole words (ignore_merges), and llama.cpp does not", where=_WHERE
        )
    known = ", ".join(row.name for row in family.PRE_TOKENIZERS)
    what = " + ".join(str(step[0]) for step in steps) or "none"
    raise UnsupportedError(
        f"its pre-tokenizer ({what}) has no known name in llama.cpp, which would split text differently",
        where=_WHERE,
        hint=f"known: {known}; a model that came as GGUF keeps its own",
    )


def _check_model(model: Mapping[str, Any]) -> None:
    if model.get("byte_fallback"):
        hint = "a model that was loaded from a GGUF file keeps that file's vocabulary"
        raise UnsupportedError(
            "a SentencePiece vocabulary (BPE with byte_fallback) is not written", where=_WHERE, hint=hint
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedError(f"BPE with {option} is not written", where=_WHERE)


def _check_normalizer(normalizer: Mapping[str, Any] | None) -> None:
    """None, or NFC, which llama.cpp leaves out: it then agrees on text that is NFC already."""
    if normalizer is None:
        return
    kind = normalizer.get("type")
    if kind == "Sequence":
        for part in normalizer.get("normalizers", ()):
            _check_normalizer(part)
    elif kind != "NFC":
        raise UnsupportedError(f"its normalizer {kind} has no counterpart in llama.cpp", where=_WHERE)


def _steps(pre: Mapping[str, Any] | None) -> list[family.Step]:
    if pre is None:
        return []
    kind = pre.get("type")
    if kind == "Sequence":
        return [step for part in pre.get("pretokenizers", ()) for step in _steps(part)]
    if kind == "ByteLevel":
        if pre.get("add_prefix_space"):
            raise UnsupportedError("it puts a space before the text, and llama.cpp's BPE does not", where=_WHERE)
        return [("bytes", bool(pre.get("use_regex", True)))]
    if kind == "Digits":
        return [("digits", bool(pre.get("individual_digits")))]
    if kind == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return [("split", pre.get("pattern", {}).get("Regex"))]
    return [(str(kind), None)]


def _tokens(vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[int]]:
    """Token texts and types by id; ids that nobody uses become unused tokens."""
    size = max([*vocab.values(), *(token["id"] for token in added)]) + 1
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, index in vocab.items():
        tokens[index], types[index] = text, int(TokenType.NORMAL)
    for token in added:
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise UnsupportedError(
                f"the added token {token['content']!r} takes the spaces around it, which GGUF can't say", where=_WHERE
            )
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], int(kind)
    return tokens, types


def _merges(merges: Sequence[Any]) -> list[str]:
    if not merges:
        raise UnsupportedError("the tokenizer has no merges, and llama.cpp's byte-level BPE needs some", where=_WHERE)
    pairs = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]
    if any(len(pair) != 2 or any(" " in part for part in pair) for pair in pairs):
        raise UnsupportedError("a merge holds a bare space, so this is no byte-level BPE", where=_WHERE)
    return [" ".join(pair) for pair in pairs]


def _specials(tokenizer: Any) -> list[Entry]:
    if tokenizer.eos_token_id is None:
        raise UnsupportedError("no end-of-sequence token; llama.cpp would take token 11 for it", where=_WHERE)
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    full = list(tokenizer("a").input_ids)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    add_bos, add_eos = bos is not None and full[:1] == [bos], full[-1:] == [eos]
    if full != [bos] * add_bos + bare + [eos] * add_eos:
        raise UnsupportedError("it adds tokens other than one begin and one end to a text", where=_WHERE)
    ids = {
        Keys.Tokenizer.BOS_ID: bos,
        Keys.Tokenizer.EOS_ID: eos,
        Keys.Tokenizer.UNK_ID: tokenizer.unk_token_id,
        Keys.Tokenizer.PAD_ID: tokenizer.pad_token_id,
    }
    entries = [Entry(key, int(value), UINT32) for key, value in ids.items() if value is not None]
    entries += [Entry(Keys.Tokenizer.ADD_BOS, add_bos, BOOL), Entry(Keys.Tokenizer.ADD_EOS, add_eos, BOOL)]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return entries + ([Entry(Keys.Tokenizer.CHAT_TEMPLATE, template, STRING)] if template else [])
