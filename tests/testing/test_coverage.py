"""The coverage run: what is right is yes, what is wrong is no with its reason, and nothing ends the run."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from tiny_run import refused
from torch import Tensor, nn

from lamina.anatomy import Anatomy, Block, Stack
from lamina.core.documents import Evidence
from lamina.core.errors import CertificateError, InputError, ReloadError
from lamina.lab.load import load
from lamina.terminal import number
from lamina.testing import _coverage_process, coverage, zoo
from lamina.testing._coverage_checks import GENERATES, YES, Case, examine, judged, no, reload
from lamina.testing._coverage_page import FOLLOWS, GROUPS, share
from lamina.testing._coverage_reference import expect_equal, handed_on, masked, outputs, repeats
from lamina.testing.coverage import CELLS, Row

HELPERS = Path(__file__).parents[1] / "helpers"
SAMPLE = ("killer", "bert", "bit", "gpt2", "llama", "mamba", "mixtral", "vit")
SHARDS = ("causal", "others-1", "others-2", "others-3", "others-4", "others-5")
FLOORS: dict[str, dict[tuple[str, ...], float]] = {
    "transformers, causal language models": {
        ("found", "certified"): 0.97,
        ("block", "block_reloaded"): 0.95,
        ("sublayer", "sublayer_reloaded"): 0.90,
    },
    "transformers, all": {("found", "certified"): 0.88},
}
"""Group and checks → the share of types that they must hold for at least, a little below what was measured."""


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """The sample, through the worker and the contract's fresh process."""
    seen: list[tuple[str, int, int]] = []
    tell: Any = lambda *step: seen.append(step)  # noqa: E731
    found = coverage.run(SAMPLE, source="coverage_specimens:build", progress=tell, jobs=2)
    assert [row.name for row in found] == list(SAMPLE)
    assert seen[-1][1:] == (len(SAMPLE), len(SAMPLE))
    return {row.name: row for row in found}


