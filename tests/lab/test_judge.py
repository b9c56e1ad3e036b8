"""The judge against a literal oracle: every set, every base, every metric; and what prefix reuse saves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.lab import Judge, Lab
from lamina.rewrites.drop import Drop
from lamina.testing import zoo
from lamina.testing.bench import expect_same, fresh, lab_on, picture, rows, text
from lamina.testing.models import NAMES, padded, tiny
from lamina.testing.rewrites import logits

FEW = ("llama", "gemma2", "gpt_neox", "falcon", "mixtral", "gpt2", "nanogpt")
METRICS = ("kl", "js", "js-reversed", "loss")
SETS = st.frozensets(st.integers(0, 7), max_size=6)


def literal(metric: str, dense: torch.Tensor, thin: torch.Tensor, row: torch.Tensor) -> list[float]:
    """The metric at each position of one row, in float64, by its definition."""
    p, q = dense.double().softmax(-1), thin.double().softmax(-1)
    m = (p + q) / 2
    if metric == "loss":
        return [math.log(float(p[t, row[t + 1]])) - math.log(float(q[t, row[t + 1]])) for t in range(len(row) - 1)]
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    found = {"kl": kl(p, q), "js": (kl(p, m) + kl(q, m)) / 2, "js-reversed": (kl(m, p) + kl(m, q)) / 2}[metric]
    return found.tolist()


@cache
def model_of(name: str) -> tuple[Any, tuple[str, ...]]:
    model, anatomy, _ = fresh(name)
    return model, tuple(s.id for s in anatomy.sublayers)


def oracle(name: str, metric: str, gone: Iterable[str], ids: list[torch.Tensor]) -> float:
    """Ablate on another copy, run every row alone from the first block, and average over all positions."""
    (model, _), bench = model_of(name), copy_of(name)
    with bench.ablate(gone):
        values = [v for r in ids for v in literal(metric, one(model, r), one(bench.model, r), r)]
    return math.fsum(values) / len(values)


def copy_of(name: str) -> Lab:
    model, anatomy, _ = fresh(name)
    return Lab(model, text(1, 4), anatomy=anatomy)


def one(model: Any, row: torch.Tensor) -> torch.Tensor:
    return logits(model, row.unsqueeze(0))[0]


@cache
def judge_of(name: str, metric: str) -> Judge:
    model, _ = model_of(name)
    return Judge(Lab(model, text(3, 9)), metric)


@settings(max_examples=40)
@given(st.sampled_from(FEW), st.sampled_from(METRICS), SETS, SETS)
def test_any_set_from_any_base(name: str, metric: str, base: frozenset[int], gone: frozenset[int]) -> None:
    _, sites = model_of(name)
    judge = judge_of(name, metric)
    judge.forget()
    judge.rebase(sites[i] for i in base)
    wanted = frozenset(sites[i] for i in gone)
    want = oracle(name, metric, wanted, list(text(3, 9)))
    assert judge.value(wanted) == pytest.approx(want, rel=2e-3, abs=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_single_site_from_two_bases(name: str) -> None:
    _, sites = model_of(name)
    judge = judge_of(name, "kl")
    for base in ((), (sites[2], sites[5], sites[6], sites[7])):
        judge.forget()
        judge.rebase(base)
        for site in sites:
            wanted = frozenset({*base, site})
            assert judge.value(wanted) == pytest.approx(
                oracle(name, "kl", wanted, list(text(3, 9))), rel=2e-3, abs=2e-6
            )


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_judge_foresees_the_dropped_model(name: str) -> None:
    gone = ("block.0.attention", "block.1.mlp", "block.3")
    bench = Lab(tiny(name), text(3, 9))
    dense = [one(bench.model, r) for r in text(3, 9)]
    seen = Judge(bench, "kl").value(gone)
    Drop().apply(Step(rewrite="drop", sites=gone), bench)
    values = [v for r, d in zip(text(3, 9), dense, strict=True) for v in literal("kl", d, one(bench.model, r), r)]
    assert seen == pytest.approx(sum(values) / len(values), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("metric", METRICS)
def test_padding_and_batching_do_not_count(metric: str, size: int, side: str) -> None:
    judge = Judge(lab_on(padded(rows(), 6, side=side)), metric, batch_size=size)
    judge.rebase(["block.1.mlp"])
    gone = {"block.1.mlp", "block.2.attention"}
    assert judge.value(gone) == pytest.approx(oracle("llama", metric, gone, rows()), rel=2e-3)


def test_rises_have_errors_over_sequences() -> None:
    judge = Judge(lab_on(padded(rows(), 6)), "loss", batch_size=2)
    mean = judge.rises(["block.1"])
    each = [literal("loss", one(model_of("llama")[0], r), dropped(r), r) for r in rows()]
    sums, counts = [sum(e) for e in each], [len(e) for e in each]
    ratio = sum(sums) / sum(counts)
    spread = sum((s - ratio * n) ** 2 for s, n in zip(sums, counts, strict=True))
    assert float(mean.value) == pytest.approx(ratio, rel=1e-4)
    assert float(mean.stderr) == pytest.approx(math.sqrt(spread * 6 / 5) / sum(counts), rel=1e-3)
    assert judge.value(["block.1"]) == pytest.approx(float(mean.value), rel=1e-12)


def dropped(row: torch.Tensor) -> torch.Tensor:
    bench = copy_of("llama")
    with bench.ablate(["block.1"]):
        return one(bench.model, row)


# What prefix reuse saves


def deep() -> Lab:
    return Lab(tiny("llama", num_hidden_layers=8), text(3, 9))


def brute_force(bench: Lab, rounds: int) -> tuple[list[str], int]:
    """The double loop: every candidate is a full forward. The picks and the block evaluations."""
    dense = [one(bench.model, r) for r in text(3, 9)]
    gone: list[str] = []
    runs = 1
    for _ in range(rounds):
        options = [s.id for s in bench.anatomy.sublayers if s.id not in gone]
        values = []
        for option in options:
            with bench.ablate([*gone, option]):
                each = [
                    v for r, d in zip(text(3, 9), dense, strict=True) for v in literal("js", d, one(bench.model, r), r)
                ]
            values.append(math.fsum(each) / len(each))
            runs += 1
        gone.append(options[values.index(min(values))])
    return gone, runs * 8 * 27


@pytest.mark.parametrize("hinted", [False, True])
def test_greedy_picks_are_brute_force_s_at_less_than_half_the_work(hinted: bool) -> None:
    bench = deep()
    want, work = brute_force(bench, 5)
    bench = deep()
    judge = Judge(bench, "js")
    gone: list[str] = []
    last: dict[str, float] = {}
    for _ in range(5):
        judge.rebase(gone)
        options = [s.id for s in bench.anatomy.sublayers if s.id not in gone]
        place, _ = judge.least(options, hint=[last.get(o, 0.0) for o in options] if hinted else None)
        last.update({o: v for o in options if (v := judge.known.get(judge.base | {o})) is not None})
        gone.append(options[place])
    assert gone == want
    assert bench.counts.blocks <= work * (0.5 if hinted else 0.52)


def test_counters_are_exact() -> None:
    bench, tokens = deep(), 27
    judge = Judge(bench, "kl")
    assert (bench.counts.blocks, bench.counts.heads) == (8 * tokens, tokens)
    judge.rebase([])
    spent = bench.counts.blocks
    assert spent == 2 * 8 * tokens
    for gone, evaluated in (
        (["block.7.mlp"], 0),  # from the recorded branches
        (["block.5.mlp"], 2),  # 6 and 7
        (["block.5.attention"], 3),  # the MLP reads the attention: 5, 6 and 7
        (["block.5"], 2),
        (["block.0.mlp"], 7),
        (["block.2.attention", "block.6"], 5),  # 2, 3, 4, 5 and 7
    ):
        before = bench.counts.blocks
        judge.value(gone)
        assert (bench.counts.blocks - before) / tokens == evaluated, gone
        judge.value(gone)
        assert (bench.counts.blocks - before) / tokens == evaluated, "what is known is not computed again"
    before = bench.counts.blocks
    judge.rebase(["block.4.mlp"])
    assert (bench.counts.blocks - before) / tokens == 4
    judge.rebase(["block.4.mlp"])
    assert (bench.counts.blocks - before) / tokens == 4
    judge.rebase(["block.4"])
    assert (bench.counts.blocks - before) / tokens == 7


def test_early_stopping_gives_up_only_losers() -> None:
    bench = deep()
    judge = Judge(bench, "js")
    judge.rebase([])
    options = [s.id for s in bench.anatomy.sublayers]
    place, value = judge.least(options)
    full = Judge(deep(), "js")
    values = [full.value([o]) for o in options]
    assert (place, value) == (values.index(min(values)), min(values))
    assert len(judge.known) < len(options)
    assert all(full.known[k] == v for k, v in judge.known.items())


@pytest.mark.parametrize("hint", [None, "best first", "worst first"])
def test_the_hint_orders_the_work_and_not_the_result(hint: str | None) -> None:
    options = [s.id for s in deep().anatomy.sublayers]
    full = Judge(deep(), "js")
    values = [full.value([o]) for o in options]
    weights = [1.0 + i % 3 for i in range(len(options))]
    prices = [v / w for v, w in zip(values, weights, strict=True)]
    given = None if hint is None else values if hint == "best first" else [-v for v in values]
    assert Judge(deep(), "js").least(options, hint=given)[0] == values.index(min(values))
    assert Judge(deep(), "js").least(options, weights=weights, hint=given)[0] == prices.index(min(prices))


def test_with_a_margin_what_is_clearly_dearer_is_heard_in_part() -> None:
    """The same winner, and each loser is given up after the first batch at which it is beyond the margin."""
    full = Judge(deep(), "js")
    options = [s.id for s in full.lab.anatomy.sublayers]
    values = [full.value([o]) for o in options]
    place = values.index(min(values))
    sums = [full.heard[frozenset({o})] for o in options]
    best = sums[place]
    judge = Judge(deep(), "js")
    assert judge.least(options, hint=values, margin=0.2) == (place, min(values))
    parts = set()
    for option, heard in zip(options, sums, strict=True):
        over = (n for n in (1, 2) if sum(heard[:n]) > 1.2 * sum(best[:n]) or sum(heard[:n]) > sum(best))
        part = next(over, len(best))
        assert judge.estimates[frozenset({option})] == pytest.approx(sum(heard[:part]) / (9 * part), rel=1e-9), option
        parts.add(part)
    assert parts >= {1, len(best)}


def test_ties_go_to_the_earlier_option() -> None:
    judge = Judge(deep(), "js")
    for hint in (None, [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]):
        assert judge.least(["block.3.mlp", "block.3.mlp", "block.3.mlp"], hint=hint)[0] == 0


def test_a_loss_is_never_given_up() -> None:
    bench = deep()
    judge = Judge(bench, "loss")
    options = [s.id for s in bench.anatomy.sublayers]
    judge.least(options)
    assert len(judge.known) == len(options)


def test_remembered_values_cost_nothing() -> None:
    first = Judge(deep(), "kl")
    value = first.value(["block.3"])
    bench = deep()
    again = Judge(bench, "kl")
    again.remember(first.heard)
    spent = bench.counts.blocks
    assert again.value(["block.3.attention", "block.3.mlp"]) == value
    assert bench.counts.blocks == spent
    assert again.value([]) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_judging_leaves_the_model_as_it_was(name: str) -> None:
    model, anatomy, _ = fresh(name)
    before = picture(model)
    judge = Judge(Lab(model, text(2, 6), anatomy=anatomy), "kl")
    judge.rebase(["block.1.attention"])
    judge.least(["block.2", "block.0.attention"])
    expect_same(before, picture(model), "the judge")


def test_a_wrong_metric_gets_a_hint() -> None:
    with pytest.raises(InputError, match=r"no metric named 'jss' \(did you mean js"):
        Judge(deep(), "jss")


@pytest.mark.parametrize("base", [(), ("block.1.mlp",)])
def test_blocks_that_norm_their_stream_are_judged_as_they_are(base: tuple[str, ...]) -> None:
    """Where a norm follows the addition, nothing is recombined from a branch's output."""
    bench = Lab(zoo.build("openai-gpt").model, text(3, 7))
    judge = Judge(bench, "kl")
    judge.rebase(base)
    for site in ("block.1.attention", "block.2", "block.3.mlp"):
        gone = [*base, site]
        dense = [one(bench.model, r) for r in text(3, 7)]
        with bench.ablate(gone):
            values = [
                v for r, d in zip(text(3, 7), dense, strict=True) for v in literal("kl", d, one(bench.model, r), r)
            ]
        assert judge.value(gone) == pytest.approx(math.fsum(values) / len(values), rel=1e-4)
