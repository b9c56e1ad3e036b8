"""Install torch as a CPU build, and refuse a GPU build before its gigabytes are downloaded.

    python tools/install_torch.py torch==2.13.0 [any further argument of pip install]

pip resolves first and writes what it would install (`--dry-run --report`); a GPU build shows there as `nvidia-*`,
`cuda-*` or `triton` packages or as a local version like `+cu130`. After the installation the build is asked itself.
Standard library only: this runs before anything else is installed. Exit code 2 and one line where it refuses.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

GPU_PACKAGE = re.compile(r"(nvidia|cuda|triton|pytorch[-_.]triton|intel[-_.]sycl|rocm)([-_.]|$)", re.IGNORECASE)
GPU_LOCAL_VERSION = re.compile(r"\+(cu|rocm|xpu)", re.IGNORECASE)
REMEDY = 'TORCH_PIP_ARGS="--index-url URL", with the URL of the CPU wheel index that PyTorch\'s install page names'


class Refused(Exception):
    """The environment would not be, or is not, one with a CPU build."""


def gpu_packages(packages: Iterable[tuple[str, str]]) -> list[str]:
    """Those of `packages` (name, version) that belong to a GPU build, as `name==version`."""
    return sorted(
        f"{name}=={version}"
        for name, version in packages
        if GPU_PACKAGE.match(name) or (name == "torch" and GPU_LOCAL_VERSION.search(version))
    )


def planned(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The packages (name, version) that a report of `pip install --report` would install."""
    if report.get("version") != "1":
        raise Refused(f"pip wrote a report of version {report.get('version')!r}, not '1'; use pip 25.1 to 26")
    return [(item["metadata"]["name"], item["metadata"]["version"]) for item in report["install"]]


def refuse_gpu(packages: Iterable[tuple[str, str]], *, what: str) -> None:
    """Raise Refused, naming what was found, if `packages` holds a part of a GPU build."""
    found = gpu_packages(packages)
    if found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise Refused(f"{what} a GPU build of torch ({shown}); pass {REMEDY}")


def pip(*args: str) -> None:
    """Run pip of this interpreter; its own messages tell what went wrong."""
    done = subprocess.run([sys.executable, "-m", "pip", *args], check=False)
    if done.returncode:
        raise Refused(f"pip could not install torch (exit code {done.returncode}, its reason stands above)")


def resolve(args: Sequence[str]) -> Mapping[str, Any]:
    """What `pip install ARGS` would install, as pip's report."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        pip("install", "--quiet", "--quiet", "--dry-run", "--report", str(file), *args)
        return json.loads(file.read_text(encoding="utf-8"))


def installed() -> list[tuple[str, str]]:
    """Every package (name, version) of this environment."""
    return [(dist.metadata["Name"], dist.version) for dist in importlib.metadata.distributions()]


def verify() -> str:
    """The version of the installed torch; raises Refused if it, or any other package here, is part of a GPU build."""
    ask = "import torch; print(torch.__version__, torch.version.cuda, getattr(torch.version, 'hip', None))"
    done = subprocess.run([sys.executable, "-c", ask], check=False, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"torch is installed but can't be imported: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    version, cuda, hip = done.stdout.split()[-3:]
    if (cuda, hip) != ("None", "None"):
        raise Refused(f"torch {version} is a GPU build; remove the environment and pass {REMEDY}")
    refuse_gpu(installed(), what="this environment holds parts of")
    return version


def main(args: Sequence[str]) -> int:
    """Resolve, refuse or install, verify; `--verify` alone only verifies."""
    try:
        if list(args) != ["--verify"]:
            refuse_gpu(planned(resolve(args)), what=f"{args[0]} would install")
            pip("install", "--quiet", "--quiet", *args)
        print(f"torch {verify()}: a CPU build", flush=True)
    except Refused as error:
        print(f"install_torch: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
