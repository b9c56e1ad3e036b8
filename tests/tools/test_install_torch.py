"""The installer of torch refuses a GPU build; both reports are cut from those of pip 26.3 for torch 2.13.0 on Linux."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import install_torch

HERE = Path(__file__).parent


def report(name: str) -> dict[str, object]:
    return json.loads((HERE / f"torch_{name}_report.json").read_text(encoding="utf-8"))


def test_a_cpu_build_passes() -> None:
    packages = install_torch.planned(report("cpu"))
    assert ("torch", "2.13.0+cpu") in packages
    assert install_torch.gpu_packages(packages) == []
    install_torch.refuse_gpu(packages, what="this would install")


def test_a_cuda_build_is_refused_by_name_in_one_line() -> None:
    packages = install_torch.planned(report("cuda"))
    assert ("torch", "2.13.0") in packages
    with pytest.raises(install_torch.Refused) as caught:
        install_torch.refuse_gpu(packages, what="torch==2.13.0 would install")
    line = str(caught.value)
    assert line.startswith("torch==2.13.0 would install a GPU build of torch (cuda-bindings==13.5.0, ")
    assert "and 16 more" in line
    assert "TORCH_PIP_ARGS" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("package", "gpu"),
    [
        (("nvidia-cublas", "13.1"), True),
        (("nvidia_cublas_cu12", "12.4"), True),
        (("triton", "3.7.1"), True),
        (("pytorch-triton-rocm", "3.7"), True),
        (("torch", "2.13.0+cu130"), True),
        (("torch", "2.13.0+rocm6.4"), True),
        (("torch", "2.13.0+cpu"), False),
        (("torch", "2.13.0"), False),
        (("tritonclient", "2.0"), False),
        (("numpy", "2.0+cuda"), False),
    ],
)
def test_what_counts_as_a_gpu_package(package: tuple[str, str], gpu: bool) -> None:
    assert bool(install_torch.gpu_packages([package])) is gpu


def test_an_unknown_report_format_is_refused() -> None:
    with pytest.raises(install_torch.Refused, match="version '2'"):
        install_torch.planned({"version": "2", "install": []})


def test_a_refusal_installs_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, ...]] = []

    def pip(*args: str) -> None:
        calls.append(args)
        if "--report" in args:
            text = (HERE / "torch_cuda_report.json").read_text(encoding="utf-8")
            Path(args[args.index("--report") + 1]).write_text(text, encoding="utf-8")

    monkeypatch.setattr(install_torch, "pip", pip)
    assert install_torch.main(["torch==2.13.0"]) == 2
    assert [("--dry-run" in call) for call in calls] == [True]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_this_environment_holds_a_cpu_build() -> None:
    pytest.importorskip("torch")
    assert install_torch.verify()
