"""Checks for healers, evaluators and exporters, on a tiny llama that lost a block and an MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lamina.core.documents import Evidence, Receipt, Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.registry import REWRITES
from lamina.core.sites import Cost
from lamina.lab import Lab
from lamina.maths.divergence import kl
from lamina.testing.bench import expect_same, fresh, lab, picture
from lamina.testing.measures import refuses_unknown_option
from lamina.testing.models import text, tiny
from lamina.testing.rewrites import logits
from lamina.testing.suite import check, expect, made, run_checks

GONE = ("block.1.mlp", "block.2")


def thinned(name: str = "llama", **changes: Any) -> tuple[Lab, nn.Module, Receipt]:
    """A lab on a thinned tiny model, the dense one, and the receipt."""
    if changes:
        dense, bench = tiny(name, **changes), Lab(tiny(name, **changes), text(8, 16))
    else:
        dense, bench = fresh(name)[0], lab(name)
    receipt = REWRITES.make("drop").apply(Step(rewrite="drop", sites=GONE), bench)
    return bench, dense, receipt


def tokenizer() -> Any:
    """A byte-level BPE tokenizer of 260 tokens: `<bos>`, `<eos>`, the bytes and two merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", *alphabet, "th", "the"])}
    core = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def _heal(method: Any, bench: Lab, teacher: nn.Module, steps: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        return made(method).heal(bench, teacher=teacher, steps=steps, minutes=None)


@torch.no_grad()
def _distance(bench: Lab, teacher: nn.Module) -> float:
    """KL of the lab's model to the teacher, per token of the lab's text, in nats."""
    ids = torch.cat([b["input_ids"] for b in bench.batches])
    return float(kl(logits(teacher, ids), logits(bench.model, ids)).double().mean())


@check("healer")
def check_healing_helps(method: Any) -> None:
    """Some steps on the lab's own text bring the thinned model nearer to the dense one."""
    bench, dense, _ = thinned()
    before = _distance(bench, dense)
    _heal(method, bench, dense, 30)
    after = _distance(bench, dense)
    expect(
        math.isfinite(after) and after < before, f"the KL to the dense model goes from {before:.4f} to {after:.4f} nats"
    )


@check("healer")
def check_healing_keeps_the_structure(method: Any) -> None:
    """Keys, shapes, types, classes, hooks and modes stay; only numbers change; the teacher is untouched."""
    bench, dense, _ = thinned()
    before, teacher = picture(bench.model), picture(dense)
    _heal(method, bench, dense, 3)
    after = picture(bench.model)
    moved = [k for k in before if k.startswith("weights") and k in after and not torch.equal(before[k], after[k])]
    expect(bool(moved), "healing changed no weight")
    shapes = [{k: (v.shape, v.dtype) for k, v in p.items() if k.startswith("weights")} for p in (before, after)]
    expect(shapes[0] == shapes[1], "healing changed keys, shapes or types of the weights")
    same = {k: v for k, v in before.items() if not k.startswith("weights")}
    expect_same(same, {k: v for k, v in after.items() if not k.startswith("weights")}, "the healer")
    expect_same(teacher, picture(dense), "to the teacher, the healer")
    bench.anatomy.certify()


@check("healer")
def check_healing_is_deterministic(method: Any) -> None:
    """The same lab and seed give the same weights, bit for bit."""
    found: list[dict[str, Tensor]] = []
    for _ in range(2):
        bench, dense, _ = thinned()
        _heal(method, bench, dense, 3)
        found.append({k: v.clone() for k, v in bench.model.state_dict().items()})
    apart = [k for k, v in found[0].items() if not torch.equal(v, found[1][k])]
    expect(not apart, f"healing twice gives different weights: {apart[:3]}")


@check("healer")
def check_unknown_healer_option_is_refused(method: Any) -> None:
    """The registry refuses an option that the healer does not have, with a hint."""
    refuses_unknown_option(method)


def _evaluated(method: Any, *, same: bool = False) -> tuple[Evidence, ...]:
    bench, dense, _ = thinned()
    if same:
        bench = lab()
    mine, yours = picture(bench.model), picture(dense)
    found = tuple(made(method).evaluate(bench, reference=dense))
    expect_same(mine, picture(bench.model), "the evaluator")
    expect_same(yours, picture(dense), "to the reference, the evaluator")
    return found


@check("evaluator")
def check_evidence_is_sound(method: Any) -> None:
    """Named, finite numbers inside their intervals, which survive writing; both models are left as they were."""
    found = _evaluated(method)
    expect(bool(found), "gives no evidence")
    for one in found:
        expect(bool(one.name), f"evidence without a name: {one}")
        expect(math.isfinite(one.value), f"{one.name} ({one.of}) is {one.value}")
        low, high = (one.value if x is None else x for x in (one.low, one.high))
        expect(
            low <= one.value <= high or one.of == "contract",
            f"{one.name} ({one.of}): {one.value} is not in [{low}, {high}]",
        )
        expect(Evidence.from_data(one.to_data()) == one, f"{one} does not survive writing and reading")
    keys = [(e.name, e.of) for e in found]
    expect(len(keys) == len(set(keys)), f"the same number twice: {sorted(keys)}")


@check("evaluator")
def check_equal_models_compare_equal(method: Any) -> None:
    """Of a model against itself, differences of quality and costs are 0 and ratios 1 (times are left out)."""
    for one in _evaluated(method, same=True):
        timed = one.unit.endswith("/s") or one.name in ("prefill", "decode", "peak_memory")
        due = {"difference": 0.0, "ratio": 1.0}.get(one.of)
        if due is not None and not timed and not one.name.startswith("expected"):
            expect(
                abs(one.value - due) < 1e-6,
                f"{one.name} ({one.of}) of a model against itself is {one.value}, not {due}",
            )


@check("evaluator")
def check_unknown_evaluator_option_is_refused(method: Any) -> None:
    """The registry refuses an option that the evaluator does not have, with a hint."""
    refuses_unknown_option(method)


def _exported(method: Any, to: Path) -> tuple[list[Path], nn.Module]:
    bench, dense, receipt = thinned(vocab_size=300, intermediate_size=256)
    run = SimpleNamespace(
        receipts=(receipt,), tokenizer=tokenizer(), name="tiny", source="memory", path=None, budget=None, dense=dense
    )
    before = picture(bench.model)
    files = list(made(method).export(bench.model, run, to))
    expect_same(before, picture(bench.model), "the exporter")
    return files, bench.model


@check("exporter")
def check_export_writes_what_it_lists(method: Any) -> None:
    """The listed files are there and no others; the model is as before; a second time, the same names."""
    names: list[Sequence[str]] = []
    for _ in range(2):
        with TemporaryDirectory() as folder:
            to = Path(folder) / "out"
            files, _ = _exported(method, to)
            missing = [f.name for f in files if not f.is_file() or not f.stat().st_size]
            expect(bool(files) and not missing, f"listed but not written: {missing or 'nothing is listed'}")
            there = {p for p in Path(folder).rglob("*") if p.is_file()}
            expect(there == set(files), f"written but not listed: {sorted(p.name for p in there - set(files))}")
            names.append(sorted(f.relative_to(folder).as_posix() for f in files))
    expect(names[0] == names[1], f"the files are {names[0]} at first, then {names[1]}")


@check("exporter")
def check_export_says_what_it_can_not_do(method: Any) -> None:
    """No receipts are no problem; structure of an unknown kind is one, with a reason."""
    expect(list(made(method).check(())) == [], "a dense model is a problem")
    odd = Receipt(
        rewrite="no-such-rewrite",
        sites=("block.0",),
        before=Cost(2, 2, 2, 2),
        after=Cost(1, 1, 1, 1),
        structure={"steps": [{"format": 1, "kind": "no-such-kind", "blocks": [], "branches": []}]},
    )
    problems = list(made(method).check((odd,)))
    expect(bool(problems), "claims to take a rewrite that nobody knows")
    expect(all(p.what for p in problems), f"a problem without a reason: {problems}")


@check("exporter")
def check_failed_export_leaves_nothing(method: Any) -> None:
    """Where the target can't be made, one clear InputError, and no file."""
    with TemporaryDirectory() as folder:
        blocked = Path(folder) / "file"
        blocked.write_text("in the way", encoding="utf-8")
        try:
            _exported(method, blocked / "out")
        except LaminaError as error:
            expect(isinstance(error, InputError), f"{type(error).__name__} where an InputError is due: {error}")
            expect("\n" not in str(error), f"the error is not one line: {error}")
        except OSError as error:
            raise AssertionError(f"a bare {type(error).__name__} where one clear line is due: {error}") from error
        else:
            raise AssertionError("wrote into a folder that can't be made")
        left = [p.name for p in Path(folder).rglob("*") if p != blocked]
        expect(not left, f"left behind: {left}")


@check("exporter")
def check_unknown_exporter_option_is_refused(method: Any) -> None:
    """The registry refuses an option that the exporter does not have, with a hint."""
    refuses_unknown_option(method)


def check_healer(method: Any) -> None:
    """Run every check that applies to a healer (its class, or an instance)."""
    run_checks("healer", method)


def check_evaluator(method: Any) -> None:
    """Run every check that applies to an evaluator (its class, or an instance)."""
    run_checks("evaluator", method)


def check_exporter(method: Any) -> None:
    """Run every check that applies to an exporter (its class, or an instance)."""
    run_checks("exporter", method)
