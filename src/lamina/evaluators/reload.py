"""The reload contract: a checkpoint on disk behaves, in a fresh process without lamina, as the model in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Evidence
from lamina.core.errors import InputError, ReloadError
from lamina.core.files import to_json

if TYPE_CHECKING:
    from torch import Tensor, nn

TIMEOUT = 900.0
ROUNDING = {"float64": 1e-9, "float32": 1e-4}
"""Largest difference over the largest logit that rounding explains, where the order of summation differs."""
TURNS = 4
"""Orders of the tokens in which the dense model must keep a check, before it is said that a rewrite broke it."""
SAME = 8
"""Rounding steps of the largest logit that the same computation may differ by between two processes."""
CHECKS = {
    "reload_logits": "the outputs",
    "reload_cache": "cached decoding against the full forward",
    "reload_padding": "a left-padded batch against its rows",
    "reload_generate": "the greedy tokens of generate()",
}
FAILURES = (
    RuntimeError,
    IndexError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    AssertionError,
)
Sample = Mapping[str, "Tensor"]
Case = tuple[Path, "nn.Module", "Tensor | Sample"] | tuple[Path, "nn.Module", "Tensor | Sample", "nn.Module | None"]
"""A checkpoint's folder, the model it was written from, its inputs, and the dense model where there is one."""


def contract(
    folder: Path,
    model: nn.Module,
    sample: Tensor | Sample,
    *,
    dense: nn.Module | None = None,
    timeout: float = TIMEOUT,
) -> tuple[Evidence, ...]:
    """Load `folder` in a fresh process and compare it with `model` on `sample`, the inputs of one forward by name.

    Every tensor and config field equal, all outputs equal; and where the model generates from token ids, cached
    decoding equal to the full forward, a left-padded batch equal to its rows, and the same greedy tokens. Token ids
    [batch, tokens] alone, at least 2 tokens, are `input_ids`. Gives one Evidence per check that was made
    (`of="contract"`, `high` the tolerance); where the `dense` model fails one as well, its evidence says so and has no
    `high`. Raises ReloadError, one line, naming the first thing that differs and by how much; also for a crash or a
    timeout.
    """
    (found,) = contracts([(folder, model, sample, dense)], timeout=timeout)
    if isinstance(found, ReloadError):
        raise found
    return found


def contracts(cases: Sequence[Case], *, timeout: float = TIMEOUT) -> list[tuple[Evidence, ...] | ReloadError]:
    """The contract of many checkpoints in one fresh process; what fails comes back as its error."""
    found: list[tuple[Evidence, ...] | ReloadError | None] = []
    with tempfile.TemporaryDirectory(prefix="lamina-reload-") as name:
        work = Path(name)
        asked: list[tuple[int, dict[str, Any]]] = []
        for number, case in enumerate(cases):
            try:
                dense = case[3] if len(case) == 4 else None
                asked.append((number, _reference(*case[:3], dense, work / str(len(asked)))))
                found.append(None)
            except ReloadError as error:
                found.append(error)
        report = _run(work, [job for _, job in asked], timeout) if asked else []
        for place, ((number, job), row) in enumerate(zip(asked, report, strict=True)):
            folder, model = cases[number][:2]
            try:
                found[number] = _judge(folder, model, job, row, work / str(place))
            except ReloadError as error:
                found[number] = error
    return [f for f in found if f is not None]


def _inputs(sample: Any, device: Any) -> dict[str, Tensor]:
    """The inputs by name, on the model's device."""
    import torch

    if isinstance(sample, torch.Tensor):
        if sample.ndim != 2 or sample.shape[1] < 2:
            raise InputError(f"the contract takes token ids [batch, tokens], not {list(sample.shape)}")
        sample = {"input_ids": sample}
    wrong = [k for k, v in sample.items() if not isinstance(v, torch.Tensor)]
    if wrong or not sample:
        raise InputError("the contract takes tensors by name", where=", ".join(wrong) or None)
    return {k: v.to(device).contiguous() for k, v in sample.items()}


