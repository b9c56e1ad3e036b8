"""What is found on every tiny architecture: kinds, what reads what, norms, caches; and the certificate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.anatomy import Anatomy
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.sites import Kind
from lamina.testing.bench import fresh
from lamina.testing.models import CONFIGS, NAMES, SERIAL, tiny
from lamina.testing.planted import added, identity_block, silence, silent_sublayer, twin

# Per block: modules of the attention's and the MLP's own (norms, dropouts), in the order of running, and what joins the
# stream. Written down from the source of each class.
OWN: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, str]] = {
    "llama": (("input_layernorm",), ("post_attention_layernorm",), "self_attn", "mlp"),
    "mistral": (("input_layernorm",), ("post_attention_layernorm",), "self_attn", "mlp"),
    "qwen2": (("input_layernorm",), ("post_attention_layernorm",), "self_attn", "mlp"),
    "qwen3": (("input_layernorm",), ("post_attention_layernorm",), "self_attn", "mlp"),
    "gemma2": (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "gpt2": (("ln_1",), ("ln_2",), "attn", "mlp"),
    "gpt_neox": (
        ("input_layernorm", "post_attention_dropout"),
        ("post_attention_layernorm", "post_mlp_dropout"),
        "attention",
        "mlp",
    ),
    "phi": ((), (), "self_attn", "mlp"),
    "falcon": ((), (), "self_attention", "mlp"),
    "falcon_new": (("ln_attn",), ("ln_mlp",), "self_attention", "mlp"),
    "olmo2": (
        ("post_attention_layernorm",),
        ("post_feedforward_layernorm",),
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "mixtral": (("input_layernorm",), ("post_attention_layernorm",), "self_attn", "mlp"),
    "granite": (("input_layernorm",), ("post_attention_layernorm",), "self_attn", "mlp"),
    "cohere": ((), (), "self_attn", "mlp"),
    "nanogpt": (("before",), ("between",), "mixes", "feeds"),
}
OWN["gemma3"] = OWN["gemma2"]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str) -> None:
    anatomy = fresh(name)[1]
    (stack,) = anatomy.stacks
    second = Kind.MOE if name == "mixtral" else Kind.MLP
    assert [s.id for s in anatomy.of_kind(Kind.BLOCK)] == [f"block.{n}" for n in range(4)]
    assert (stack.name, stack.width) == ("", 32)
    for number, block in enumerate(stack.blocks):
        mixes, feeds = block.branches
        assert [(b.site.id, b.site.kind) for b in block.branches] == [
            (f"block.{number}.attention", Kind.ATTENTION),
            (f"block.{number}.{second.value}", second),
        ]
        own_mixes, own_feeds, outlet_mixes, outlet_feeds = OWN[name]
        assert (mixes.own, feeds.own) == (own_mixes, own_feeds)
        assert (mixes.outlet, feeds.outlet) == (outlet_mixes, outlet_feeds)
        assert (mixes.reads, feeds.reads) == ((), (0,) if name in SERIAL or name == "nanogpt" else ())
        assert {b.scale for b in block.branches} == {0.3 if name == "granite" else 1.0}
        assert (mixes.cached, feeds.cached) == (name != "nanogpt", False)
        assert block.site.path == f"{stack.path}.{number}"


@pytest.mark.parametrize("name", NAMES)
def test_certificate(name: str) -> None:
    model, anatomy, ids = fresh(name)
    assert anatomy.certify().worst <= 1e-5
    certificate = anatomy.certify({"input_ids": ids})
    assert certificate.holds
    assert certificate.worst <= 1e-6
    assert list(certificate.errors) == [f"block.{n}" for n in range(4)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_certificate_in_sixteen_bits() -> None:
    certificate = fresh("gemma2", dtype=torch.bfloat16)[1].certify()
    assert certificate.holds
    assert certificate.dtype == "bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_ties_are_the_module_s_own_parameters(name: str) -> None:
    model, anatomy, _ = fresh(name)
    parameters = dict(model.named_parameters())
    for site in anatomy.sites:
        ties = anatomy.ties(site)
        assert all(parameters[t.param].shape[t.dim] == t.size for t in ties)
        assert sum(parameters[t.param].numel() for t in ties) == anatomy.cost(site).parameters
        assert len({t.param for t in ties}) == len(ties)


@pytest.mark.parametrize("name", NAMES)
def test_zeroing_what_a_branch_owns_silences_it_and_no_other(name: str) -> None:
    anatomy, site = silent_sublayer(tiny(name), 1)
    sizes = added(anatomy)
    assert sizes.pop(site) == 0.0
    assert min(sizes.values()) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_silent_branch_keeps_its_kind(name: str) -> None:
    """An attention whose output map is all zero, as in networks that grew by identity blocks, is an attention."""
    anatomy, site = identity_block(tiny(name), 2)
    again = Anatomy.of(anatomy.model)
    assert again.sites == anatomy.sites
    assert again.stacks == anatomy.stacks
    assert site == "block.2"


def test_twins() -> None:
    anatomy = fresh("llama")[1]
    twin(anatomy, 1, 3)
    first, second = (anatomy.model.get_submodule(anatomy.site(s).path).state_dict() for s in ("block.1", "block.3"))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_silence_says_where_it_fails() -> None:
    anatomy = fresh("llama")[1]
    loud = anatomy.model.get_submodule(anatomy.site("block.1.mlp").path)
    loud.register_forward_hook(lambda _, __, out: 1 + out)
    with pytest.raises(RuntimeError, match=r"block\.1\.mlp still adds something"):
        silence(anatomy, "block.1.mlp")


@pytest.mark.parametrize("name", NAMES)
def test_discovery_leaves_the_model_as_it_was(name: str) -> None:
    from lamina.testing.bench import expect_same, picture

    for training in (False, True):
        model = tiny(name).train(training)
        next(iter(model.children())).train(not training)
        before = picture(model)
        Anatomy.of(model).certify()
        expect_same(before, picture(model), "discovery")


def test_discovery_leaves_a_failing_model_as_it_was() -> None:
    from lamina.testing.bench import expect_same, picture

    model = tiny("llama").train()
    model.get_submodule("model.layers.2.mlp").forward = None  # type: ignore[assignment]
    before = picture(model)
    with pytest.raises(TypeError):
        Anatomy.of(model)
    expect_same(before, picture(model), "a failed discovery")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_sets_of_sites(name: str) -> None:
    anatomy = fresh(name)[1]
    last = anatomy.parts("block.1")[1].id
    assert anatomy.expand(["block.0", "block.1.attention"]) == {
        "block.0.attention", anatomy.parts("block.0")[1].id, "block.1.attention",
    }  # fmt: skip
    assert anatomy.collapse(["block.1.attention", last, "block.3.attention"]) == ("block.1", "block.3.attention")
    assert anatomy.collapse(anatomy.expand(["block.2"])) == ("block.2",)
    assert anatomy.collapse([]) == ()
    assert anatomy.block("block.1.attention").site.id == "block.1"
    assert anatomy.stack("block.1") is anatomy.stacks[0]
    assert anatomy.parts(anatomy.site("block.1.attention")) == (anatomy.site("block.1.attention"),)


def test_unknown_sites_get_a_hint() -> None:
    anatomy = fresh("llama")[1]
    with pytest.raises(
        InputError, match=r"block\.1\.attentoin: the model has no such site \(did you mean block\.1\.attention"
    ):
        anatomy.site("block.1.attentoin")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_depth_and_cache_may_be_odd(name: str) -> None:
    changes = {"n_layer": 2} if name == "gpt2" else {"num_hidden_layers": 2}
    anatomy = Anatomy.of(tiny(name, **changes))
    assert len(anatomy.of_kind(Kind.BLOCK)) == 2
    assert anatomy.stacks[0].index


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_single_block_is_a_stack(name: str) -> None:
    anatomy = Anatomy.of(tiny(name, **({"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1})))
    assert [s.id for s in anatomy.sites] == ["block.0", "block.0.attention", "block.0.mlp"]
    assert anatomy.branch("block.0.attention").cached


def test_what_has_no_stack_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no stack of blocks"):
        Anatomy.of(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), {"input": torch.tensor([[1, 2]])})
    with pytest.raises(InputError, match="can't make an input"):
        Anatomy.of(nn.Linear(4, 4))
