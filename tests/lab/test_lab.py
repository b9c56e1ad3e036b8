"""The lab: losses by literal sums, counters to the token, and nothing left behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lamina.core.errors import InputError
from lamina.core.scores import Scores
from lamina.lab import Counts, Lab
from lamina.testing.bench import expect_same, fresh, lab, lab_on, picture, rows, text
from lamina.testing.models import NAMES, padded, tiny
from lamina.testing.rewrites import logits


def literal_loss(model: Any, row: torch.Tensor) -> tuple[float, int]:
    """Sum in nats and count of the next-token losses of one row alone."""
    p = logits(model, row.unsqueeze(0))[0].double().log_softmax(-1)
    return -math.fsum(float(p[t, row[t + 1]]) for t in range(len(row) - 1)), len(row) - 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_losses_are_literal(side: str, size: int) -> None:
    bench = lab_on(padded(rows(), size, side=side))
    sums, counts = bench.losses()
    for row, total, count in zip(rows(), sums.tolist(), counts.tolist(), strict=True):
        want, due = literal_loss(bench.model, row)
        assert total == pytest.approx(want, rel=1e-5)
        assert count == due
    every = [literal_loss(bench.model, r) for r in rows()]
    assert bench.loss() == pytest.approx(sum(s for s, _ in every) / sum(n for _, n in every), rel=1e-5)
    assert sums.dtype == counts.dtype == torch.float64


def test_a_gap_in_the_mask_predicts_nothing_across_it() -> None:
    ids = text(1, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    _, counts = lab_on([{"input_ids": ids, "attention_mask": mask}]).losses()
    assert counts.tolist() == [4.0]


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_a_lab(name: str) -> None:
    bench = Lab(tiny(name), text(3, 9), batch_size=2)
    assert (bench.depth, bench.tokens, bench.sequences) == (4, 27, 3)
    assert bench.loss() == pytest.approx(lab_loss(bench.model), rel=1e-5)
    assert bench.loss(["block.1"]) != bench.loss()


def lab_loss(model: Any) -> float:
    every = [literal_loss(model, r) for r in text(3, 9)]
    return sum(s for s, _ in every) / sum(n for _, n in every)


class Nothing:
    """A tally that takes in nothing."""

    def add(self, site: Any, taps: Any) -> None:
        """Not used."""

    def merge(self, other: Any) -> Any:
        return other

    def scores(self) -> Scores:
        return Scores(measure="nothing", values={})


def test_counters_count_tokens_and_not_padding() -> None:
    bench = lab_on(padded(rows(), 4))
    tokens = sum(len(r) for r in rows())
    assert (bench.tokens, bench.sequences) == (tokens, 6)
    bench.stream([Nothing(), Nothing()])
    assert bench.counts == Counts(blocks=4 * tokens, heads=0)
    bench.loss()
    assert bench.counts == Counts(blocks=8 * tokens, heads=tokens)
    assert bench.passes == 2.0
    bench.counts.backwards += 4 * tokens
    assert bench.passes == 3.0


def test_the_stream_computes_no_logits() -> None:
    bench = lab("llama")
    ran: list[int] = []
    handle = bench.model.get_output_embeddings().register_forward_hook(lambda *_: ran.append(1))  # type: ignore[operator]
    bench.stream([Nothing()])
    assert not ran
    bench.loss()
    handle.remove()
    assert ran


def test_blocks_run_once_per_batch() -> None:
    bench, ran = lab("llama", batch_size=4), []
    held = [
        bench.model.get_submodule(b.path).register_forward_hook(lambda *_: ran.append(1))
        for b in bench.anatomy.stacks[0].blocks
    ]
    bench.stream([Nothing(), Nothing(), Nothing()])
    for handle in held:
        handle.remove()
    assert len(ran) == 2 * 4


@pytest.mark.parametrize("name", NAMES)
def test_passes_leave_the_model_as_it_was(name: str) -> None:
    bench = lab(name)
    before = picture(bench.model)
    bench.stream([Nothing()])
    bench.losses(["block.1"])
    expect_same(before, picture(bench.model), "the lab")


def test_a_failing_tally_leaves_the_model_as_it_was() -> None:
    class Fails(Nothing):
        def add(self, site: Any, taps: Any) -> None:
            raise ValueError("stop")

    bench = lab("llama")
    before = picture(bench.model)
    with pytest.raises(ValueError, match="stop"):
        bench.stream([Fails()])
    expect_same(before, picture(bench.model), "the failed pass")


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    bench = lab_on(padded(rows(), 4), progress=lambda *x: told.append(x))
    bench.stream([Nothing()], "survey")
    assert told == [("survey", 4, 6), ("survey", 6, 6)]


@pytest.mark.parametrize(
    "bad", [torch.zeros(5, dtype=torch.long), torch.zeros(0, 5, dtype=torch.long), torch.zeros(3, 1), []]
)
def test_what_is_no_text_is_refused(bad: Any) -> None:
    model, anatomy, _ = fresh("llama")
    with pytest.raises(InputError, match="text"):
        Lab(model, bad, anatomy=anatomy)


def test_another_text_shares_the_model() -> None:
    bench = lab("llama")
    other = bench.on(text(2, 6))
    assert other.model is bench.model
    assert other.anatomy is bench.anatomy
    assert other.counts == Counts()
    assert (other.tokens, bench.tokens) == (12, 8 * 16)


def test_the_anatomy_is_found_anew() -> None:
    bench = lab("llama")
    first = bench.anatomy
    bench.renew()
    assert bench.anatomy is not first
    assert bench.anatomy.stacks == first.stacks