def _reference(folder: Path, model: Any, sample: Any, dense: Any, work: Path) -> dict[str, Any]:
    """Write the reference tensors; first of all the model in memory must keep the contract itself."""
    import torch
    from safetensors.torch import save_file

    from lamina.evaluators import _reload_child as child

    device = next(model.parameters()).device
    inputs = _inputs(sample, device)
    asked = child.checks(model, inputs)
    with _evaluating(model), torch.no_grad():
        try:
            out = child.tensors(child.whole(model, inputs))
        except FAILURES as error:
            raise ReloadError(f"the model in memory fails: {child.short(error)}", where=folder) from error
        kept = {k: _Kept.of(k, model, inputs, dense, folder) for k in asked}
    if not out:
        raise ReloadError("the model in memory returns no tensor", where=folder)
    work.mkdir()
    stored = {f"in.{k}": v for k, v in inputs.items()} | {k: v.contiguous().clone() for k, v in out.items()}
    save_file(stored, work / "reference.safetensors")
    first = next((v for v in out.values() if v.is_floating_point()), next(iter(out.values())))
    ids = child.text(model, inputs)
    return {
        "folder": str(Path(folder).resolve()),
        "module": type(model).__module__,
        "device": str(device),
        "attention": _attention(model),
        "digests": child.digests(model),
        "checks": [k for k, v in kept.items() if v.note == ""],
        "notes": {k: v.note for k, v in kept.items() if v.note},
        "found": {k: v.value for k, v in kept.items()},
        "tolerance": {k: v.tolerance for k, v in kept.items()},
        "tokens": kept["reload_generate"].tokens if "reload_generate" in kept else [],
        "lead": kept["reload_generate"].lead if "reload_generate" in kept else [],
        "same": {k: _bound(v) for k, v in out.items()},
        "exact": "float64" if first.dtype == torch.float64 else "float32",
        "dtype": str(first.dtype).removeprefix("torch."),
        "count": first.numel() // max(first.shape[-1], 1) if ids is None else ids.numel(),
    }


def _attention(model: Any) -> Any:
    """How the configs of the model have attention computed: one word, or one for each of the configs inside."""
    config = model.config
    inner = {k: getattr(config, k, None) for k in getattr(config, "sub_configs", None) or ()}
    words = {k: getattr(c, "_attn_implementation", None) for k, c in inner.items() if c is not None}
    own = getattr(config, "_attn_implementation", None)
    return own if set(words.values()) <= {own} else {"": own, **words}


def _bound(out: Tensor) -> float:
    """By how much an output may differ where the same is computed: rounding steps of its largest number."""
    import torch

    if not out.is_floating_point() or not out.numel():
        return 0.0
    largest = out.abs().masked_fill(out.isinf(), 0.0).max()
    return SAME * torch.finfo(out.dtype).eps * float(largest)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    from lamina.lab.load import quiet

    training = model.training
    model.eval()
    try:
        with quiet():
            yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Kept:
    """How the model in memory keeps one check; `note` says why it is not asked of the checkpoint."""

    value: float = 0.0
    tolerance: float = 0.0
    note: str = ""
    tokens: list[list[int]] = field(default_factory=list[list[int]])
    lead: list[list[float]] = field(default_factory=list[list[float]])

    @classmethod
    def of(cls, check: str, model: Any, inputs: Any, dense: Any, folder: Path) -> _Kept:
        """Measure it. A model that fails is an error, unless the dense one fails as well."""
        try:
            return cls._measured(check, model, inputs, folder)
        except ReloadError as error:
            if dense is None:
                raise
            try:
                with _evaluating(dense):
                    for turned in range(TURNS):
                        cls._measured(check, dense, _turned(inputs, turned), folder)
            except ReloadError as other:
                what = other.what.removeprefix("in memory already, ").removeprefix("the model in memory fails: ")
                return cls(note=f"the dense model itself fails: {what}")
            raise error

    @classmethod
    def _measured(cls, check: str, model: Any, inputs: Any, folder: Path) -> _Kept:
        import torch

        from lamina.evaluators import _reload_child as child

        try:
            if check == "reload_generate":
                tokens, lead = child.greedy(model, inputs)
                return cls(tokens=tokens.tolist(), lead=lead.tolist())
            with child.exact(model):
                value, largest = child.measure(check, model, inputs)
        except FAILURES as error:
            what = f"the model in memory fails: {CHECKS[check]}: {child.short(error)}"
            raise ReloadError(what, where=folder) from error
        double = next(model.parameters()).dtype == torch.float64
        tolerance = ROUNDING["float64" if double else "float32"] * largest
        if not value <= tolerance:
            raise ReloadError(_apart(f"in memory already, {CHECKS[check]}", value, tolerance), where=folder)
        return cls(value, tolerance)


