"""Runs in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_run


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs commands in processes of their own, quickly."""
    found = tiny_run.Zygote(tmp_path_factory.mktemp("zygote"))
    yield found
    found.close()
