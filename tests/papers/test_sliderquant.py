"""SliderQuant (arXiv 2603.25284): windows, what is learnt, and the loss, against whole forwards and plain loops."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.core.documents import Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import REWRITES
from lamina.lab import Lab
from lamina.maths.grids import BLOCK, SIMPLE, blocks_of
from lamina.papers.bits.sliderquant import RATES, SHARES, slides
from lamina.rewrites._windows import CLIP, Learnt, Windows
from lamina.testing.bench import picture, rows
from lamina.testing.models import padded, text, tiny

GRIDS = {grid.name: grid for grid in SIMPLE}
NAMES = sorted(GRIDS)


@pytest.mark.parametrize("depth", [8, 9, 12, 32])
def test_windows_are_the_papers(depth: int) -> None:
    start = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    middle = [[n, n + 1] for n in range(3, depth - 4)]
    end = [list(range(n, depth)) for n in range(depth - 4, depth)]
    assert [list(w) for w in slides(depth, 4)] == [*start, *middle, *end]


@pytest.mark.parametrize("depth", range(1, 12))
@pytest.mark.parametrize("fill", [1, 2, 4])
def test_windows_cover_all_blocks_in_order(depth: int, fill: int) -> None:
    windows = slides(depth, fill)
    assert {n for w in windows for n in w} == set(range(depth))
    assert [w.start for w in windows] == sorted(w.start for w in windows)
    assert [w.stop for w in windows] == sorted(w.stop for w in windows)
    assert all(1 <= len(w) <= max(fill, 2) for w in windows)
    assert windows[0] == range(1)
    assert windows[-1] == range(depth - 1, depth)


def learnt(kind: str, outputs: int = 4, inputs: int = 64, *, seed: int = 0) -> Learnt:
    draw = torch.Generator().manual_seed(seed)
    module = nn.Linear(inputs, outputs)
    with torch.no_grad():
        module.weight.copy_(torch.randn(outputs, inputs, generator=draw))
    return Learnt(module, GRIDS[kind], 4, draw)


def moved(kind: str) -> Learnt:
    """With learnables that have left their beginning."""
    one, draw = learnt(kind), torch.Generator().manual_seed(7)
    with torch.no_grad():
        one.up.copy_(torch.randn(one.up.shape, generator=draw))
        one.clip.copy_(2 * torch.rand(one.clip.shape, generator=draw))
    return one


def literal(kind: str, row: list[float], clip: float) -> tuple[list[float], float, float]:
    """One block's numbers, its step and its lowest value, number by number."""
    bits, factor = GRIDS[kind].bits, 1 / (1 + math.exp(-clip))
    if GRIDS[kind].offset:
        step, low, codes = factor * (max(row) - min(row)) / (2**bits - 1), factor * min(row), (0, 2**bits - 1)
    elif bits == 8:
        step, low, codes = factor * max(abs(x) for x in row) / 127, 0.0, (-127, 127)
    else:
        step, low = factor * max(row, key=abs) / -(2 ** (bits - 1)), 0.0
        codes = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    held, lowest = (float(torch.tensor(x).half()) for x in (step, low))
    made = [min(max(math.floor((x - lowest) / held + 0.5), codes[0]), codes[1]) * held + lowest for x in row]
    return made, step, low


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", NAMES)
def test_a_share_of_the_inputs_is_rounded_with_clipped_steps(kind: str, share: float) -> None:
    one = moved(kind)
    adapted = (one.weight + one.up @ one.down / 4).detach()
    got = one.made(share).detach()
    wanted = adapted.clone()
    for r in range(4):
        for n in range(round(2 * share)):
            here = slice(n * BLOCK, (n + 1) * BLOCK)
            made = literal(kind, adapted[r, here].tolist(), float(one.clip.detach()[r, n]))[0]
            wanted[r, here] = torch.tensor(made)
    assert float((got - wanted).abs().max()) < 1e-5
    assert GRIDS[kind].holds(got[:, :BLOCK]) == (share > 0)


def test_it_begins_as_rounding_with_steps_a_little_shorter() -> None:
    one = learnt("Q8_0")
    assert torch.equal(one.made(0.0), one.weight)
    assert float(one.clip.detach().sigmoid().min()) == pytest.approx(1 / (1 + math.exp(-CLIP)))
    off = (one.made(1.0).detach() - one.weight).abs().max() / one.weight.abs().max()
    assert 0 < float(off) < 0.03


