"""Log-likelihoods of choices against one full forward per choice, on dense and thinned models; and what they cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.core.errors import InputError, UnsupportedError
from lamina.evaluators.tasks import _choices
from lamina.evaluators.tasks._choices import Item, Read, Reader
from lamina.testing.models import NAMES, tiny
from lamina.testing.tools import tokenizer

TOKENIZER = tokenizer()
ITEMS = [
    Item("the cat sat on the " + "very " * (n % 3), (" mat", " hat and coat", "x", " " + "long " * n, "x"))
    for n in range(1, 7)
]


def model_of(name: str, **changes: Any) -> Any:
    return tiny(name, **({"vocabulary": 300} if name == "nanogpt" else {"vocab_size": 300}), **changes)


def literal(model: Any, item: Item) -> list[float]:
    """One full forward for each choice alone, token by token; byte-level tokens part at any place."""
    found = []
    for choice in item.choices:
        context = TOKENIZER(item.context)["input_ids"]
        ids = TOKENIZER(item.context + choice)["input_ids"]
        with torch.no_grad():
            out = model(torch.tensor([ids]))
        logits = (out if isinstance(out, torch.Tensor) else out.logits)[0].double()
        shared = next((n for n, (a, b) in enumerate(zip(context, ids, strict=False)) if a != b), len(context))
        total = 0.0
        for place in range(shared, len(ids)):
            row = logits[place - 1]
            total += float(row[ids[place]] - torch.log(torch.exp(row - row.max()).sum()) - row.max())
        found.append(total)
    return found


def same(reads: list[Read], model: Any, items: list[Item]) -> None:
    for read, item in zip(reads, items, strict=True):
        np.testing.assert_allclose(read.logs, literal(model, item), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_model_reads_as_full_forwards_do(name: str) -> None:
    model = model_of(name)
    reader = Reader(model, TOKENIZER)
    same(reader.read(ITEMS), model, ITEMS)
    assert reader._shared is (name != "nanogpt")


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("sites", [["block.0", "block.2"], ["block.0.attention", "block.3.mlp"]])
def test_thinned_models_read_as_full_forwards_do(name: str, sites: list[str]) -> None:
    from lamina.core import registry
    from lamina.core.documents import Step
    from lamina.lab import Lab
    from lamina.testing.models import text

    model = model_of(name)
    lab = Lab(model, text(2, 8))
    registry.REWRITES.make("drop").apply(Step(rewrite="drop", sites=tuple(sites)), lab)
    same(Reader(lab.model, TOKENIZER).read(ITEMS), lab.model, ITEMS)


words = st.text("ab c", min_size=1, max_size=9)


@settings(max_examples=25)
@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=4)), min_size=1, max_size=6), st.booleans())
def test_any_items_read_the_same_shared_or_not(pairs: list[tuple[str, list[str]]], shared: bool) -> None:
    model = MODEL
    items = [Item(context, tuple(choices)) for context, choices in pairs]
    same(Reader(model, TOKENIZER, shared=shared).read(items), model, items)


MODEL = model_of("llama")


def test_small_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Reader(MODEL, TOKENIZER).read(ITEMS)
    monkeypatch.setattr(_choices, "ROWS", 3)
    monkeypatch.setattr(_choices, "SCORED", 5)
    monkeypatch.setattr(_choices, "SLICE", 2)
    reader = Reader(MODEL, TOKENIZER)
    for one, other in zip(reader.read(ITEMS), whole, strict=True):
        np.testing.assert_allclose(one.logs, other.logs, atol=1e-5)
    assert reader.effort.forwards > 20


def calls_of(model: Any) -> tuple[list[tuple[int, int]], Any]:
    """The shapes of the inputs of every forward, and the hook that notes them."""
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple((args[0] if args else kwargs["input_ids"]).shape)), with_kwargs=True
    )
    return seen, hook


def test_what_is_shared_runs_once() -> None:
    """A stem of all, a rest of two lengths, choices of one length: a forward each, and one token to try the cache."""
    items = [Item("in the beginning was a " + rest, ("xyz", "uvw")) for rest in ("p", "q", "rst", "suv")]
    stem, (short, long) = len(TOKENIZER("in the beginning was a ")["input_ids"]), (1, 3)
    seen, hook = calls_of(MODEL)
    reader = Reader(MODEL, TOKENIZER)
    reads = reader.read(items)
    hook.remove()
    assert seen == [(1, 1), (1, stem), (2, long), (4, 2), (2, short), (4, 2)]
    assert reader.effort.forwards == len(seen)
    assert reader.effort.tokens == sum(rows * tokens for rows, tokens in seen[1:])
    assert reader.effort.scored == 4 * 2 * 3
    same(reads, MODEL, items)


def test_single_tokens_need_no_forward_of_choices() -> None:
    seen, hook = calls_of(MODEL)
    Reader(MODEL, TOKENIZER).read([Item("is it so ", ("y", "n")), Item("is it no ", ("y", "n"))])
    hook.remove()
    assert seen == [(1, 1), (1, 6), (2, 3)]


def test_what_all_choices_begin_with_runs_with_the_context() -> None:
    """As the space before digits does in some tokenizers; it is scored all the same."""
    items = [Item("so it is", (" 4", " 7")), Item("so it was", (" 42", " 47"))]
    seen, hook = calls_of(MODEL)
    reads = Reader(MODEL, TOKENIZER).read(items)
    hook.remove()
    same(reads, MODEL, items)
    assert [shape for shape in seen if shape[0] > 1] == []
    assert [r.tokens.tolist() for r in reads] == [[2, 2], [3, 3]]
    same(Reader(MODEL, TOKENIZER, shared=False).read(items), MODEL, items)


def test_logits_are_made_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    head = MODEL.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, out: made.append(out.shape[0] * out.shape[1]))
    items = [Item("once upon a time " + "x" * 40, ("abc", "xy"))] * 2
    Reader(MODEL, TOKENIZER).read(items)
    hook.remove()
    assert made == [1, 1, 2, 4 * 2]  # the cache, the stem, one place of each context, the choices padded to two
    assert sum(made) < 57 * 2


def test_an_empty_context_begins_with_a_token_of_the_tokenizer() -> None:
    first = TOKENIZER.bos_token_id if TOKENIZER.bos_token_id is not None else TOKENIZER.eos_token_id
    ids = [first, *TOKENIZER("go", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logs = MODEL(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = sum(float(logs[n, ids[n + 1]]) for n in range(len(ids) - 1))
    (read,) = Reader(MODEL, TOKENIZER).read([Item("", ("go",))])
    assert read.logs == pytest.approx([expected], abs=1e-4)
    assert read.tokens.tolist() == [2]


class Merging:
    """A tokenizer in which `ab` is one token, also across the border of context and choice."""

    bos_token_id = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [{"a": 10, "b": 11, "c": 12, "*": 20}[c] for c in text.replace("ab", "*")]}


def test_a_token_across_the_border_is_scored_whole() -> None:
    (read,) = Reader(MODEL, Merging()).read([Item("ca", ("b", "c"))])
    with torch.no_grad():
        logs = MODEL(torch.tensor([[12, 10, 12]])).logits[0].double().log_softmax(-1)
    assert read.tokens.tolist() == [1, 2]
    assert read.logs == pytest.approx([float(logs[0, 20]), float(logs[0, 10] + logs[1, 12])], abs=1e-4)


def test_what_the_tokenizer_puts_first_stays_first() -> None:
    class Starting(Merging):
        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            ids = super().__call__(text)["input_ids"]
            return {"input_ids": [5, *ids, 6] if add_special_tokens else ids}

    (read,) = Reader(MODEL, Starting()).read([Item("c", ("c",))])
    with torch.no_grad():
        logs = MODEL(torch.tensor([[5, 12, 12]])).logits[0].double().log_softmax(-1)
    assert read.logs == pytest.approx([float(logs[1, 12])], abs=1e-4)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        Reader(MODEL, None)
    with pytest.raises(InputError, match="choices"):
        Reader(MODEL, TOKENIZER).read([Item("a", ("b", ""))])
    with pytest.raises(InputError, match="choices"):
        Reader(MODEL, TOKENIZER).read([Item("a", ())])
    short = model_of("llama", max_position_embeddings=8)
    with pytest.raises(UnsupportedError, match="9 tokens, and the model reads 8"):
        Reader(short, TOKENIZER).read([Item("abcdefg", ("hi",))])
    assert Reader(MODEL, TOKENIZER).read([]) == []


def test_progress_ends_at_the_number_of_items() -> None:
    told: list[tuple[str, int, int]] = []
    Reader(MODEL, TOKENIZER, progress=lambda *a: told.append(a)).read(ITEMS, "x")
    assert told[-1] == ("x", len(ITEMS), len(ITEMS))
    assert [d for _, d, _ in told] == sorted(d for _, d, _ in told)
