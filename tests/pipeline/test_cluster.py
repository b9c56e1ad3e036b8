"""Shards on a real Ray cluster of two workers on this machine, one of which is killed in the run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from lamina.core.documents import Recipe
from lamina.core.errors import InputError, LaminaError
from lamina.pipeline import Run, cluster, verbs
from lamina.pipeline.scoring import How
from lamina.pipeline.table import read_survey
from lamina.testing.models import text, tiny

NAMES = ["cosine", "angular", "damage", "leave-one-out"]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    found = pytest.importorskip("ray", reason="ray is not installed: pip install 'lamina[ray]'")
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        found.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    tiny("llama").save_pretrained(folder / "model")
    save_file({"input_ids": text(12, 24)}, folder / "ids.safetensors")
    return folder


def run_in(folder: Path, bench: Path) -> Run:
    ids = str(bench / "ids.safetensors")
    data = {"calibration": ids, "heldout": ids, "length": 8, "sequences": 8, "heldout_sequences": 2}
    asked = {"name": "default", "model": str(bench / "model"), "budget": {"keep": 1.0}, "data": data}
    return Run.start(folder, Recipe.from_data({**asked, "dtype": "float32"}))


def dies_once(mark: Path, usual: Any) -> Any:
    """The work of a shard, but the first worker that takes one is killed in the middle of it."""

    def work(task: Any, batches: Any, offset: int) -> Any:
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return usual(task, batches, offset)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    return work


def always_dies(task: Any, batches: Any, offset: int) -> Any:
    if offset == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return cluster._shard(task, batches, offset)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_dies_is_replaced_and_the_scores_are_the_same(
    ray: Any, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbs.survey(run_in(tmp_path / "alone", bench), NAMES)
    mark = tmp_path / "killed"
    monkeypatch.setattr(cluster, "_shard", dies_once(mark, cluster._shard))
    verbs.survey(run_in(tmp_path / "ray", bench), NAMES, How(shards=4, ray="auto"))
    assert mark.exists()
    want, got = (read_survey(tmp_path / n / "survey.parquet") for n in ("alone", "ray"))
    for name in NAMES:
        for site, value in want[name].values.items():
            np.testing.assert_allclose(got[name].values[site], value, rtol=1e-10, atol=1e-14, err_msg=f"{name} {site}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_shard_whose_workers_all_die_is_named_and_the_others_are_kept(
    ray: Any, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_shard", always_dies)
    monkeypatch.setattr(cluster, "RETRIES", 1)
    with pytest.raises(LaminaError, match=r"shard 3 of 4 is lost.*the shards that are done are kept"):
        verbs.survey(run_in(tmp_path / "run", bench), ["cosine"], How(shards=4, ray="auto"))
    assert not (tmp_path / "run" / "survey.parquet").exists()
    monkeypatch.undo()
    verbs.survey(run_in(tmp_path / "run", bench), ["cosine"], How(shards=4))
    assert read_survey(tmp_path / "run" / "survey.parquet")["cosine"].values


def test_without_ray_one_line(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    usual = builtins.__import__

    def no_ray(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_ray)
    with pytest.raises(InputError, match=r"Ray is not installed.*pip install 'lamina\[ray\]'"):
        verbs.survey(run_in(tmp_path / "run", bench), ["cosine"], How(shards=2, ray="auto"))


def test_a_model_in_memory_is_not_sent(bench: Path, tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", bench)
    run.model = tiny("llama")
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="a model in memory can't be sent"):
        verbs.survey(run, ["cosine"], How(shards=2, ray="auto"))
