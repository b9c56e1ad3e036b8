"""Checks for measures: planted truth, one sign and one unit, nothing left behind, no trace of batching or padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.core.errors import InputError
from lamina.core.papers import Need
from lamina.core.registry import ROLES
from lamina.core.scores import Scores
from lamina.core.sites import SUBLAYERS, Kind
from lamina.lab import Lab
from lamina.lab.feed import feeding
from lamina.lab.passes import finished, tallied
from lamina.testing.bench import expect_close, expect_same, lab, lab_on, mixed, picture, rows
from lamina.testing.models import padded
from lamina.testing.suite import card_of, check, expect, made, run_checks

PLANTED = ("llama", "gemma2", "gpt_neox", "mixtral")
"""Pre-norm, sandwich norm, parallel branches, experts."""
LAYOUT = 1e-4
"""What float32 attention may differ by, relative to the largest score, when rows are batched in another way."""


def _on_blocks(cls: type) -> bool:
    return mixed(card_of(cls).on, Kind.BLOCK)


def _on_sublayers(cls: type) -> bool:
    return mixed(card_of(cls).on, *SUBLAYERS)


def _streams(cls: type) -> bool:
    return hasattr(cls, "tally")


def _reads_text(cls: type) -> bool:
    return card_of(cls).needs > Need.NOTHING


def _measured(method: Any, bench: Lab) -> Scores:
    return made(method).measure(bench)


@check("measure", _on_blocks)
def check_identity_block_is_lowest(method: Any) -> None:
    """A block that passes its input on scores below all others."""
    for name in PLANTED:
        scores = _measured(method, lab(name, "block.2"))
        others = {
            s: scores[s] for s in scores.values if s.startswith("block.") and s.count(".") == 1 and s != "block.2"
        }
        expect("block.2" in scores and len(others) == 3, f"on {name}, blocks are not scored: {sorted(scores.values)}")
        expect(
            all(scores["block.2"] < v for v in others.values()),
            f"on {name}, the identity block.2 scores {scores['block.2']:.3g}, not below the others: {others}",
        )


@check("measure", _on_sublayers)
def check_silent_sublayer_is_lowest(method: Any) -> None:
    """A sublayer that adds nothing scores below all other sublayers, whatever their kind."""
    card = card_of(method)
    for name in PLANTED:
        kinds = {s.id: s.kind for s in lab(name).anatomy.sublayers}
        for silent in [s for s in kinds if s.startswith("block.1.") and mixed(card.on, kinds[s])]:
            scores = _measured(method, lab(name, silent))
            others = {s: scores[s] for s in scores.values if s in kinds and s != silent}
            expect(silent in scores, f"on {name}, {silent} is not scored")
            expect(
                all(scores[silent] < v for v in others.values()),
                f"on {name}, {silent} adds nothing and scores {scores[silent]:.3g}, not below the others: {others}",
            )


@check("measure")
def check_scores_are_finite_float64_of_width(method: Any) -> None:
    """Values and errors are float64 arrays [width], finite, under the measure's own name; bfloat16 models too."""
    for dtype in (torch.float32, torch.bfloat16):
        bench = lab("llama", dtype=dtype)
        scores = _measured(method, bench)
        expect(scores.measure == card_of(method).name, f"the table is named {scores.measure!r}")
        for site, value in scores.values.items():
            width = bench.anatomy.site(site).width
            good = isinstance(value, np.ndarray) and value.dtype == np.float64 and value.shape == (width,)
            expect(good, f"{site}: a score is a float64 array [{width}], not {value!r}")
            expect(bool(np.isfinite(value).all()), f"{site}: scores {value} on a {dtype} model")
        for site, error in scores.stderr.items():
            expect(site in scores.values, f"{site} has an error but no score")
            good = (
                isinstance(error, np.ndarray) and error.dtype == np.float64 and error.shape == scores.values[site].shape
            )
            expect(good, f"{site}: an error has the score's shape and type, not {error!r}")
            expect(not bool((error < 0).any()), f"{site}: an error is not negative: {error}")