# ---------------------------------------------------------------- the sample


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "anatomy"),
    [
        ("bert", "4 × attention, mlp"),
        ("gpt2", "4 × attention, mlp"),
        ("llama", "4 × attention, mlp"),
        ("mamba", "4 × mixer"),
        ("mixtral", "4 × attention, moe"),
    ],
)
def test_causal_types_are_covered(rows: dict[str, Row], name: str, anatomy: str) -> None:
    assert rows[name].causal
    assert rows[name].anatomy == anatomy
    assert dict(rows[name].cells) == dict.fromkeys(CELLS, YES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bit"])
def test_a_type_without_a_head(rows: dict[str, Row], name: str) -> None:
    """Also where a stage begins with a layer that is no block of it."""
    assert not rows[name].causal
    assert rows[name].ok("found", "certified", "block", "sublayer", "block_reloaded", "sublayer_reloaded")
    assert rows[name].cells["generates"] == "n/a"


@pytest.mark.slow
def test_a_specimen_that_ends_the_worker(rows: dict[str, Row]) -> None:
    cells = rows["killer"].cells
    assert cells["found"] == "no: the worker process was killed by signal 11"
    assert set(cells.values()) - {cells["found"]} == {"no: not reached"}


@pytest.mark.slow
def test_the_page_says_it_all(rows: dict[str, Row], tmp_path: Path) -> None:
    versions = coverage.versions(rows.values())
    coverage.write(list(rows.values()), tmp_path / "page.md", versions)
    coverage.write(list(reversed(rows.values())), tmp_path / "again.md", versions)
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert (tmp_path / "again.md").read_text(encoding="utf-8") == text
    assert f"Of transformers {versions['transformers']}:" in text
    assert "| gpt2 | GPT2LMHeadModel | 4 × attention, mlp | yes | yes | yes | yes | yes |  |" in text
    assert (
        "| killer | Killer | no | no | no | no | no | no | found: the worker process was killed by signal 11 |" in text
    )
    assert "| found | 5 of 5, 100.0 % | 7 of 8, 87.5 % |" in text


@pytest.mark.slow
def test_parts_put_together_are_the_whole(rows: dict[str, Row], tmp_path: Path) -> None:
    versions = coverage.versions(rows.values())
    halves = [tmp_path / "1.json", tmp_path / "2.json"]
    for start, path in enumerate(halves):
        coverage.write(list(rows.values())[start::2], path, versions)
    assert coverage.read(halves) == ([rows[n] for n in sorted(rows)], versions)
    coverage.write([replace(rows["gpt2"], note="anew")], tmp_path / "3.json", versions)
    assert [r.note for r in coverage.read([*halves, tmp_path / "3.json"])[0] if r.name == "gpt2"] == ["anew"]


# ---------------------------------------------------------------- wrong anatomies


def each_branch(change: Callable[[Block, int], dict[str, Any]]) -> Callable[[Stack], Stack]:
    """A stack whose branches are changed; `change` gives the fields of a block's branch of that number."""

    def mutate(stack: Stack) -> Stack:
        blocks = (
            replace(b, branches=tuple(replace(x, **change(b, n)) for n, x in enumerate(b.branches)))
            for b in stack.blocks
        )
        return replace(stack, blocks=tuple(blocks))

    return mutate


def outlets_swapped(block: Block, number: int) -> dict[str, Any]:
    return {"outlet": block.branches[1 - number].outlet, "outlet_index": block.branches[1 - number].outlet_index}


def norm_forgotten(block: Block, number: int) -> dict[str, Any]:
    return {"own": ()}


def core_in_place_of_norm(block: Block, number: int) -> dict[str, Any]:
    return {"core": block.branches[number].own[0], "own": ()}


def another_core(block: Block, number: int) -> dict[str, Any]:
    other = block.branches[1 - number]
    return {"core": other.core, "own": other.own, "stream": other.stream, "returns": other.returns}


def blocks_turned(stack: Stack) -> Stack:
    """Two blocks in each other's place: what the second is called is the third."""
    first, second, third, *rest = stack.blocks
    return replace(stack, blocks=(first, third, second, *rest))


MUTANTS: dict[str, tuple[str, Callable[[Stack], Stack], set[str]]] = {
    "the outlets of two branches swapped": ("llama", each_branch(outlets_swapped), {"sublayer"}),
    "the modules of two branches swapped": ("llama", each_branch(another_core), {"sublayer"}),
    "a norm after the branch forgotten": ("bert", each_branch(norm_forgotten), {"sublayer"}),
    "the norm for the core": ("llama", each_branch(core_in_place_of_norm), {"block", "sublayer"}),
    "two blocks in each other's place": ("llama", blocks_turned, {"block", "sublayer"}),
}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_right_anatomy_is_yes(name: str) -> None:
    assert told_of(name) == dict.fromkeys(("found", "certified", "block", "sublayer"), YES)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_anatomy_is_no(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    name, mutate, wrong = MUTANTS[mutant]
    find = Anatomy.of

    def of(model: nn.Module, sample: Any = None) -> Anatomy:
        anatomy = find(model, sample)
        anatomy.stacks = tuple(map(mutate, anatomy.stacks))
        return anatomy

    monkeypatch.setattr(Anatomy, "of", of)
    cells = told_of(name)
    assert {cell for cell, value in cells.items() if value != YES} == wrong, cells


def told_of(name: str) -> dict[str, str]:
    """The cells of one specimen in this process, without checkpoints."""
    told: dict[str, str] = {}
    examine(zoo.build(name), told.__setitem__)
    return {k: v for k, v in told.items() if k in CELLS and v != "n/a"}


# ---------------------------------------------------------------- the reference


def test_a_block_that_hands_its_input_on() -> None:
    specimen = zoo.build("llama")
    model: Any = specimen.model
    paths = [f"model.layers.{n}" for n in range(4)]
    for gone in range(4):
        with handed_on(model, specimen.sample, paths, gone):
            got = outputs(model, specimen.sample)
        short = copy.deepcopy(model)
        del short.model.layers[gone]
        short.config.num_hidden_layers = 3
        torch.testing.assert_close(got[".logits"], outputs(short, specimen.sample)[".logits"], rtol=0, atol=0)
    assert "forward" not in model.model.layers[0].__dict__


def test_a_branch_masked_to_zero() -> None:
    specimen = zoo.build("llama")
    model: Any = specimen.model
    with masked(model, "model.layers.2.self_attn", 0):
        got = outputs(model, specimen.sample)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
    torch.testing.assert_close(got[".logits"], outputs(model, specimen.sample)[".logits"], rtol=0, atol=0)


def floats(*values: float) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("got", "want", "why"),
    [
        ({"a": floats(1, 2)}, {"a": floats(1, 2)}, None),
        ({"a": floats(1, 2.00001)}, {"a": floats(1, 2)}, None),
        ({"a": floats(1, float("-inf"))}, {"a": floats(1, float("-inf"))}, None),
        ({"a": floats(1), "h.0": floats(1)}, {"a": floats(1), "h.0": floats(7), "h.1": floats(1)}, None),
        ({"a": floats(1, 2.0001)}, {"a": floats(1, 2)}, "off the reference by 5.0e-05"),
        ({"a": floats(1, 2), "b": floats(1)}, {"a": floats(1, 2), "b": floats(2)}, "outputb is off"),
        ({"a": floats(1, float("nan"))}, {"a": floats(1, 2)}, "off the reference by inf"),
        ({"a": floats(1, 2)}, {"a": floats(1, float("inf"))}, "off the reference by inf"),
        ({"a": floats(1)}, {"a": floats(1, 2)}, r"is \[1\], the reference \[2\]"),
        ({"a": floats(1)}, {"b": floats(1)}, "returns a for b"),
        ({}, {"b": floats(1)}, "returns nothing for b"),
        ({"a": floats(0, 9)}, {"a": floats(0, 9)}, "no output depends on it"),
    ],
)
def test_outputs_are_equal_or_not(got: dict[str, Tensor], want: dict[str, Tensor], why: str | None) -> None:
    dense = {"a": floats(0, 9)}
    if why is None:
        expect_equal(got, want, dense)
    else:
        with pytest.raises(CertificateError, match=why):
            expect_equal(got, want, dense)


def test_what_repeats() -> None:
    specimen = zoo.build("llama")
    assert repeats(specimen.model, specimen.sample)
    single = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert not repeats(single, {"input": torch.ones(1, 2, 4)})
    twice = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    assert repeats(twice, {"input": torch.ones(1, 2, 4)})


def test_reasons_are_short_and_name_no_places() -> None:
    error = ValueError("can't read /home/someone/.cache/lamina-x1/llama/config.json at <X object at 0x7f12ab34>\nmore")
    assert no(error) == "no: ValueError: can't read config.json at <X object at 0x…>"
    assert no(CertificateError("see https://host/a/b", where="block.0")) == "no: block.0: see https://host/a/b"
    assert len(no("x" * 500)) == len("no: ") + 160


# ---------------------------------------------------------------- the contract's answers


def case(name: str, part: str = "block") -> Case:
    model = nn.Identity()
    return Case(part, name, Path(name), model, {}, model)


def kept(*names: str, high: float | None = 1.0) -> tuple[Evidence, ...]:
    return tuple(Evidence(name=n, value=0.0, of="contract", high=high, n=1, how="as told") for n in names)


@pytest.mark.parametrize("error", [RuntimeError("no"), ReloadError("the fresh process was killed by signal 9")])
def test_one_that_ends_all_is_told_alone(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def contracts(cases: Sequence[Any], **_: Any) -> list[Any]:
        if any(folder.name == "bad" for folder, *_ in cases):
            if isinstance(error, ReloadError):
                return [error] * len(cases)
            raise error
        return ["kept"] * len(cases)

    monkeypatch.setattr("lamina.testing._coverage_checks.contracts", contracts)
    assert reload([case("a"), case("bad"), case("b")]) == ["kept", error, "kept"]


@pytest.mark.parametrize(
    ("outcomes", "cells"),
    [
        ([kept(*GENERATES), kept(*GENERATES)], (YES, YES, YES, "")),
        ([kept("reload_logits"), kept("reload_logits")], (YES, YES, "n/a", "")),
        ([kept(*GENERATES), ReloadError("x differs")], (YES, "no: b: x differs", "no: b: x differs", "")),
        ([kept("reload_cache", high=None)] * 2, (YES, YES, "n/a", "not asked, since the dense model fails: cached")),
        (
            [kept("reload_cache") + kept("reload_padding", high=None)] * 2,
            (YES, YES, YES, "not asked, since the dense model fails: a left-padded batch against its rows"),
        ),
    ],
)
def test_cells_from_the_contract(outcomes: list[Any], cells: tuple[str, str, str, str]) -> None:
    found = dict(judged([case("a"), case("b", "sublayer")], outcomes))
    assert (found["block_reloaded"], found["sublayer_reloaded"], found["generates"]) == cells[:3]
    assert found["aside"].startswith(cells[3])
    assert bool(found["aside"]) == bool(cells[3])


# ---------------------------------------------------------------- the worker's end


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the worker, a script that dies, exits and hangs as the names say."""
    monkeypatch.setattr(_coverage_process, "COMMAND", (sys.executable, str(HELPERS / "coverage_script.py")))


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize(
    ("name", "why", "cell"),
    [
        ("dies", "the worker process was killed by signal 9", "block"),
        ("exits", "the worker process ended with exit code 3", "block"),
        ("hangs", "no answer after 2 s", "block"),
        ("loses", "the worker process was killed by signal 9", "block_reloaded"),
    ],
)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_the_others_are_examined_all_the_same(name: str, why: str, cell: str, place: int) -> None:
    others = ["good1", "good2", "bad", "unbuilt"]
    asked = [*others[:place], name, *others[place:]]
    rows = {r.name: r for r in coverage.run(asked, limit=2)}
    assert list(rows) == asked
    for good in ("good1", "good2"):
        assert rows[good].ok(*CELLS)
    assert rows["bad"].cells["generates"] == "no: bad"
    assert rows["unbuilt"] == Row("unbuilt", unbuilt="no such thing")
    cells = rows[name].cells
    assert [c for c in CELLS if cells[c] == YES] == list(CELLS[: CELLS.index(cell)])
    assert cells[cell] == f"no: {why}"
    assert {cells[c] for c in CELLS[CELLS.index(cell) + 1 :]} == {"no: not reached"}
    assert "no: not reached" in FOLLOWS


@pytest.mark.usefixtures("script")
def test_many_batches_keep_the_order() -> None:
    asked = [f"good{n}" for n in range(coverage.BATCH)] + ["dies"] + [f"good-{n}" for n in range(coverage.BATCH + 3)]
    rows = coverage.run(asked, limit=20)
    assert [r.name for r in rows] == asked
    assert [r.name for r in rows if not r.ok(*CELLS)] == ["dies"]


# ---------------------------------------------------------------- names, shares, the command line


def test_shards_are_all_and_each_once() -> None:
    every = coverage.names(["transformers"])
    parts = [coverage.names(["transformers"], (), f"{i}/3") for i in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == every
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert coverage.names(["transformers"], ["llama", "bert"]) == ["bert", "llama"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"libraries": ["torchvision"]}, "no library named 'torchvision'"),
        ({"only": ["lama"]}, "no specimen named 'lama' .*llama"),
        *(({"shard": s}, "a shard is I/N") for s in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2")),
    ],
)
def test_what_is_not_there_is_refused(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        coverage.names(**asked)


def test_shares_leave_out_what_does_not_apply() -> None:
    rows = [
        Row("a", cells={"found": "yes", "block": "yes"}),
        Row("b", cells={"found": "yes", "block": "no: x"}),
        Row("c", cells={"found": "n/a", "block": "n/a"}),
        Row("d", unbuilt="y"),
    ]
    assert share(rows, "found") == (2, 2)
    assert share(rows, "found", "block") == (1, 2)


@pytest.mark.usefixtures("script")
def test_the_command_examines_and_puts_together(lamina: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    types = ("--coverage", "--only", "llama", "--only", "gpt2", "--only", "bert")
    for part in ("1/2", "2/2"):
        code, out, err = lamina("anatomy", *types, "--shard", part)
        assert (code, err) == (0, "")
        assert out.splitlines()[-1] == f"coverage-{part[0]}-of-2.json"
    code, out, err = lamina("anatomy", "--coverage", "coverage-1-of-2.json", "coverage-2-of-2.json")
    assert (code, err) == (0, "")
    assert "3 of 3, 100.0 %" in out
    whole = (tmp_path / "coverage.md").read_text(encoding="utf-8")
    assert lamina("anatomy", *types, "--out", "at-once.md")[0] == 0
    assert (tmp_path / "at-once.md").read_text(encoding="utf-8") == whole


def test_the_tree_of_a_model(lamina: Any, bench: Path) -> None:
    """A line for each block and below it one for each sublayer, with what they cost."""
    code, out, err = lamina("anatomy", bench / "model", "--certify")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert "stack model.layers: 4 blocks of width 32" in [" ".join(line) for line in lines]
    anatomy = Anatomy.of(load(bench / "model").model)
    for site in anatomy.sites:
        (line,) = [line for line in lines if site.id in line]
        cost, whole = anatomy.cost(site), anatomy.total().parameters
        costs = [number(cost.parameters), f"{cost.parameters / whole:.1%}", number(cost.macs)]
        start = line.index(site.id)
        assert line[start + 2 : start + 5] == costs
        assert line[start + 5 : start + 6] == ([str(cost.kv_bytes)] if cost.kv_bytes else [])
        if site.block is not None and site.id == f"block.{site.block}":
            assert line[1] == site.path
            assert float(line[-1]) <= 1e-2
        else:
            assert line[0] in "├└"
            assert site.path.endswith(f".{line[2]}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("anatomy",), "which model?"),
        (("anatomy", "a", "b"), "which model?"),
        (("anatomy", "a", "--only", "llama"), "belong to --coverage"),
        (("anatomy", "--coverage", "none.json"), "none.json"),
        (("anatomy", "--coverage", "odd.json"), "is not a part"),
        (("anatomy", "--coverage", "old.json", "new.json"), "is of transformers 9, others are of 8"),
        (("anatomy", "--coverage", "old.json", "--only", "llama"), "put together as they are"),
    ],
)
def test_what_the_command_refuses(
    lamina: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: Sequence[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.json").write_text("{}", encoding="utf-8")
    for name, version in (("old", "8"), ("new", "9")):
        coverage.write([], tmp_path / f"{name}.json", {"transformers": version})
    refused(lamina(*words), told)


# ---------------------------------------------------------------- all of it


@pytest.fixture(scope="module")
def examined() -> dict[str, list[Row]]:
    """The rows of the shards that have run."""
    return {}


def asked_of(shard: str) -> list[str]:
    causal = set(zoo.names(causal=True))
    if shard == "causal":
        return sorted(causal)
    others = [name for name in coverage.names() if name not in causal]
    return others[int(shard.partition("-")[2]) - 1 :: len(SHARDS) - 1]


@pytest.fixture(scope="module")
def until() -> float:
    """When no other shard is begun: LAMINA_COVERAGE_MINUTES after the first."""
    return monotonic() + 60 * float(os.environ.get("LAMINA_COVERAGE_MINUTES", "inf"))


@pytest.mark.coverage
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shard", SHARDS)
def test_every_type_has_an_answer(examined: dict[str, list[Row]], until: float, shard: str) -> None:
    if monotonic() > until:
        pytest.skip("LAMINA_COVERAGE_MINUTES are over")
    asked = asked_of(shard)
    rows = coverage.run(asked, jobs=2)
    assert [r.name for r in rows] == asked
    assert [r.name for r in rows if not r.whole] == []
    examined[shard] = rows


@pytest.mark.coverage
@pytest.mark.parametrize("group", FLOORS)
def test_no_less_is_covered_than_before(examined: dict[str, list[Row]], group: str) -> None:
    needed = [s for s in SHARDS if s == "causal" or "causal" not in group]
    if not examined.keys() >= set(needed):
        pytest.skip("not all its shards have run")
    rows = [r for shard in needed for r in examined[shard] if GROUPS[group](r)]
    for cells, floor in FLOORS[group].items():
        yes, asked = share(rows, *cells)
        assert yes >= floor * asked, (group, cells, yes, asked)
