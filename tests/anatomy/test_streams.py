"""Blocks that take and return two streams, gate sums of branches, share a module between streams, or fill a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_kinds import drop
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.anatomy.trial import ablated
from lamina.core.documents import Step
from lamina.core.errors import UnsupportedError
from lamina.core.sites import Kind
from lamina.rewrites.drop import Drop
from lamina.rewrites.structure import Passing

WIDTH, DEPTH = 8, 3


class _Norm(nn.Module):
    """A norm that is moved by a condition: (normed, gate)."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, *, condition: Tensor) -> tuple[Tensor, Tensor]:
        shift, gate = self.made(condition)[:, None].chunk(2, -1)
        return nn.functional.layer_norm(x, (WIDTH,)) + shift, gate


class _Joint(nn.Module):
    """Attention over both streams together: what each of them gets."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(torch.cat([words, image], 1)).chunk(3, -1)
        made = self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return made[:, words.shape[1] :], made[:, : words.shape[1]]


class _Block(nn.Module):
    """`form`: one feed-forward for both streams ("shared"), or the sum of both branches gated ("sum")."""

    def __init__(self, form: str, last: bool) -> None:
        super().__init__()
        self.form, self.last = form, last
        self.norm, self.norm_words = _Norm(), _Norm()
        self.attn = _Joint()
        self.ff = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, image: Tensor, words: Tensor, condition: Tensor) -> tuple[Tensor | None, Tensor]:
        normed, gate = self.norm(image, condition=condition)
        normed_words, gate_words = self.norm_words(words, condition=condition)
        added, added_words = self.attn(normed, normed_words)
        if self.form == "sum":
            image = image + gate * (added + self.ff(normed))
        else:
            image = image + gate * added
            image = image + self.ff(nn.functional.layer_norm(image, (WIDTH,)))
        words = words + gate_words * added_words
        if self.form == "shared":
            words = words + self.ff(nn.functional.layer_norm(words, (WIDTH,)))
        return None if self.last else words, image


class Joined(nn.Module):
    """A diffusion transformer's core: an image and words, of which the image alone comes out."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.config = {"num_layers": DEPTH, "form": form}
        self.blocks = nn.ModuleList([_Block(form, n == DEPTH - 1) for n in range(DEPTH)])

    def forward(self, image: Tensor, words: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            words, image = block(image, words, condition)
        return image


def joined(form: str) -> tuple[Joined, dict[str, Tensor]]:
    torch.manual_seed(0)
    made = {"image": torch.randn(2, 6, WIDTH), "words": torch.randn(2, 4, WIDTH), "condition": torch.randn(2, WIDTH)}
    return Joined(form).eval(), made


@pytest.mark.parametrize("form", ["apart", "shared", "sum"])
def test_the_stream_that_all_blocks_return_is_followed(form: str) -> None:
    """The last block returns one of two streams: that one runs through all of them."""
    model, sample = joined(form)
    anatomy = Anatomy.of(model, sample)
    (stack,) = anatomy.stacks
    assert (stack.linked, stack.carries) == (True, ((0, 1),))
    assert [b.returns for b in stack.blocks] == [((1, 2),)] * DEPTH
    assert [b.tells for b in stack.blocks] == [True, True, False]
    kinds = {"attn": Kind.ATTENTION, "ff": Kind.MLP}
    for block in stack.blocks:
        assert {x.core: x.site.kind for x in block.branches} == kinds
    assert anatomy.certify().worst < 1e-6


def test_a_gated_sum_is_two_branches_with_one_gate() -> None:
    model, sample = joined("sum")
    first, second = Anatomy.of(model, sample).stacks[0].blocks[1].branches
    assert [str(t) for t in first.way] == [str(t) for t in second.way] == ["mul"]
    assert first.bound
    assert second.reads == ()


def test_of_a_module_called_twice_the_call_that_joins_is_known() -> None:
    model, sample = joined("shared")
    branches = Anatomy.of(model, sample).stacks[0].blocks[0].branches
    assert {x.core: x.outlet_call for x in branches} == {"attn": None, "ff": 0}


@pytest.mark.parametrize("form", ["apart", "shared", "sum"])
@pytest.mark.parametrize("gone", [0, 1])
def test_without_a_block_both_streams_go_on(form: str, gone: int) -> None:
    model, sample = joined(form)
    left = copy.deepcopy(model)
    del left.blocks[gone]
    want = left(**sample)
    with ablated(model, Anatomy.of(model, sample), [f"block.{gone}"]):
        torch.testing.assert_close(model(**sample), want)
    drop(model, sample, f"block.{gone}")
    torch.testing.assert_close(model(**sample), want)
    assert len(model.blocks) == DEPTH - 1


def test_what_computes_the_other_stream_too_stays() -> None:
    model, sample = joined("apart")
    anatomy = Anatomy.of(model, sample)
    (problem,) = Drop().check(Step(rewrite="drop", sites=("block.1.attention",)), anatomy)
    assert "the next block reads what it computes beside the stream" in problem.what
    assert Drop().check(Step(rewrite="drop", sites=("block.2.attention",)), anatomy) == []
    want = copy.deepcopy(model)
    nn.init.zeros_(want.blocks[1].ff[2].weight)
    nn.init.zeros_(want.blocks[1].ff[2].bias)
    drop(model, sample, "block.1.mlp")
    torch.testing.assert_close(model(**sample), want(**sample))


class _Whole(nn.Module):
    """One branch joins the image; the words are changed beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.words = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        return image + self.up(image + words.mean(1, keepdim=True)), self.words(words)


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Whole() for _ in range(DEPTH)])

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        for block in self.blocks:
            image, words = block(image, words)
        return image


def test_a_block_s_only_sublayer_is_not_the_block() -> None:
    """To drop it would drop what the block does beside it; as a block, that is what is asked for."""
    torch.manual_seed(0)
    model, sample = Beside(), {"image": torch.randn(2, 6, WIDTH), "words": torch.randn(2, 4, WIDTH)}
    anatomy = Anatomy.of(model, sample)
    assert [len(b.branches) for b in anatomy.stacks[0].blocks] == [1] * DEPTH
    (problem,) = Drop().check(Step(rewrite="drop", sites=("block.1.mlp",)), anatomy)
    assert problem.hint == "drop the whole block, block.1"
    assert Drop().check(Step(rewrite="drop", sites=("block.1",)), anatomy) == []
    want = model.blocks[2](*model.blocks[0](**sample))[0]
    drop(model, sample, "block.1")
    torch.testing.assert_close(model(**sample), want)


class _Cut(nn.Module):
    """Some tokens get one thing more than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.some = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.all(x)
        first, middle, last = x.split([2, 3, 1], 1)
        x = torch.cat([first, middle + 2 * self.some(middle), last], 1)
        return x + self.feed(x)


class Cutting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Cut() for _ in range(DEPTH)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_is_added_to_a_piece_of_the_stream() -> None:
    torch.manual_seed(0)
    model, sample = Cutting(), {"x": torch.randn(2, 6, WIDTH)}
    anatomy = Anatomy.of(model, sample)
    branches = anatomy.stacks[0].blocks[1].branches
    assert [(x.core, x.reads) for x in branches] == [("all", ()), ("some", (0,)), ("feed", (0, 1))]
    assert [str(t) for t in branches[1].way] == ["mul", "constant_pad_nd"]
    assert anatomy.certify().worst < 1e-6
    want = copy.deepcopy(model)
    nn.init.zeros_(want.layers[1].some.weight)
    nn.init.zeros_(want.layers[1].some.bias)
    drop(model, sample, branches[1].site.id)
    torch.testing.assert_close(model(**sample), want(**sample))


class _Shared(nn.Module):
    """Both branches leave by one module, which gives what it gets; a norm of the stream behind the only branch."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.attention, self.mlp = _Gates(), nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.leave = nn.Identity()
        self.norm = nn.LayerNorm(WIDTH) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            return self.norm(x + self.mlp(x))
        x = x + self.leave(0.5 * self.attention(x))
        return x + self.leave(self.mlp(x))


class _Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, self.v(x))


class Plain(nn.Module):
    """Says, beside its stream, how far the first block has moved it, and what each block gave."""

    def __init__(self, *, normed: bool = False, watches: bool = False) -> None:
        super().__init__()
        self.layers, self.watches = nn.ModuleList([_Shared(normed=normed) for _ in range(DEPTH)]), watches

    def forward(self, x: Tensor) -> dict[str, Any]:
        made = [x]
        for layer in self.layers:
            made.append(layer(made[-1]))
        spread = made[2 if self.watches else 0].std(-1)
        return {"last": made[-1], "spread": spread, "all": tuple(made)}


def test_a_module_that_many_share_is_no_branch_s_outlet() -> None:
    torch.manual_seed(0)
    model, sample = Plain(), {"x": torch.randn(2, 6, WIDTH)}
    anatomy = Anatomy.of(model, sample)
    branches = anatomy.stacks[0].blocks[1].branches
    assert [(x.outlet, x.scale) for x in branches] == [("attention", 0.5), ("mlp", 1.0)]
    assert [x.outlet_call for x in branches] == [None, None]
    want = copy.deepcopy(model)
    nn.init.zeros_(want.layers[1].attention.v.weight)
    nn.init.zeros_(want.layers[1].attention.v.bias)
    drop(model, sample, "block.1.attention")
    torch.testing.assert_close(model(**sample)["last"], want(**sample)["last"])


def test_a_drop_is_proved_on_all_that_is_returned() -> None:
    """What reads the second block's output by its place reads another's without it: only the last output is right."""
    torch.manual_seed(0)
    model, sample = Plain(watches=True), {"x": torch.randn(2, 6, WIDTH)}
    with pytest.raises(UnsupportedError, match=r"^block\.1: dropped, it gives an output .* off that of the model"):
        drop(model, sample, "block.1")
    torch.manual_seed(0)
    model = Plain(watches=True)
    drop(model, sample, "block.2")
    assert len(model(**sample)["all"]) == DEPTH, "a list with an entry for each layer is not compared"


def test_of_a_block_with_a_norm_the_only_sublayer_is_not_the_block() -> None:
    torch.manual_seed(0)
    model, sample = Plain(normed=True), {"x": torch.randn(2, 6, WIDTH)}
    anatomy = Anatomy.of(model, sample)
    assert [(len(b.branches), b.plain) for b in anatomy.stacks[0].blocks] == [(1, False)] * DEPTH
    (problem,) = Drop().check(Step(rewrite="drop", sites=("block.1.mlp",)), anatomy)
    assert (problem.what, problem.hint) == (
        "its block does more to the stream than to add this",
        "drop the whole block, block.1",
    )


class _Cache:
    """Keeps what it is given, as caches of transformers do."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def get_seq_length(self) -> int:
        return max((t.shape[1] for t in self.kept.values()), default=0)

    def update(self, x: Tensor, layer: int) -> Tensor:
        self.kept[layer] = torch.cat([self.kept[layer], x], 1) if layer in self.kept else x
        return self.kept[layer]


class _Caching(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.mix = number, _Pool()
        self.feed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    def forward(self, x: Tensor, cache: _Cache) -> Tensor:
        x = x + self.mix(x, cache, self.number)
        return x + self.feed(x)


class _Pool(nn.Module):
    """Attends to what the cache holds; a mask of the sample's length fits once, not twice."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: _Cache, number: int) -> Tensor:
        held = cache.update(self.made(x), number)
        return nn.functional.scaled_dot_product_attention(x, held, held, torch.ones(x.shape[1], 5).tril() > 0)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Caching(n) for n in range(DEPTH)])

    def forward(self, x: Tensor) -> Tensor:
        cache = _Cache()
        for layer in self.layers:
            x = layer(x, cache)
        return x


def test_a_cache_that_is_always_filled_is_filled_once() -> None:
    torch.manual_seed(0)
    model, sample = Remembering(), {"x": torch.randn(2, 5, WIDTH)}
    anatomy = Anatomy.of(model, sample)
    assert [x.site.kind for x in anatomy.stacks[0].blocks[0].branches] == [Kind.ATTENTION, Kind.MLP]
    assert anatomy.certify().holds


def test_a_branch_that_is_not_silent_on_trial_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the anatomy comes to think so."""
    torch.manual_seed(0)
    model, sample = Remembering(), {"x": torch.randn(2, 5, WIDTH)}
    before = copy.deepcopy(model)
    find = Anatomy.of

    def of(*given: Any) -> Anatomy:
        anatomy = find(*given)
        feed = anatomy.branch("block.1.mlp")
        object.__setattr__(feed, "own", (*feed.own, feed.core))
        object.__setattr__(feed, "core", "mix")
        return anatomy

    monkeypatch.setattr(Anatomy, "of", of)
    with pytest.raises(UnsupportedError, match=r"^block\.1\.mlp: with its modules silenced it still adds"):
        drop(model, sample, "block.1.mlp")
    for name, parameter in before.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_what_stands_for_a_norm_takes_what_the_norm_took() -> None:
    x = torch.randn(2, 3)
    stands = Passing(nn.LayerNorm(3, dtype=torch.float64))
    assert stands(x, 5, scale=2) is x
    assert stands(hidden=x) is x
    assert stands.weight.dtype == torch.float64
    assert (list(stands.parameters()), dict(stands.state_dict())) == ([], {})