@check("measure")
def check_scores_what_its_card_declares(method: Any) -> None:
    """All sites of the declared kinds are scored, and no others."""
    card = card_of(method)
    for name in ("llama", "mixtral"):
        bench = lab(name)
        wanted = {s.id for s in bench.anatomy.of_kind(*(card.on or tuple(Kind)))}
        scores = _measured(method, bench)
        scored = set(scores.values)
        wanted -= {s for s in wanted if s in scores.missing or bench.anatomy.site(s).kind in scores.missing}
        expect(scored <= wanted, f"on {name}, scores what its card does not declare: {sorted(scored - wanted)}")
        expect(wanted <= scored, f"on {name}, leaves out {sorted(wanted - scored)}")


@check("measure")
def check_measure_is_deterministic(method: Any) -> None:
    """The same lab seed gives the same bits, whatever the process drew before."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        first = _measured(method, lab())
        torch.manual_seed(2)
        again = _measured(method, lab())
    finally:
        torch.set_rng_state(state)
    for site, value in first.values.items():
        expect(np.array_equal(value, again.values[site]), f"{site}: {value} at first, then {again.values[site]}")


@check("measure")
def check_measure_leaves_the_model_untouched(method: Any) -> None:
    """Weights, gradients, hooks, modes, attributes and random state are as before, also after an error."""
    for name in ("llama", "nanogpt"):
        bench = lab(name)
        before = picture(bench.model)
        _measured(method, bench)
        expect_same(before, picture(bench.model), f"on {name}, the measure")


@check("measure", _reads_text)
def check_right_padding_does_not_count(method: Any) -> None:
    """Rows padded on the right score as the same rows alone."""
    _check_layout(method, "right")


@check("measure", _reads_text)
def check_left_padding_does_not_count(method: Any) -> None:
    """Rows padded on the left score as the same rows alone."""
    _check_layout(method, "left")


def _check_layout(method: Any, side: str) -> None:
    alone = _measured(method, lab_on([{"input_ids": r.unsqueeze(0)} for r in rows()]))
    together = _measured(method, lab_on(padded(rows(), 6, side=side)))
    expect_close(together, alone, LAYOUT, f"rows padded on the {side} against the same rows alone")


@check("measure", _reads_text)
def check_batching_does_not_count(method: Any) -> None:
    """Every token counts the same, in whatever batch it came: no mean of batch means."""
    alone = _measured(method, lab_on(padded(rows(), 1)))
    for size in (4, 5):
        batched = _measured(method, lab_on(padded(rows(), size)))
        expect_close(batched, alone, LAYOUT, f"batches of {size} rows of unequal length against single rows")


def _parts(count: int) -> tuple[Lab, list[Tensor]]:
    bench = lab()
    return bench, list(torch.cat([b["input_ids"] for b in bench.batches]).chunk(count))


def _tallied(method: Any, bench: Lab, text: Tensor) -> Any:
    measure = made(method)
    return tallied(bench.on(text, batch_size=2), {"": measure})[""]


def _whole(method: Any, bench: Lab, tally: Any) -> Scores:
    return finished(bench, made(method), tally)


@check("measure", _streams)
def check_tally_merges(method: Any) -> None:
    """Tallies of parts add up to the tally of the whole, in any order; merging changes neither part."""
    bench, parts = _parts(4)
    a, b, c, d = (_tallied(method, bench, p) for p in parts)
    everything = bench.on(torch.cat(parts), batch_size=2)
    whole = _whole(method, everything, _tallied(method, bench, torch.cat(parts)))
    first = bench.on(parts[0], batch_size=2)
    alone = _whole(method, first, a)
    ways = {
        "((a b) c) d": a.merge(b).merge(c).merge(d),
        "a (b (c d))": a.merge(b.merge(c.merge(d))),
        "(d c) (b a)": d.merge(c).merge(b.merge(a)),
    }
    for way, tally in ways.items():
        found = _whole(method, everything, tally)
        expect_close(found, whole, 1e-10, f"the tally {way} against the tally of the whole")
        for site, error in whole.stderr.items():
            same = np.allclose(found.stderr[site], error, rtol=1e-6, atol=1e-12, equal_nan=True)
            expect(same, f"the error of {way} at {site} is {found.stderr[site]}, not {error}")
    expect_close(_whole(method, first, a), alone, 0.0, "a tally after it was merged against itself before")
    empty = _whole(method, first, made(method).tally(bench.anatomy).merge(a))
    expect_close(empty, alone, 1e-12, "an empty tally merged with a part against the part")


@check("measure", _streams)
def check_streaming_measure_agrees_with_measure(method: Any) -> None:
    """Sharing a pass with others gives the same table as measuring alone."""
    bench = lab()
    alone = _measured(method, bench)
    other = lab()
    shared = tallied(other, {"one": made(method), "other": made(method)})
    if card_of(method).needs is Need.FORWARD:
        expect(other.counts.blocks == other.tokens * other.depth, "a pass that tallies share is one pass")
    for tally in shared.values():
        expect_close(_whole(method, other, tally), alone, 1e-12, "the shared pass against the measure's own")


@check("measure", _streams)
def check_order_of_batches_and_blocks_does_not_count(method: Any) -> None:
    """All blocks of a batch and then the next, or all batches at a block and then the next: the same scores."""
    if card_of(method).needs is not Need.FORWARD:
        return
    bench = lab(batch_size=2)
    across = made(method).tally(bench.anatomy)
    for block in (b for k in bench.anatomy.stacks for b in k.blocks):
        for batch_rows in bench.rows():
            with torch.no_grad(), feeding(bench.anatomy, batch_rows, [across], only=block):
                bench.forward(batch_rows.batch, head=False)
    expect_close(
        _whole(method, bench, across), _measured(method, bench), 1e-12, "block by block against batch by batch"
    )


@check("measure")
def check_needs_are_honest(method: Any) -> None:
    """The card's need is what the lab is made to run: nothing, one forward, gradients, or trial ablations."""
    needs, bench = card_of(method).needs, lab()
    _measured(method, bench)
    one = bench.tokens * bench.depth
    if needs is Need.NOTHING:
        expect(bench.counts.blocks == 0, f"declares no need and evaluates {bench.counts.blocks / one:.2f} passes")
    if needs is Need.FORWARD:
        expect(bench.counts.blocks <= one, f"declares one forward and takes {bench.counts.blocks / one:.2f}")
    if needs < Need.GRADIENT:
        expect(bench.counts.backwards == 0, "declares no gradients and takes them")


