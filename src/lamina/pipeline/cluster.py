"""Shards of a survey on a Ray cluster: each worker loads the model once and tallies part after part of the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lamina.core.errors import InputError, LaminaError, UnsupportedError

if TYPE_CHECKING:
    from lamina.lab import Lab
    from lamina.pipeline.run import Run

RETRIES = 3
"""How often a shard is given to another worker when one dies."""
_HELD: dict[str, Any] = {}
"""In a worker: the model that it has loaded."""


def tallied_on_ray(
    run: Run, labs: Sequence[Lab], todo: Sequence[int], options: Mapping[str, Mapping[str, Any]], address: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, tallies) of each shard in `todo`, as they are done.

    `address` is that of a cluster; "auto" joins one that runs, or begins one on this machine. A shard whose worker dies
    is tried again; raises LaminaError, naming it, where it dies too often. A model in memory can't be sent.
    """
    ray = _ray()
    if run.model is not None:
        raise InputError("a model in memory can't be sent to other processes", where="--ray", hint="save it first")
    began = _join(ray, address)
    try:
        remote = ray.remote(max_retries=RETRIES, num_cpus=1)(_shard)
        told = _task(run, options)
        waiting = {}
        for number in todo:
            lab = labs[number]
            batches = [{k: v.cpu().numpy() for k, v in b.items()} for b in lab.batches]
            waiting[remote.remote(told, batches, lab.offset)] = number
        while waiting:
            done, _ = ray.wait(list(waiting))
            for ref in done:
                number = waiting.pop(ref)
                yield number, _received(ray, ref, number, len(labs), run, options)
    finally:
        if began:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("Ray is not installed", where="--ray", hint="pip install 'lamina[ray]'") from None
    return ray


def _join(ray: Any, address: str) -> bool:
    """Join a cluster, or begin one; whether it is ours to end."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    if address != "auto":
        try:
            ray.init(address=address, **{k: v for k, v in quiet.items() if k != "include_dashboard"})
        except Exception as error:
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"can't join the Ray cluster: {what[:200]}", where=address) from None
        return True
    try:
        ray.init(address="auto", **{k: v for k, v in quiet.items() if k != "include_dashboard"})
    except ConnectionError:
        ray.init(**quiet)
    return True


def _task(run: Run, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a worker must know: plain data alone."""
    recipe = run.recipe
    return {
        "model": recipe.model, "dtype": recipe.dtype, "device": recipe.device, "seed": recipe.seed,
        "trust_remote_code": recipe.trust_remote_code, "fingerprint": run.loaded.fingerprint,
        "measures": {n: dict(o) for n, o in options.items()},
    }  # fmt: skip


def _shard(task: Mapping[str, Any], batches: Sequence[Mapping[str, Any]], offset: int) -> dict[str, Any]:
    """In a worker: the tallies of one part of the text, as plain data and arrays."""
    import torch

    from lamina.core.registry import MEASURES
    from lamina.lab.freeze import frozen
    from lamina.lab.passes import tallied

    torch.set_num_threads(1)
    lab = _lab(task, batches, offset)
    found = tallied(lab, {n: MEASURES.make(n, o) for n, o in task["measures"].items()})
    told: dict[str, Any] = {}
    for name, tally in found.items():
        if isinstance(tally, UnsupportedError):
            told[name] = str(tally)
        else:
            state, arrays = frozen(tally)
            told[name] = (
                state,
                {k: v.float().numpy() if v.dtype == torch.bfloat16 else v.numpy() for k, v in arrays.items()},
            )
    return told


def _lab(task: Mapping[str, Any], batches: Sequence[Mapping[str, Any]], offset: int) -> Lab:
    import torch

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab
    from lamina.lab.load import load

    if _HELD.get("fingerprint") != task["fingerprint"]:
        given = {k: task[k] for k in ("dtype", "device", "trust_remote_code")}
        loaded = load(task["model"], **given)
        if loaded.fingerprint != task["fingerprint"]:
            raise LaminaError("the worker finds another model under this name", where=task["model"])
        _HELD.update(fingerprint=loaded.fingerprint, model=loaded.model, anatomy=Anatomy.of(loaded.model))
    text = [{k: torch.from_numpy(v.copy()) for k, v in b.items()} for b in batches]
    return Lab(_HELD["model"], text, anatomy=_HELD["anatomy"], seed=task["seed"], offset=offset)


def _received(
    ray: Any, ref: Any, number: int, of: int, run: Run, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    import torch

    from lamina.core.registry import MEASURES
    from lamina.lab.freeze import thawed

    try:
        told = ray.get(ref)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, LaminaError):
            raise cause from None
        what = (str(cause or error).strip() or type(error).__name__).splitlines()[0]
        hint = "survey again: the shards that are done are kept"
        raise LaminaError(f"shard {number + 1} of {of} is lost: {what[:200]}", where="ray", hint=hint) from None
    found: dict[str, Any] = {}
    for name, given in told.items():
        if isinstance(given, str):
            found[name] = UnsupportedError(given)
            continue
        state, arrays = given
        fresh = MEASURES.make(name, options[name]).tally(run.anatomy)
        found[name] = thawed(fresh, state, {k: torch.from_numpy(v.copy()) for k, v in arrays.items()})
    return found
