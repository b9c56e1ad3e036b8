"""Zeros in linear maps: which ones, how many, and nothing else; magnitude against a sort written out."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.core.documents import Step
from lamina.core.errors import InputError, LaminaError, UnsupportedError
from lamina.core.registry import REWRITES
from lamina.lab import Lab
from lamina.lab.moments import input_moments
from lamina.rewrites.sparsify import InputPowers, amount, lowest
from lamina.testing.models import padded, text, tiny

NAMES = ("magnitude", "wanda", "sparsegpt", "random")


def stepped(lab: Lab, block: str = "block.1", rewrite: str = "magnitude", **options: Any) -> Step:
    return Step(rewrite=rewrite, sites=tuple(s.id for s in lab.anatomy.linears(block)), options=options)


def applied(lab: Lab, step: Step) -> Any:
    return REWRITES.make(step.rewrite).apply(step, lab)


def weights(lab: Lab) -> dict[str, Tensor]:
    return {s.id: lab.anatomy.weight(s).detach().clone() for s in lab.anatomy.linears()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(0, 6))
def test_lowest_are_the_first_of_a_stable_sort(rows: list[list[int]], count: int) -> None:
    got = lowest(torch.tensor(rows, dtype=torch.float64), count)
    for row, mask in zip(rows, got.tolist(), strict=True):
        gone = sorted(range(6), key=lambda i, r=row: (r[i], i))[:count]
        assert [i for i, out in enumerate(mask) if out] == sorted(gone)


def by_hand(weight: Tensor, share: float, rows: bool) -> Tensor:
    """The smallest weights by a sort in Python."""
    out = weight.clone()
    columns = weight.shape[1]
    places = [(abs(float(w)), i, j) for i, row in enumerate(weight) for j, w in enumerate(row)]
    parts = [places[i * columns : (i + 1) * columns] for i in range(len(weight))] if rows else [places]
    for part in parts:
        for _, i, j in sorted(part)[: int(len(part) * share)]:
            out[i, j] = 0
    return out


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "nanogpt"])
def test_magnitude_is_a_sort(name: str, rows: bool) -> None:
    """gpt2 stores its maps [inputs, outputs]."""
    lab = Lab(tiny(name), text(2, 6))
    before = weights(lab)
    step = stepped(lab, sparsity=0.37, rows=rows)
    applied(lab, step)
    for site, weight in weights(lab).items():
        wanted = by_hand(before[site], 0.37, rows) if site in step.sites else before[site]
        assert torch.equal(weight, wanted), site
    assert lab.passes == 0


def test_the_threshold_is_of_the_whole_map_unless_rows() -> None:
    """One output has only small weights: as a map it goes first, by rows it loses no more than the others."""
    lab = Lab(tiny("llama"), text(2, 6))
    site = lab.anatomy.linears("block.0")[0].id
    for rows, gone in ((False, 32), (True, 16)):
        with torch.no_grad():
            lab.anatomy.weight(site).copy_(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).sign() + 3)
            lab.anatomy.weight(site)[5] = 1e-3
        applied(lab, Step(rewrite="magnitude", sites=(site,), options={"sparsity": 0.5, "rows": rows}))
        assert int((lab.anatomy.weight(site)[5] == 0).sum()) == gone


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "5:16"])
def test_a_pattern_has_n_zeros_in_every_m_inputs(pattern: str) -> None:
    zeros, group = map(int, pattern.split(":"))
    for name in NAMES:
        lab = Lab(tiny("llama"), text(4, 8))
        step = stepped(lab, rewrite=name, pattern=pattern)
        receipt = applied(lab, step)
        for site in step.sites:
            weight = lab.anatomy.weight(site)
            counts = (weight.unflatten(1, (-1, group)) == 0).sum(-1)
            assert counts.unique().tolist() == [zeros], (name, site)
            assert receipt.options["zeros"][site] == zeros / group


def test_magnitude_keeps_the_largest_of_every_four() -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    before, step = weights(lab), stepped(lab, pattern="2:4")
    applied(lab, step)
    for site in step.sites:
        for old, new in zip(before[site].reshape(-1, 4), lab.anatomy.weight(site).reshape(-1, 4), strict=True):
            kept = sorted(range(4), key=lambda i, o=old: -abs(float(o[i])))[:2]
            assert [i for i in range(4) if float(new[i].detach()) != 0] == sorted(kept)


def test_amounts_of_each_site() -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    sites = [s.id for s in lab.anatomy.linears("block.1.mlp")]
    share = dict(zip(sites, (0.25, 0.5, 0.75), strict=True))
    receipt = applied(lab, Step(rewrite="magnitude", sites=tuple(sites), options={"sparsity": share}))
    assert receipt.options["zeros"] == share
    patterns = dict(zip(sites, ("1:4", "2:4", "7:8"), strict=True))
    step = Step(rewrite="random", sites=tuple(sites), options={"pattern": patterns})
    assert [amount(step, s) for s in sites] == [(0.25, 1, 4), (0.5, 2, 4), (0.875, 7, 8)]
    lab = Lab(tiny("llama"), text(2, 6))
    assert list(applied(lab, step).options["zeros"].values()) == [0.25, 0.5, 0.875]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_nothing_but_the_maps_changes(name: str, model_name: str) -> None:
    """Biases, norms, embeddings and all other maps stay, bit for bit, and the weights keep their type."""
    lab = Lab(tiny(model_name).to(torch.bfloat16), text(4, 8))
    before = copy.deepcopy(lab.model.state_dict())
    step = stepped(lab, rewrite=name, sparsity=0.5)
    receipt = applied(lab, step)
    mine = {f"{lab.anatomy.site(s).path}.weight" for s in step.sites}
    for key, value in lab.model.state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key]) == (key not in mine), key
        if key in mine and name != "sparsegpt":
            kept = value != 0
            assert torch.equal(value[kept], before[key][kept]), key
    assert receipt.before == receipt.after == lab.anatomy.total()
    assert receipt.structure == {}
    assert all(0.49 < share < 0.51 for share in receipt.options["zeros"].values())


def test_the_receipt_tells_the_options_of_the_step_and_the_methods_own() -> None:
    lab = Lab(tiny("llama"), text(4, 8))
    step = stepped(lab, rewrite="random", sparsity=0.5)
    assert set(applied(lab, step).options) == {"sparsity", "zeros"}
    receipt = REWRITES.make("random", {"seed": 7}).apply(step, lab)
    assert {**receipt.options, "zeros": 0} == {"seed": 7, "sparsity": 0.5, "zeros": 0}
    over = REWRITES.make("random", {"seed": 7}).apply(stepped(lab, rewrite="random", sparsity=0.5, seed=8), lab)
    assert over.options["seed"] == 8


def test_an_option_in_the_step_is_the_methods_own() -> None:
    one, other = (Lab(tiny("llama"), text(4, 8)) for _ in range(2))
    step = stepped(one, rewrite="sparsegpt", sparsity=0.5)
    REWRITES.make("sparsegpt", {"columns": 8, "damping": 0.3}).apply(step, one)
    applied(other, stepped(other, rewrite="sparsegpt", sparsity=0.5, columns=8, damping=0.3))
    for site in step.sites:
        assert torch.equal(one.anatomy.weight(site), other.anatomy.weight(site))


SITES = ("block.1.mlp.gate_proj", "block.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("name", "sites", "options", "words"),
    [
        ("magnitude", SITES, {}, "neither sparsity nor pattern"),
        ("magnitude", SITES, {"sparsity": 0.5, "pattern": "2:4"}, "exclude each other"),
        ("magnitude", SITES, {"sparsity": 0.0}, "no number between 0 and 1"),
        ("magnitude", SITES, {"sparsity": 1}, "no number between 0 and 1"),
        ("magnitude", SITES, {"sparsity": True}, "no number between 0 and 1"),
        ("magnitude", SITES, {"sparsity": "half"}, "no number between 0 and 1"),
        ("magnitude", SITES, {"sparsity": float("nan")}, "no number between 0 and 1"),
        ("magnitude", SITES, {"sparsity": {SITES[0]: 0.5}}, "tells no sparsity"),
        ("magnitude", SITES, {"sparsity": dict.fromkeys((*SITES, "block.2.mlp.up_proj"), 0.5)}, "no site of the step"),
        ("magnitude", SITES, {"pattern": "4:2"}, 'no "N:M"'),
        ("magnitude", SITES, {"pattern": "0:4"}, 'no "N:M"'),
        ("magnitude", SITES, {"pattern": 24}, 'no "N:M"'),
        ("magnitude", SITES, {"pattern": "2:5"}, "32 inputs are no multiple of 5"),
        ("magnitude", (SITES[0], SITES[0]), {"sparsity": 0.5}, "names it twice"),
        ("magnitude", SITES, {"sparsity": 0.5, "row": True}, "no option 'row' .did you mean rows"),
        ("magnitude", SITES, {"sparsity": 0.5, "rows": "yes"}, "rows is true or false"),
        ("magnitude", SITES, {"sparsity": 0.5, "in_turn": True}, "no option 'in_turn'"),
        ("wanda", SITES, {"pattern": "2:4", "variant": True}, "the variant has no pattern"),
        ("sparsegpt", SITES, {"sparsity": 0.5, "columns": 0}, "columns is at least 1"),
        ("sparsegpt", SITES, {"sparsity": 0.5, "damping": 0.0}, "damping is above 0"),
    ],
)
def test_bad_steps(name: str, sites: tuple[str, ...], options: dict[str, Any], words: str) -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    before = weights(lab)
    with pytest.raises(LaminaError, match=words) as error:
        applied(lab, Step(rewrite=name, sites=sites, options=options))
    assert "\n" not in str(error.value)
    assert all(torch.equal(w, before[s]) for s, w in weights(lab).items())


def test_a_forecast_names_a_map_that_the_model_lacks() -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    step = Step(rewrite="magnitude", sites=("block.1.mlp.gone",), options={"sparsity": 0.5})
    with pytest.raises(InputError, match="no such linear map"):
        REWRITES.make("magnitude").forecast(step, lab.anatomy)


def test_blocks_that_can_not_be_walked_are_refused_in_turn_alone() -> None:
    lab = Lab(tiny("llama"), text(2, 6))
    lab.anatomy.stacks = tuple(replace(k, linked=False) for k in lab.anatomy.stacks)
    step = stepped(lab, rewrite="wanda", sparsity=0.5)
    assert REWRITES.make("wanda").check(step, lab.anatomy) == []
    with pytest.raises(UnsupportedError, match=r"can't be run one by one \(in_turn=False"):
        REWRITES.make("wanda", {"in_turn": True}).apply(step, lab)


def test_powers_are_the_diagonal_of_the_moments_and_add_up() -> None:
    """Padding is no input."""
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (9, 4, 7, 12)]
    lab = Lab(model, padded(rows, 2, side="left"))
    sites = [s.id for s in lab.anatomy.linears("block.2")]
    whole = InputPowers(sites)
    lab.stream([whole], score=False)
    moments = input_moments(lab, sites)
    parts = []
    for batch in lab.batches:
        parts.append(InputPowers(sites))
        lab.on([batch]).stream([parts[-1]], score=False)
    both = parts[0].merge(parts[1])
    for site in sites:
        second, _, tokens = moments.of(site)
        torch.testing.assert_close(whole.of(site)[0], second.diagonal(), rtol=1e-5, atol=0)
        torch.testing.assert_close(both.of(site)[0], whole.of(site)[0], rtol=1e-5, atol=0)
        assert whole.of(site)[1] == both.of(site)[1] == tokens == 32
    with pytest.raises(UnsupportedError, match="no forward showed"):
        whole.of("block.0.mlp.up_proj")
    assert whole.scores().values == {}


def test_a_map_of_low_rank_is_two_maps_that_can_be_pruned() -> None:
    lab = Lab(tiny("llama"), text(4, 8))
    site = lab.anatomy.linears("block.1.mlp")[0]
    applied(lab, Step(rewrite="svd", sites=(site.id,), options={"rank": 8}))
    inside = [s for s in lab.anatomy.linears() if s.path.startswith(f"{site.path}.")]
    assert len(inside) == 2
    applied(lab, Step(rewrite="wanda", sites=tuple(s.id for s in inside), options={"pattern": "2:4"}))
    for part in inside:
        module: nn.Linear = lab.model.get_submodule(part.path)  # type: ignore[assignment]
        assert float((module.weight == 0).double().mean()) == 0.5


def test_the_proof_says_that_masks_are_no_speed_up() -> None:
    from types import SimpleNamespace

    from lamina.core.documents import ModelRef, Receipts
    from lamina.pipeline.verbs import notes

    lab = Lab(tiny("llama"), text(2, 8))
    receipts = [
        REWRITES.make(n).apply(Step(rewrite=n, sites=(s,), options=o), lab)
        for n, s, o in (
            ("magnitude", "block.0.mlp.up_proj", {"sparsity": 0.25}),
            ("round", "block.1.mlp.up_proj", {"type": "Q8_0"}),
            ("window", "block.2.attention", {"window": 3}),
        )
    ]
    document = Receipts(model=ModelRef(name="tiny", fingerprint="sha256:0"), plan="", receipts=tuple(receipts))
    found = notes(SimpleNamespace(thinned=lab.model), document)  # type: ignore[reportArgumentType]
    masks, window = found[-2:]
    assert masks == (
        "magnitude: in 1 maps 25% of the weights are zero on average, and are stored and multiplied like others: masks "
        "are not a speed-up"
    )
    assert "at most 3 tokens" in window
    assert found[0].startswith("transformers: loads with trust_remote_code=True")