def _run(work: Path, jobs: list[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """Start the fresh process and read its report; a crash of the process is every job's error."""
    import torch

    threads = torch.get_num_threads()
    (work / "jobs.json").write_text(to_json({"threads": threads, "jobs": jobs}), encoding="utf-8")
    script = Path(__file__).with_name("_reload_child.py")
    command = [sys.executable, "-P", str(script), str(work)]
    try:
        done = subprocess.run(
            command, env=_environment(work, threads), cwd=work, capture_output=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return [{"error": f"no answer from the fresh process after {timeout:g} s"}] * len(jobs)
    if done.returncode == 0:
        return json.loads((work / "report.json").read_text(encoding="utf-8"))
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
    memory = " (out of memory?)" if done.returncode == -9 else ""
    last = f": {lines[-1].strip()}" if lines else ""
    return [{"error": f"the fresh process {how}{memory}{last}"}] * len(jobs)


def _environment(work: Path, threads: int) -> dict[str, str]:
    """The environment without anything that leads to lamina, to the network or to an older copy of the shim."""
    here = Path(__file__).resolve().parents[2]
    path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != here]
    dropped = ("LAMINA_", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONWARNINGS", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return kept | {
        "PYTHONPATH": os.pathsep.join(path),
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }


def _judge(
    folder: Path, model: Any, job: Mapping[str, Any], row: Mapping[str, Any], work: Path
) -> tuple[Evidence, ...]:
    """Evidence from the report of the fresh process; the first thing that differs raises ReloadError."""
    if "error" in row:
        raise ReloadError(f"does not load and run in a fresh process: {row['error']}", where=folder)
    _same_weights(folder, model, row, work)
    _same_config(folder, model, row["config"])
    found = [_same_outputs(folder, job, row["outputs"])]
    for check in ("reload_cache", "reload_padding"):
        if check in job["checks"]:
            value, bound = row[check], job["tolerance"][check]
            if not value <= bound:
                raise ReloadError(_apart(CHECKS[check], value, bound), where=folder)
            found.append(_evidence(check, job, value, bound, f", {job['exact']}"))
    if "reload_generate" in job["checks"]:
        _same_tokens(folder, job, row["tokens"])
        found.append(replace(_evidence("reload_generate", job, 1.0, 1.0), n=sum(map(len, job["tokens"]))))
    found += [replace(_evidence(k, job, 0.0, None, f": {note}"), n=0) for k, note in job["notes"].items()]
    order = list(CHECKS)
    return tuple(sorted(found, key=lambda e: order.index(e.name)))


def _evidence(check: str, job: Mapping[str, Any], value: float, high: float | None, how: str = "") -> Evidence:
    return Evidence(name=check, value=value, of="contract", high=high, n=job["count"], how=CHECKS[check] + how)


def _same_outputs(folder: Path, job: Mapping[str, Any], apart: Mapping[str, float]) -> Evidence:
    """Evidence of the output that differs most; one beyond its bound raises ReloadError."""
    for name, value in apart.items():
        if not value <= job["same"][name]:
            what = "the logits" if name == "out.logits" else f"the outputs ({name.removeprefix('out.')})"
            raise ReloadError(_apart(what, value, job["same"][name]), where=folder)
    worst = max(apart, key=lambda k: apart[k] / (job["same"][k] or 1.0))
    names = ", ".join(k.removeprefix("out.") for k in apart)
    return _evidence("reload_logits", job, apart[worst], job["same"][worst], f" ({names}), {job['dtype']}")


def _turned(inputs: Mapping[str, Tensor], by: int) -> dict[str, Tensor]:
    """The inputs with the tokens of a text in another order."""
    return {k: v.roll(by, -1) if k in ("input_ids", "decoder_input_ids") else v for k, v in inputs.items()}


def _apart(what: str, value: float, tolerance: float) -> str:
    return f"{what} differ by {value:.2g} (at most {tolerance:.1g})"


def _same_weights(folder: Path, model: Any, row: Mapping[str, Any], work: Path) -> None:
    for names, what in zip(row["names"], ("is not in the checkpoint", "is in the checkpoint alone"), strict=True):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ReloadError(f"{names[0]} {what}{more}", where=folder)
    if not row["differ"]:
        return
    from safetensors.torch import load_file

    name = row["differ"][0]
    other, own = load_file(work / "differ.safetensors")[name], model.state_dict()[name].detach().cpu()
    more = f", and {len(row['differ']) - 1} more tensors" if len(row["differ"]) > 1 else ""
    if other.dtype != own.dtype or other.shape != own.shape:
        raise ReloadError(
            f"{name} is {other.dtype} {list(other.shape)}, in memory {own.dtype} {list(own.shape)}{more}", where=folder
        )
    apart = float((other.double() - own.double()).abs().max())
    raise ReloadError(f"{name} differs by up to {apart:.2g}{more}", where=folder)


def _same_config(folder: Path, model: Any, found: Mapping[str, Any]) -> None:
    from lamina.evaluators._reload_child import config_fields

    own = json.loads(json.dumps(config_fields(model.config)))
    for key in sorted(own.keys() & found.keys()):
        if _canonical(own[key]) != _canonical(found[key]):
            what = f"config field {key} is {_brief(found[key])}, in memory {_brief(own[key])}"
            raise ReloadError(what, where=Path(folder) / "config.json")


def _canonical(value: Any) -> str:
    """One text for the same value, whatever the order of its keys; NaN equals itself."""
    return json.dumps(value, sort_keys=True)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _same_tokens(folder: Path, job: Mapping[str, Any], tokens: Sequence[Sequence[int]]) -> None:
    """The same greedy tokens; a tie within rounding may fall either way."""
    for row, (own, other, lead) in enumerate(zip(job["tokens"], tokens, job["lead"], strict=True)):
        for step, (a, b) in enumerate(zip(own, other, strict=True)):
            if a != b and lead[step] <= job["same"].get("out.logits", 0.0):
                break
            if a != b:
                what = f"{CHECKS['reload_generate']} differ: row {row}, step {step} gives {b}, in memory {a}"
                raise ReloadError(what, where=folder)
