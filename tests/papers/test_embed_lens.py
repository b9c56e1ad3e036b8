"""EmbedLens (arXiv 2603.00510): nearest input embeddings by cosine, and groups of tokens by marker words."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.papers.tokens import embed_lens
from lamina.papers.tokens.embed_lens import groups, nearest
from lamina.testing.models import text, tiny


def test_rows_of_the_table_find_themselves() -> None:
    table = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert nearest(3 * table, table, 1)[:, 0].tolist() == list(range(40))


def test_parts_of_a_vocabulary_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    table, states = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (23, 9))
    cosines = torch.nn.functional.cosine_similarity(states.unsqueeze(1), table.unsqueeze(0), dim=-1)
    wanted = cosines.topk(3).indices
    for words in (100, 7, 2):
        monkeypatch.setattr(embed_lens, "WORDS", words)
        assert torch.equal(nearest(states, table, 3), wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_a_block_is_scored_by_the_words_that_it_changes(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(4, 6)
    pairs = literal.pairs(model, name, ids)
    table = model.get_input_embeddings().weight.detach().double()
    depths = [s.flatten(0, 1) for s in (pairs["block.0"][0], *(pairs[f"block.{i}"][1] for i in range(4)))]
    words = []
    for state in depths:
        cosines = [[float(s @ e / (s.norm() * e.norm())) for e in table] for s in state]
        words.append([[int(w) for w in np.argsort(row)[::-1][:3]] for row in cosines])
    got = MEASURES.make("embed-lens", {"sequences": 4, "each": 6}).measure(Lab(model, ids))
    for n in range(4):
        kept = [len(set(a) & set(b)) / 3 for a, b in zip(words[n], words[n + 1], strict=True)]
        moved = np.mean([a[0] != b[0] for a, b in zip(words[n], words[n + 1], strict=True)])
        assert got[f"block.{n}"] == pytest.approx(1 - np.mean(kept))
        assert got.grids["groups"].values[n + 1, 3] == pytest.approx(moved)
    assert got.grids["groups"].columns == ("sink", "dead", "alive", "moved")
    np.testing.assert_allclose(got.grids["groups"].values[:, :3].sum(1), 1)
    if name == "llama":
        assert [w[0] for w in words[0]] == ids.flatten().tolist()


def test_groups_by_marker_words() -> None:
    words = np.array([[1, 2, 3], [9, 1, 5], [7, 8, 4], [7, 6, 2], [8, 5, 7], [3, 4, 6]])
    norms = np.array([900.0, 2, 1, 1, 1, 1])
    shares, markers = groups(words, norms)
    assert markers == (1, 7)  # of equally common words of the one sink the lowest; 7 is near three of the other four
    assert shares == pytest.approx((2 / 6, 3 / 6, 1 / 6))  # the second token is no giant but has the marker
    shares, markers = groups(words, np.ones(6))
    assert (shares[0], markers[0]) == (0.0, -1)
    shares, markers = groups(np.arange(18).reshape(6, 3), np.ones(6))
    assert (shares, markers) == ((0.0, 0.0, 1.0), (-1, -1))


def test_a_model_that_names_no_table_is_asked_for_the_one_like_its_input() -> None:
    """NanoGPT has two, of tokens and of places."""
    model = tiny("nanogpt")
    found = MEASURES.make("embed-lens").measure(Lab(model, text(4, 6)))
    assert set(found.values) == {f"block.{i}" for i in range(4)}
    model.get_input_embeddings = lambda: model.tokens
    again = MEASURES.make("embed-lens").measure(Lab(model, text(4, 6)))
    assert {k: v.tolist() for k, v in again.values.items()} == {k: v.tolist() for k, v in found.values.items()}


def test_an_identity_block_changes_no_word(literal: ModuleType) -> None:
    model = literal.zeroed(tiny("llama"), "llama", ["block.2"])
    assert MEASURES.make("embed-lens").measure(Lab(model, text(4, 8)))["block.2"] == 0.0


def test_models_without_words_are_refused() -> None:
    from tiny_kinds import vit

    from lamina.anatomy import Anatomy

    model, inputs = vit()
    lab = Lab(model, [inputs], anatomy=Anatomy.of(model, inputs))
    with pytest.raises(UnsupportedError, match="no tokens"):
        MEASURES.make("embed-lens").measure(lab)
    narrow = tiny("llama")
    narrow.get_input_embeddings = lambda: torch.nn.Embedding(99, 7)
    with pytest.raises(UnsupportedError, match="as wide as the stream"):
        MEASURES.make("embed-lens").measure(Lab(narrow, text(2, 6)))


def test_top_is_checked() -> None:
    with pytest.raises(InputError, match="top"):
        MEASURES.make("embed-lens", {"top": 0})
