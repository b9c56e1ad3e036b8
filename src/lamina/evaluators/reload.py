"""The reload contract: a checkpoint on disk behaves, in a fresh process without lamina, as the model in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
SAME = 2
"""Rounding steps of the largest logit that the same computation may differ by between two processes."""
CHECKS = {
    "reload_logits": "the logits",
    "reload_cache": "cached decoding against the full forward",
    "reload_padding": "a left-padded batch against its rows",
    "reload_generate": "the greedy tokens of generate()",
}
Case = tuple[Path, "nn.Module", "Tensor"]
"""A checkpoint's folder, the model it was written from, and token ids [batch, tokens]."""


def contract(folder: Path, model: nn.Module, ids: Tensor, *, timeout: float = TIMEOUT) -> tuple[Evidence, ...]:
    """Load `folder` in a fresh process and compare it with `model` on `ids` [batch, tokens] (at least 2 tokens).

    Every tensor and config field equal, logits equal, cached decoding equal to the full forward, a left-padded batch
    equal to its rows, and the same greedy tokens. Gives one Evidence per check (`of="contract"`, `high` the tolerance).
    Raises ReloadError, one line, naming the first thing that differs and by how much; also for a crash or a timeout.
    """
    (found,) = contracts([(folder, model, ids)], timeout=timeout)
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
                asked.append((number, _reference(*case, work / str(len(asked)))))
                found.append(None)
            except ReloadError as error:
                found.append(error)
        report = _run(work, [job for _, job in asked], cases, timeout) if asked else []
        for place, ((number, job), row) in enumerate(zip(asked, report, strict=True)):
            folder, model, _ = cases[number]
            try:
                found[number] = _judge(folder, model, job, row, work / str(place))
            except ReloadError as error:
                found[number] = error
    return [f for f in found if f is not None]


def _reference(folder: Path, model: Any, ids: Tensor, work: Path) -> dict[str, Any]:
    """Write the reference tensors; first of all the model in memory must keep the contract itself."""
    import torch
    from safetensors.torch import save_file

    from lamina.evaluators import _reload_child as child
    from lamina.lab.load import quiet

    if ids.ndim != 2 or ids.shape[1] < 2:
        raise InputError(f"the contract takes token ids [batch, tokens], not {list(ids.shape)}")
    device = next(model.parameters()).device
    ids = ids.to(device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), quiet():
            logits = child.full(model, ids)
            tokens, lead = child.greedy(model, ids)
            with child.exact(model):
                cache, largest = child.cached(model, ids)
                padding, _ = child.padded(model, ids)
    except (RuntimeError, IndexError, ValueError, AttributeError) as error:
        raise ReloadError(f"the model in memory fails: {child.short(error)}", where=folder) from error
    finally:
        model.train(training)
    exact = "float64" if logits.dtype == torch.float64 else "float32"
    tolerance = ROUNDING[exact] * largest
    for check, value in (("reload_cache", cache), ("reload_padding", padding)):
        if not value <= tolerance:
            raise ReloadError(_apart(f"in memory already, {CHECKS[check]}", value, tolerance), where=folder)
    work.mkdir()
    save_file({"ids": ids.contiguous(), "logits": logits.contiguous()}, work / "reference.safetensors")
    return {
        "folder": str(Path(folder).resolve()),
        "device": str(device),
        "attention": getattr(model.config, "_attn_implementation", None),
        "digests": child.digests(model),
        "tokens": tokens.tolist(),
        "lead": lead.tolist(),
        "same": SAME * torch.finfo(logits.dtype).eps * float(logits.abs().max()),
        "tolerance": tolerance,
        "exact": exact,
        "dtype": str(logits.dtype).removeprefix("torch."),
        "count": ids.numel(),
    }


def _run(work: Path, jobs: list[dict[str, Any]], cases: Sequence[Case], timeout: float) -> list[dict[str, Any]]:
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
    bounds = {"reload_logits": job["same"], "reload_cache": job["tolerance"], "reload_padding": job["tolerance"]}
    values = {"reload_logits": row["logits"], "reload_cache": row["cache"], "reload_padding": row["padding"]}
    for check, value in values.items():
        if not value <= bounds[check]:
            raise ReloadError(_apart(CHECKS[check], value, bounds[check]), where=folder)
    _same_tokens(folder, job, row["tokens"])
    how = {"reload_logits": job["dtype"], "reload_cache": job["exact"], "reload_padding": job["exact"]}
    found = [
        Evidence(name=k, value=v, of="contract", high=bounds[k], n=job["count"], how=f"{CHECKS[k]}, {how[k]}")
        for k, v in values.items()
    ]
    count = sum(map(len, job["tokens"]))
    last = "reload_generate"
    return *found, Evidence(name=last, value=1.0, of="contract", high=1.0, n=count, how=CHECKS[last])


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
            if a != b and lead[step] <= job["same"]:
                break
            if a != b:
                what = f"{CHECKS['reload_generate']} differ: row {row}, step {step} gives {b}, in memory {a}"
                raise ReloadError(what, where=folder)