@check("measure", _reads_text)
def check_errors_are_over_sequences(method: Any) -> None:
    """Standard errors agree with the jackknife over sequences, fall with √n, and are undefined for one sequence."""
    bench = lab()
    ids = torch.cat([b["input_ids"] for b in bench.batches])
    whole = _measured(method, bench.on(ids))
    if not whole.stderr:
        return
    single = _measured(method, bench.on(ids[:1]))
    expect(all(np.isnan(e).all() for e in single.stderr.values()), "one sequence has no standard error; NaN is due")
    fourfold = _measured(method, bench.on(ids.repeat(4, 1)))
    left_out = [_measured(method, bench.on(torch.cat([ids[:i], ids[i + 1 :]]))) for i in range(len(ids))]
    for site, error in whole.stderr.items():
        one_out = np.stack([s.values[site] for s in left_out])
        jackknife = np.sqrt((len(ids) - 1) * one_out.var(0))
        expect(
            bool(((error > 0.4 * jackknife - 1e-12) & (error < 2.5 * jackknife + 1e-12)).all()),
            f"{site}: the error is {error}, the jackknife over sequences gives {jackknife}",
        )
        ratio = fourfold.stderr[site] / np.where(error > 0, error, np.nan)
        expect(
            bool((np.isnan(ratio) | ((ratio > 0.3) & (ratio < 0.7))).all()),
            f"{site}: with four times the sequences the error is {ratio} of what it was, not about half",
        )


@check("measure")
def check_unknown_option_is_refused(method: Any) -> None:
    """The registry refuses an option that the measure does not have, with a hint."""
    refuses_unknown_option(method)


def refuses_unknown_option(method: Any) -> None:
    """Raise AssertionError unless the registry refuses a misspelt and a foreign option."""
    card = card_of(method)
    for wrong in ("no_such_option", *(f"{name}x" for name, _, _ in card.options)):
        try:
            ROLES[card.role].make(card.name, {wrong: 1})
        except InputError as error:
            expect(wrong in str(error) and bool(error.hint), f"the refusal of {wrong!r} does not help: {error}")
        else:
            raise AssertionError(f"takes the option {wrong!r}, which it does not have")


def check_measure(method: Any) -> None:
    """Run every check that applies to a measure (its class, or an instance)."""
    run_checks("measure", method)
