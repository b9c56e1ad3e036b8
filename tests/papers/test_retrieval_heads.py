"""Retrieval heads (arXiv 2404.15574): a copying model built by hand, and the score counted out step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.papers.heads.retrieval_heads import planted
from lamina.testing.models import text, tiny

WORDS, PLACES = 40, 48
WIDTH = 3 * WORDS + PLACES
SIZE = max(WORDS, PLACES)
TOKEN, BEFORE, ANSWER, PLACE = (
    slice(0, WORDS),
    slice(WORDS, 2 * WORDS),
    slice(2 * WORDS, 3 * WORDS),
    slice(3 * WORDS, WIDTH),
)
"""Parts of the stream: the token, the one before it, what is to be said, and the position, all one-hot."""


class Heads(nn.Module):
    """Two causal heads whose matrices are set by hand: [2, SIZE, WIDTH], and [2, WIDTH, SIZE] for the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 6 * SIZE, bias=False)
        self.out = nn.Linear(2 * SIZE, WIDTH, bias=False)
        nn.init.zeros_(self.qkv.weight)
        nn.init.zeros_(self.out.weight)

    def copying(self, head: int, query: Tensor, key: slice, to: slice) -> None:
        """One head that looks where `key` of the stream is as `query` [SIZE, WIDTH] says, and copies the token."""
        with torch.no_grad():
            q, k, v = self.qkv.weight.view(3, 2, SIZE, WIDTH)[:, head]
            q.copy_(100 * query)
            count = key.stop - key.start
            k[:count, key] = 100 * torch.eye(count)
            v[:WORDS, TOKEN] = torch.eye(WORDS)
            self.out.weight.view(WIDTH, 2, SIZE)[to, head, :WORDS] = torch.eye(WORDS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, SIZE)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixes = Heads()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixes(x)


