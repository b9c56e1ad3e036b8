"""FuseGPT's fusion (arXiv 2411.14507): groups, coefficients, losses and training, written out for a Llama."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lamina.core.documents import Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import REWRITES
from lamina.exporters.hf import form
from lamina.lab import Lab
from lamina.lab.order import merged
from lamina.rewrites._fusion import BETAS, LOSSES, Fused, Training, around
from lamina.testing.models import own_text, padded, text, tiny


def run(lab: Lab, *sites: str, **options: Any) -> Any:
    return REWRITES.make("fusegpt", options).apply(Step(rewrite="fusegpt", sites=sites, options=options), lab)


def how(**changes: Any) -> Training:
    given = {"rank": 3, "form": "low-rank", "epochs": 2, "rate": 1e-3, "coefficient_rate": 1e-2, "loss": "squares"}
    return Training(**{**given, **changes})


@pytest.mark.parametrize("depth", [3, 4, 7, 8, 9, 16, 30])
def test_groups_are_the_papers(depth: int) -> None:
    """From target - (G/2 - 1) to the block + (G/2 - 1), the target one before it, moved inside at both ends."""
    for size in (2, 4, 8):
        for idx in range(depth):
            target = idx - 1 if idx else 1
            start, end = target - (size // 2 - 1), idx + (size // 2 - 1)
            if start < 0 or (idx == 0 and size < 8):
                start, end = 0, size - 1
            if end >= depth:
                start, end = depth - size, depth - 1
            assert list(around(idx, depth, size)) == list(range(max(start, 0), end + 1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_without_training_it_is_the_drop_to_the_bit(name: str) -> None:
    ids = text(3, 9)
    one, other = Lab(tiny(name), ids), Lab(tiny(name), ids)
    receipt = run(one, "block.2", epochs=0)
    dropped = REWRITES.make("drop").apply(Step(rewrite="drop", sites=("block.2",)), other)
    assert receipt.after == dropped.after
    with torch.no_grad():
        assert torch.equal(one.model(ids).logits, other.model(ids).logits)


@pytest.mark.parametrize("kind", ["low-rank", "full", "rows"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_fused_map_begins_as_it_was_and_is_a_sum_number_by_number(kind: str, turned: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    weight, other = torch.randn(5, 4, generator=draw), torch.randn(5, 4, generator=draw)
    fused = Fused(weight, other, how(form=kind), draw, turned=turned)
    assert torch.equal(fused.stored(), weight)
    with torch.no_grad():
        for tensor in (*fused.base, *fused.coefficients):
            tensor.copy_(torch.randn(tensor.shape, generator=draw))
    w, v = (t.T if turned else t for t in (weight, other))
    b, a = (t.detach() for t in fused.base)
    cs = [t.detach() for t in fused.coefficients]
    made = torch.zeros_like(w)
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            if kind == "low-rank":
                c = sum(float(cs[0][o, k] * cs[1][k, i]) for k in range(3))
            else:
                c = float(cs[0][o, i if kind == "full" else 0])
            made[o, i] = w[o, i] + sum(float(b[o, k] * a[k, i]) for k in range(3)) + c * v[o, i]
    torch.testing.assert_close(fused.stored().detach(), made.T if turned else made, rtol=1e-4, atol=1e-5)


def test_factors_begin_as_lora_does_and_biases_have_a_coefficient_alone() -> None:
    draw = torch.Generator().manual_seed(1)
    fused = Fused(torch.randn(50, 64), torch.randn(50, 64), how(rank=40), draw)
    for zero, drawn in (fused.base, fused.coefficients):
        assert not zero.any()
        assert float(drawn.detach().abs().max()) == pytest.approx(1 / 8, rel=0.01)
    bias = Fused(torch.ones(5), torch.full((5,), 2.0), how(), draw)
    with torch.no_grad():
        bias.coefficients[0].copy_(torch.arange(5.0))
    assert bias.base == []
    assert bias.stored().tolist() == [1.0, 3.0, 5.0, 7.0, 9.0]


def literal_loss(kind: str, dense: Tensor, out: Tensor) -> float:
    """Losses in plain loops; [batch, tokens, width]."""
    y, x = dense.double(), out.double()
    batch, tokens, width = y.shape
    total = 0.0
    if kind == "squares":
        return math.fsum(((y - x) ** 2).flatten().tolist()) / y.numel()
    for t in range(tokens):
        for n in range(batch if kind == "features" else width):
            rows = (y[n, t], x[n, t]) if kind == "features" else (y[:, t, n], x[:, t, n])
            p, q = ([math.exp(float(v)) for v in row] for row in rows)
            p, q = ([v / sum(values) for v in values] for values in (p, q))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / (batch * tokens if kind == "features" else batch)


@pytest.mark.parametrize("kind", list(LOSSES))
def test_losses_are_the_formulas(kind: str) -> None:
    torch.manual_seed(0)
    dense, out = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    keep = torch.ones(3, 4, dtype=torch.bool)
    assert float(LOSSES[kind](dense, out, keep)) == pytest.approx(literal_loss(kind, dense, out), rel=1e-5)
    if kind != "sequences":
        keep[1, 2:] = False
        moved = out.clone()
        moved[1, 2:] += 5
        assert torch.equal(LOSSES[kind](dense, out, keep), LOSSES[kind](dense, moved, keep))


def literal(model: Any, ids: Tensor, size: int, gone: int, given: Training, seed: int) -> Any:
    """Fuse one layer of a Llama: its layers called one by one, Adam by hand; the thinned model."""
    body, draw = model.model, torch.Generator().manual_seed(seed)
    places = torch.arange(ids.shape[1])[None]
    group = list(around(gone, len(body.layers), size))
    with torch.no_grad():
        states = [body.embed_tokens(b) for b in ids.split(2)]
        turns = body.rotary_emb(states[0], places)

        def layer(n: int, h: Tensor, held: dict[str, Tensor]) -> Tensor:
            return functional_call(body.layers[n], held, (h,), {"position_embeddings": turns, "position_ids": places})

        for n in range(group[0]):
            states = [layer(n, h, {}) for h in states]
        wanted = list(states)
        for n in group:
            wanted = [layer(n, h, {}) for h in wanted]
    left = [n for n in group if n != gone]
    free: list[tuple[Tensor, float]] = []
    made: dict[int, dict[str, tuple[Tensor, ...]]] = {}
    for n in left:
        made[n] = {}
        for name, weight in body.layers[n].named_parameters():
            if weight.ndim != 2:
                continue
            o, i = weight.shape
            factors = []
            for rate in (given.rate, given.coefficient_rate):
                drawn = (2 * torch.rand(given.rank, i, generator=draw) - 1) / i**0.5
                pair = (torch.zeros(o, given.rank, requires_grad=True), drawn.requires_grad_())
                factors += pair
                free += [(t, rate) for t in pair]
            other = body.layers[gone].get_parameter(name).detach()
            made[n][name] = (weight.detach().clone(), *factors, other)

    def weights(n: int) -> dict[str, Tensor]:
        return {k: w + b @ a + (e @ f) * v for k, (w, b, a, e, f, v) in made[n].items()}

    first, second = ([torch.zeros_like(t) for t, _ in free] for _ in range(2))
    total = given.epochs * len(states)
    for step in range(total):
        h = states[step % len(states)]
        for n in left:
            h = layer(n, h, weights(n))
        loss = (h - wanted[step % len(states)]).square().mean()
        slopes = torch.autograd.grad(loss, [t for t, _ in free])
        with torch.no_grad():
            for at, ((tensor, rate), slope) in enumerate(zip(free, slopes, strict=True)):
                first[at] = BETAS[0] * first[at] + (1 - BETAS[0]) * slope
                second[at] = BETAS[1] * second[at] + (1 - BETAS[1]) * slope**2
                m, v = first[at] / (1 - BETAS[0] ** (step + 1)), second[at] / (1 - BETAS[1] ** (step + 1))
                tensor.sub_(rate * (1 + math.cos(math.pi * step / total)) / 2 * m / (v.sqrt() + 1e-8))
    with torch.no_grad():
        for n in left:
            for name, weight in weights(n).items():
                body.layers[n].get_parameter(name).copy_(weight)
    return model


@pytest.mark.parametrize(("size", "gone"), [(8, 2), (2, 3), (2, 0)])
def test_training_is_adam_on_the_groups_own_output(size: int, gone: int) -> None:
    ids = text(6, 9)
    given = how()
    want = literal(tiny("llama"), ids, size, gone, given, seed=5)
    del want.model.layers[gone]
    lab = Lab(tiny("llama"), ids, batch_size=2, seed=5)
    options = {"rank": 3, "epochs": 2, "rate": 1e-3, "coefficient_rate": 1e-2, "loss": "squares"}
    run(lab, f"block.{gone}", group=size, **options)
    dense = tiny("llama")
    del dense.model.layers[gone]
    moved = 0
    for name, parameter in want.named_parameters():
        torch.testing.assert_close(lab.model.get_parameter(name), parameter, rtol=1e-3, atol=2e-5)
        moved += not torch.equal(parameter, dense.get_parameter(name))
    assert moved == 7 * (min(size, 4) - 1)


def test_two_blocks_are_fused_in_turn_and_the_second_group_is_what_the_first_left() -> None:
    ids = text(4, 9)
    one, other = Lab(tiny("llama"), ids, batch_size=2), Lab(tiny("llama"), ids, batch_size=2)
    options = {"rank": 3, "epochs": 2, "form": "rows", "rate": 0.0, "coefficient_rate": 1e-2, "loss": "squares"}
    receipt = run(one, "block.3", "block.1", group=2, **options)
    run(other, "block.3", group=2, **options)
    other.seed = 0
    run(other, "block.1", group=2, **options)
    assert receipt.sites == ("block.3", "block.1")
    assert receipt.after == other.anatomy.total()
    for name, parameter in other.model.named_parameters():
        torch.testing.assert_close(one.model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_on_other_text_it_is_nearer_than_the_drop(name: str, loss: str) -> None:
    ids = own_text(tiny(name), 48)
    off = {}
    for epochs in (0, 20):
        lab = Lab(tiny(name), ids[:32], batch_size=8)
        dense = [lab.forward(b).detach().log_softmax(-1) for b in lab.on(ids[32:]).batches]
        receipt = run(lab, "block.2", epochs=epochs, loss=loss, rank=16, rate=1e-3, coefficient_rate=1e-2)
        made = [lab.forward(b).detach().log_softmax(-1) for b in lab.on(ids[32:]).batches]
        off[epochs] = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(dense, made, strict=True))
        assert form(lab.model, [receipt]) == "stock"
    assert off[20] < 0.97 * off[0]


def test_a_block_that_adds_nothing_leaves_its_neighbours_alone() -> None:
    """Nothing is missing: no slope, so that no weight moves."""
    from lamina.testing.planted import silence

    lab = Lab(tiny("llama"), text(4, 9), batch_size=2)
    silence(lab.anatomy, "block.2")
    before = {k: v.clone() for k, v in lab.model.state_dict().items() if ".layers.1." in k}
    run(lab, "block.2", epochs=2, loss="squares", rate=1e-2, coefficient_rate=1e-2, group=2)
    for key, value in before.items():
        assert torch.equal(lab.model.state_dict()[key], value), key


def test_padding_is_not_trained_on() -> None:
    ids = [text(1, n, seed=n)[0] for n in (9, 5, 7)]
    made = []
    for pad in (0, 7):
        (batch,) = padded(ids, 3)
        batch["input_ids"] = torch.where(batch["attention_mask"] > 0, batch["input_ids"], pad)
        lab = Lab(tiny("llama"), [batch])
        run(lab, "block.2", epochs=3, rank=3, coefficient_rate=1e-2)
        made.append(lab.model.model.layers[1].mlp.up_proj.weight)
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="one length"):
        run(Lab(tiny("llama"), padded(ids, 3)), "block.2", loss="sequences", epochs=1)
    with pytest.raises(InputError, match="two sequences"):
        run(Lab(tiny("llama"), text(2, 8), batch_size=1), "block.2", loss="sequences", epochs=1)


def test_biases_and_maps_move_and_norms_do_not() -> None:
    dense, lab = tiny("gpt2"), Lab(tiny("gpt2"), text(4, 9), batch_size=2)
    run(lab, "block.3", epochs=2, rank=3, coefficient_rate=1e-2)
    for name, parameter in lab.model.transformer.h[1].named_parameters():
        was = dense.transformer.h[1].get_parameter(name)
        assert torch.equal(parameter, was) == (".ln_" in f".{name}"), name
    assert not any(p.grad is not None for p in lab.model.parameters())
    assert all(p.requires_grad for p in lab.model.parameters())


def test_steps_of_a_plan_are_one_so_that_all_names_are_the_dense_ones() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    steps = [Step(rewrite="fusegpt", sites=(s,), options={"epochs": 0}) for s in ("block.0", "block.2")]
    (one,) = merged(steps, lab)
    assert one.sites == ("block.0", "block.2")
    mixed = [
        Step(rewrite="fusegpt", sites=("block.0",), options={"group": 4}),
        Step(rewrite="fusegpt", sites=("block.2",)),
    ]
    (both,) = merged(mixed, lab)
    dense = tiny("llama").model.layers
    run(lab, *both.sites, epochs=0, **both.options)
    for at, n in ((0, 1), (1, 3)):
        assert torch.equal(lab.model.model.layers[at].mlp.up_proj.weight, dense[n].mlp.up_proj.weight)


def test_a_loss_that_is_no_number_is_told() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    with torch.no_grad():
        lab.model.model.layers[2].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(InputError, match="no number"):
        run(lab, "block.2", epochs=1)


@pytest.mark.parametrize(
    "options",
    [
        {"group": 1},
        {"group": {"block.1": 1}},
        {"rank": 0},
        {"epochs": -1},
        {"rate": -1.0},
        {"coefficient_rate": -1.0},
        {"form": "x"},
        {"loss": "x"},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        REWRITES.make("fusegpt", options)


@pytest.mark.parametrize(
    ("sites", "said"),
    [(("block.1.mlp",), "no such block"), (("block.1", "block.1"), "twice"), ((), "no site")],
)
def test_what_cannot_be_done_is_told(sites: tuple[str, ...], said: str) -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    before = {k: v.clone() for k, v in lab.model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=said):
        run(lab, *sites)
    assert all(torch.equal(v, lab.model.state_dict()[k]) for k, v in before.items())


def test_maps_of_other_shapes_are_left_out() -> None:
    from lamina.rewrites._fusion import pairs

    class Two(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.same, self.other, self.norm = nn.Linear(3, 4), nn.Linear(width, 4, bias=False), nn.LayerNorm(4)

    assert list(pairs(Two(5), Two(6))) == [("same.weight", False), ("same.bias", False)]
