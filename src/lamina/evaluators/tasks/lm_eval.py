"""Any task of lm-evaluation-harness: `lm-eval:NAME`, `lm-eval:NAME@METRIC`, or `lm-eval:FILE.yaml` for one's own."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lamina.core.errors import InputError, UnsupportedError, did_you_mean
from lamina.evaluators.tasks._item import Marks, Subject, Task, family

ACCURACIES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"})
"""Metrics whose marks are 0 or 1, and whose mean is the share that is right."""
RATES: Mapping[str, tuple[str, float]] = {
    "word_perplexity": ("nats/word", 1.0),
    "byte_perplexity": ("nats/byte", 1.0),
    "bits_per_byte": ("bits/byte", math.log(2)),
}
"""Metrics of which an item has a log-likelihood and a size: the unit of what is taken of them, and its nats."""
ROWS = 8
FILES = (".yaml", ".yml")


@family("lm-eval")
def harness_task(spec: str) -> Task:
    """The task NAME of lm-evaluation-harness, by the first metric that its authors list, or by METRIC.

    Its data is loaded here, from where its authors say, before any model runs. Raises UnsupportedError where the
    harness is missing, or its marks are not one number per item; InputError for an unknown name, or data that can't be
    had.
    """
    name, _, metric = spec.partition("@")
    with _clear(f"lm-eval:{name}"):
        loaded = _loaded(name)
    if name.endswith(FILES):
        name = Path(name).stem
    parts = {part: task.higher_is_better() for part, task in loaded.items()}
    shared = [m for m in next(iter(parts.values())) if all(m in own for own in parts.values())]
    if metric and metric not in shared:
        raise InputError(f"no metric {metric!r}", where=f"lm-eval:{name}", hint=did_you_mean(metric, shared))
    if not shared:
        raise UnsupportedError("its parts share no metric", where=f"lm-eval:{name}")
    label = f"lm-eval:{name}@{metric}" if metric else f"lm-eval:{name}"
    metric = metric or shared[0]
    unit, higher = RATES.get(metric, ("", 0.0))[0], bool(next(iter(parts.values()))[metric])
    return Task(
        name=label,
        capability="lm-eval",
        of=("decoder",),
        score=partial(_score, loaded, metric, label),
        summary=f"{metric} of lm-evaluation-harness",
        metric="accuracy" if metric in ACCURACIES else unit or metric,
        higher=higher,
        items=sum(len(task.eval_docs) for task in loaded.values()),
        package="lm-eval",
        groups=(),
    )


def _loaded(name: str) -> dict[str, Any]:
    """The harness's tasks behind a name, with their data: one, or the parts of a group."""
    try:
        manager_of: Any = importlib.import_module("lm_eval.tasks").TaskManager
    except ImportError:
        hint = "pip install 'lamina[tasks]'"
        raise UnsupportedError("lm-evaluation-harness is missing", where="tasks", hint=hint) from None
    if name.endswith(FILES):
        if not Path(name).is_file():
            raise InputError("no such file", where=name)
        return dict(manager_of(include_defaults=False).load([str(Path(name).resolve())])["tasks"])
    manager = manager_of()
    if name not in manager.all_tasks:
        raise InputError(f"no task named {name!r} in lm-eval", hint=did_you_mean(name, manager.all_tasks))
    return dict(manager.load([name])["tasks"])


def _score(loaded: Mapping[str, Any], metric: str, name: str, subject: Subject) -> Marks:
    """Marks of the harness's own items, drawn by the subject's seed from all parts together."""
    if subject.tokenizer is None:
        raise InputError("this task needs the model's tokenizer", where=name)
    drawn = draw({part: len(task.eval_docs) for part, task in loaded.items()}, subject.items, subject.seed)
    tasks = {part: loaded[part] for part in drawn}
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=subject.seed)  # so that both models see the same examples
    with _clear(name):
        found = importlib.import_module("lm_eval.evaluator").evaluate(
            lm=_model(subject),
            task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
            samples=drawn,
            bootstrap_iters=0,
            log_samples=True,
        )
    rows = [(part, row) for part in drawn for row in _first_filter(found["samples"][part])]
    subject.progress(name, len(rows), len(rows))
    choices = [len(row["resps"]) for part, row in rows if loaded[part].get_config("output_type") == "multiple_choice"]
    return Marks.of(
        [mark(row[metric], metric, name) for _, row in rows],
        [f"{part}/{row['doc_id']}/{row['prompt_hash']}" for part, row in rows],
        chance=float(np.mean([1 / c for c in choices])) if len(choices) == len(rows) else None,
        how=f"lm-evaluation-harness, {metric}",
    )


def draw(sizes: Mapping[str, int], items: int, seed: int) -> dict[str, list[int]]:
    """Numbers of items by part, in order, drawn without replacement from all parts; parts without any are left out."""
    every = [(part, number) for part, size in sizes.items() for number in range(size)]
    chosen = np.random.default_rng(seed).permutation(len(every))[:items]
    found: dict[str, list[int]] = {}
    for part, number in (every[i] for i in sorted(chosen)):
        found.setdefault(part, []).append(number)
    return found


def mark(value: Any, metric: str, name: str) -> float:
    """One number of an item's metric: as it is, or what a token, word or byte of it costs."""
    if metric in RATES and isinstance(value, tuple | list) and len(value) == 2:
        return -float(value[0]) / (float(value[1]) * RATES[metric][1])
    if isinstance(value, bool | int | float | np.number):
        return float(value)
    hint = f"name one with @, as {name.partition('@')[0]}@acc"
    raise UnsupportedError(f"the metric {metric} is not one number per item", where=name, hint=hint)


def _first_filter(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each item once: by the first of the ways in which the answers were read."""
    return [row for row in rows if row["filter"] == rows[0]["filter"]]


def _model(subject: Subject) -> Any:
    """The harness's own adapter around the model object, as it is and where it is.

    The tokenizer is a copy: the adapter gives it a padding token.
    """
    adapter: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    tokenizer = copy.deepcopy(subject.tokenizer)
    return adapter(pretrained=subject.model, backend="causal", tokenizer=tokenizer, batch_size=ROWS)


@contextlib.contextmanager
def _clear(where: str) -> Iterator[None]:
    """Without the harness's log lines and bars; what it or its libraries raise becomes one line."""
    logs = logging.getLogger("lm_eval")
    level = logs.level
    logs.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except (InputError, UnsupportedError, MemoryError):
        raise
    except Exception as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"lm-evaluation-harness: {detail[:250]}", where=where) from error
    finally:
        logs.setLevel(level)