class Induction(nn.Module):
    """Block 0's first head copies the token before; block 1's second finds the token that followed the present one.

    The other two heads look at all tokens alike.
    """

    def __init__(self, dumb: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        with torch.no_grad():
            for table, part in ((self.tokens.weight, TOKEN), (self.places.weight, PLACE)):
                table.zero_()[:, part] = torch.eye(len(table))
            shifted = torch.zeros(SIZE, WIDTH)
            shifted[:PLACES, PLACE] = torch.eye(PLACES).roll(-1, 0)  # position t asks for t - 1
            shifted[PLACES - 1] = 0
            same = torch.zeros(SIZE, WIDTH)
            same[:WORDS, TOKEN] = torch.eye(WORDS)
            self.blocks[0].mixes.copying(0, shifted, PLACE, BEFORE)  # type: ignore[union-attr,operator]
            self.blocks[1].mixes.copying(1, same, BEFORE, ANSWER)  # type: ignore[union-attr,operator]
            self.head.weight.zero_()[:, ANSWER] = torch.eye(WORDS)
            self.head.weight[list(dumb)] = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def measured(model: nn.Module, ids: Tensor, **options: Any) -> Any:
    return MEASURES.make("retrieval-heads", {"needle": 6, "cue": 2, **options}).measure(Lab(model, ids))


def unrelated(rows: int, length: int, seed: int = 0) -> Tensor:
    """Rows without a token twice, of all words together."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(WORDS, generator=generator)[:length] for _ in range(rows)])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_copying_head_scores_one_and_the_others_nothing(seed: int) -> None:
    """Whatever the haystack is made of. Here a token of the needle may stand in the hay too: then heads differ."""
    model = Induction().eval()
    got = measured(model, unrelated(4, 40, seed)[:, :14])
    assert got.values["block.1.attention.head"][0] == 0.0
    assert got.values["block.0.attention.head"].tolist() == [0.0, 0.0]
    assert got.values["block.1.attention.head"][1] > 0.7
    assert got.grids["recall"].values.shape == (4, 3)


def test_a_needle_of_words_that_are_nowhere_else_is_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.papers.heads import retrieval_heads

    model = Induction().eval()

    def apart(ids: Tensor, known: Tensor, *rest: Any) -> Any:
        return planted(ids, torch.arange(20, 40), *rest)

    monkeypatch.setattr(retrieval_heads, "planted", apart)
    for seed in range(3):
        hay = torch.randint(20, (3, 30), generator=torch.Generator().manual_seed(seed))
        got = measured(model, hay, depths=5)
        assert got.values["block.1.attention.head"].tolist() == [0.0, 1.0]
        assert got.stderr["block.1.attention.head"].tolist() == [0.0, 0.0]
        assert not got.values["block.0.attention.head"].any()
        assert (got.grids["recall"].values == 1).all()
        assert not got.missing


def decoded(model: nn.Module, ids: Tensor, steps: int) -> list[int]:
    """What the model says when it reads its own words."""
    said = []
    for _ in range(steps):
        word = int(model(ids.unsqueeze(0))[0, -1].argmax())
        said.append(word)
        ids = torch.cat([ids, torch.tensor([word])])
    return said


@torch.no_grad()
def test_teacher_forcing_is_decoding_where_the_model_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Induction().eval()
    hay = torch.randint(20, (2, 30), generator=torch.Generator().manual_seed(3))
    for row in hay:
        plan = planted(row, torch.arange(20, 40), 6, 2, 3, torch.Generator().manual_seed(0))
        for ids, start in zip(plan.ids, plan.starts, strict=True):
            needle = ids[start : start + 6].tolist()
            assert len(ids) == 30
            assert ids[-5:].tolist() == needle[:-1]
            assert decoded(model, ids[:-3], 4) == needle[2:]


def counted(maps: list[Tensor], said: list[int], ids: list[int], begin: int, size: int) -> list[list[float]]:
    """The code's loop over decoding steps, layers and heads: [layers, heads]."""
    steps = len(said)
    scores = []
    for layer in maps:
        row = []
        for head in layer:
            score = 0.0
            for step, word in enumerate(said):
                place = int(head[len(ids) - steps + step].argmax())
                if begin <= place < begin + size and word == ids[place]:
                    score += 1 / steps
            row.append(score)
        scores.append(row)
    return scores


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_scores_are_counted_as_in_the_code(name: str) -> None:
    """Of models that say one of three words all the time, so that much of what they say is in the needle."""
    model: Any = tiny(name)
    words = torch.tensor([5, 6, 7])
    model.lm_head.weight.data = model.lm_head.weight.detach().clone()
    others = torch.ones(99, dtype=torch.bool)
    others[words] = False
    model.lm_head.weight[others] *= 0.01
    rows = words[torch.randint(3, (3, 24), generator=torch.Generator().manual_seed(1))]
    measure = MEASURES.make("retrieval-heads", {"needle": 7, "cue": 2, "recall": 0.3, "depths": 4})
    lab = Lab(model, rows)
    got = measure.measure(lab)
    assert lab.counts.blocks == 3 * 4 * 24 * 4
    plans = measure._plans(lab)
    model.set_attn_implementation("eager")
    kept = []
    for plan in plans:
        for ids, begin in zip(plan.ids, plan.starts, strict=True):
            out = model(ids.unsqueeze(0), output_attentions=True, use_cache=False)
            said = out.logits[0, -5:].argmax(-1).tolist()
            wanted = ids[begin + 2 : begin + 7].tolist()
            rest, met = list(wanted), 0
            for word in said:
                if word in rest:
                    rest.remove(word)
                    met += 1
            if met / 5 > 0.3:
                kept.append(counted([a[0] for a in out.attentions], said, ids.tolist(), begin, 7))
    assert len(kept) > 2
    mean = np.mean(kept, 0)
    assert mean.max() > 0
    for n in range(4):
        assert got.values[f"block.{n}.attention.head"] == pytest.approx(mean[n], abs=1e-9)


def test_a_model_that_can_not_copy_scores_nothing_and_says_so() -> None:
    got = measured(tiny("llama"), text(2, 30))
    assert "largest recall" in got.missing[""]
    assert all(not v.any() and v.shape == (4,) for v in got.values.values())
    assert not got.stderr


def test_short_sequences_hold_short_needles_or_none() -> None:
    got = measured(Induction().eval(), unrelated(2, 9))
    assert got.grids["recall"].values.shape == (2, 3)
    with pytest.raises(UnsupportedError, match="6 tokens"):
        measured(Induction().eval(), unrelated(2, 5))


@pytest.mark.parametrize(
    "options", [{"haystacks": 0}, {"depths": 0}, {"cue": 0}, {"needle": 4}, {"length": 5}, {"recall": 1.0}]
)
def test_options(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MEASURES.make("retrieval-heads", options)