@pytest.mark.parametrize("kind", NAMES)
def test_gradients_reach_all_that_is_learnt(kind: str) -> None:
    """Of a number inside the range it is 1 for the weight and code - place for the step; outside 0 and the code."""
    one = moved(kind)
    got_up, got_down, got_clip = torch.autograd.grad(one.made(1.0).sum(), [one.up, one.down, one.clip])
    assert float(got_down.abs().max()) > 0
    assert float(got_up.abs().max()) > 0
    adapted = (one.weight + one.up @ one.down / 4).detach()
    cut, grid = blocks_of(adapted).double(), GRIDS[kind]
    wanted = torch.zeros(4, 2)
    for r in range(4):
        for n in range(2):
            row, clip = cut[r, n].tolist(), float(one.clip.detach()[r, n])
            made, step, low = literal(kind, row, clip)
            held, lowest = (float(torch.tensor(x).half()) for x in (step, low))
            slope = 1 / (1 + math.exp(clip))  # of the factor, over the factor
            for x, number in zip(row, made, strict=True):
                place, code = (x - low) / step, round((number - lowest) / held)
                inside = grid.least <= place <= grid.most
                wanted[r, n] += slope * (step * (code - place if inside else code) + (0.0 if inside else low))
    assert torch.allclose(got_clip.squeeze(-1), wanted, rtol=1e-2, atol=1e-2)


def walking(model: Any, ids: Any, kind: str = "Q4_0", blocks: tuple[int, ...] = (0, 1, 2, 3)) -> Windows:
    lab = Lab(model, ids, **({"batch_size": 2} if isinstance(ids, Tensor) else {}))
    draw = torch.Generator().manual_seed(0)
    maps: list[dict[str, Learnt]] = [{} for _ in range(4)]
    for site in lab.anatomy.linears():
        assert site.block is not None
        if site.block in blocks:
            path = site.path.removeprefix(f"{lab.anatomy.stacks[0].blocks[site.block].path}.")
            maps[site.block][path] = Learnt(model.get_submodule(site.path), GRIDS[kind], 4, draw)
    return Windows(lab, maps)


@torch.no_grad()
def replaced(walk: Windows, upto: int, share: float) -> Any:
    """A copy of the model with the first blocks' maps rounded."""
    model = copy.deepcopy(walk.lab.model)
    for at in range(upto):
        for path, one in walk.maps[at].items():
            weight: Any = model.get_submodule(f"{walk.stack.blocks[at].path}.{path}").weight
            weight.copy_(one.stored(share))
    return model


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_is_that_of_the_stream_behind_the_window(name: str, share: float) -> None:
    """Against whole forwards: the rounded network's stream behind a window, and the dense network's."""
    model, ids = tiny(name), text(4, 10)
    walk = walking(model, ids)
    for window in (range(1), range(2), range(1, 3)):
        walk.go(window.start, share)
        targets = list(walk.targets(window))
        for place, batch in enumerate(ids.split(2)):
            with torch.no_grad():
                dense = model(batch, output_hidden_states=True).hidden_states[window.stop]
                rough = replaced(walk, window.stop, share)(batch, output_hidden_states=True).hidden_states[window.stop]
                got = walk.loss(window, place, share, targets[place])
            assert float(got) == pytest.approx(float((rough - dense).square().mean()), rel=1e-3), window
            assert float(got) > 0


def test_padding_counts_nothing() -> None:
    model = tiny("llama")
    walk = walking(model, padded(rows(), 6))
    window = range(2)
    (target,) = walk.targets(window)
    got = float(walk.loss(window, 0, 1.0, target).detach())
    total, count, other = 0.0, 0, replaced(walk, 2, 1.0)
    for row in rows():
        with torch.no_grad():
            a, b = (m(row.unsqueeze(0), output_hidden_states=True).hidden_states[2] for m in (model, other))
        total, count = total + float((a - b).square().sum()), count + a.numel()
    assert got == pytest.approx(total / count, rel=1e-3)


def test_nothing_rounded_is_no_loss() -> None:
    walk = walking(tiny("llama"), text(4, 10))
    (first, _) = walk.targets(range(2))
    assert float(walk.loss(range(2), 0, 0.0, first).detach()) == 0.0


def adam(walk: Windows, window: range, steps: int) -> list[float]:
    """The losses of AdamW without decay of weights, by its formulas."""
    free = [(x, rate) for at in window for m in walk.maps[at].values() for x, rate in
            ((m.down, RATES[0]), (m.up, RATES[0]), (m.clip, RATES[1]))]  # fmt: skip
    state = [(torch.zeros_like(x), torch.zeros_like(x)) for x, _ in free]
    targets, losses = list(walk.targets(window)), []
    for n in range(steps):
        loss = walk.loss(window, n % 2, 1.0, targets[n % 2])
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, [x for x, _ in free])
        with torch.no_grad():
            for (x, rate), (mean, square), g in zip(free, state, gradients, strict=True):
                mean.mul_(0.9).add_(0.1 * g)
                square.mul_(0.999).add_(0.001 * g * g)
                size = (square / (1 - 0.999 ** (n + 1))).sqrt() + 1e-8
                x.sub_(2 * rate * (1 - n / steps) * (mean / (1 - 0.9 ** (n + 1))) / size)
    return losses


