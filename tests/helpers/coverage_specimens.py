"""Specimens for the coverage run's worker: those of the zoo, and one that ends the process that runs it."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import nn

from lamina.testing import zoo


class Killer(nn.Module):
    """Calls on the system to end the process."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        return x


def build(name: str) -> Any:
    if name == "killer":
        return zoo.Specimen(name, Killer(), {"x": torch.ones(1, 2, 3)})
    return zoo.build(name)