def test_a_window_is_trained_by_adam_on_a_line_to_zero() -> None:
    one, other = (walking(tiny("llama"), text(4, 10)) for _ in range(2))
    got = one.train(range(1, 3), 1.0, 3, RATES)
    other.go(1, 1.0)
    assert got == pytest.approx(adam(other, range(1, 3), 6), rel=1e-3)
    assert len(got) == 6


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1"])
def test_training_brings_windows_closer(kind: str) -> None:
    walk = walking(tiny("llama"), text(8, 16), kind)
    losses = walk.train(range(2), 1.0, 20, RATES)
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1"])
def test_outputs_are_closer_than_rounded_to_nearest(kind: str) -> None:
    ids, off = text(16, 24), {}
    for name in ("round", "sliderquant"):
        lab = Lab(tiny("llama"), ids)
        with torch.no_grad():
            dense = lab.model(ids).logits
            sites = tuple(s.id for s in lab.anatomy.linears())
        REWRITES.make(name).apply(Step(rewrite=name, sites=sites, options={"type": kind}), lab)
        with torch.no_grad():
            off[name] = float((lab.model(ids).logits - dense).norm())
        assert all(GRIDS[kind].holds(lab.anatomy.weight(s).detach()) for s in sites)
    assert off["sliderquant"] < 0.9 * off["round"]


def test_both_slides_visit_all_windows_with_half_the_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[range, float, int]] = []

    def train(self: Windows, window: range, share: float, epochs: int, rates: Any) -> list[float]:
        self.go(window.start, share)
        seen.append((window, share, epochs))
        return []

    monkeypatch.setattr(Windows, "train", train)
    lab = Lab(tiny("llama"), text(4, 10))
    sites = tuple(s.id for s in lab.anatomy.linears())
    step = Step(rewrite="sliderquant", sites=sites, options={"type": "Q8_0"})
    REWRITES.make("sliderquant", {"epochs": 7}).apply(step, lab)
    windows = [range(1), range(2), range(1, 3), range(2, 4), range(3, 4)]
    assert seen == [(w, s, 4 - n) for n, s in enumerate(SHARES) for w in windows]


def test_only_the_sites_change_and_nothing_is_left_behind() -> None:
    lab = Lab(tiny("llama"), text(4, 10))
    site = lab.anatomy.linears("block.2.mlp")[0]
    before = picture(lab.model)
    step = Step(rewrite="sliderquant", sites=(site.id,), options={"type": "Q4_0"})
    REWRITES.make("sliderquant", {"epochs": 2}).apply(step, lab)
    after = picture(lab.model)
    changed = [
        k for k, v in before.items() if not (torch.equal(v, after[k]) if isinstance(v, Tensor) else v == after[k])
    ]
    assert changed == [f"weights {site.path}.weight"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sixteen_bits(name: str) -> None:
    lab = Lab(tiny(name).bfloat16(), text(4, 10))
    sites = [s.id for s in lab.anatomy.linears("block.1")]
    step = Step(rewrite="sliderquant", sites=tuple(sites), options={"type": "Q5_0"})
    REWRITES.make("sliderquant", {"epochs": 2}).apply(step, lab)
    for site in sites:
        held = lab.anatomy.weight(site).detach()
        assert held.dtype == torch.bfloat16
        assert GRIDS["Q5_0"].holds(held)


def test_the_same_seed_gives_the_same_weights() -> None:
    made = []
    for seed in (0, 0, 1):
        lab = Lab(tiny("llama"), text(4, 10), seed=seed)
        sites = tuple(s.id for s in lab.anatomy.linears("block.1"))
        step = Step(rewrite="sliderquant", sites=sites, options={"type": "Q4_0"})
        REWRITES.make("sliderquant", {"epochs": 4}).apply(step, lab)
        made.append(torch.cat([lab.anatomy.weight(s).detach().flatten() for s in sites]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_maps_that_share_their_weights_are_refused() -> None:
    model: Any = tiny("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    lab = Lab(model, text(4, 10))
    sites = tuple(f"block.{n}.mlp.up_proj" for n in (0, 2))
    with pytest.raises(UnsupportedError, match="share their weights"):
        REWRITES.make("sliderquant").apply(Step(rewrite="sliderquant", sites=sites, options={"type": "Q4_0"}), lab)


@pytest.mark.parametrize("options", [{"epochs": -1}, {"rank": 0}, {"fill": 0}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be at least"):
        REWRITES.make("sliderquant", options)
