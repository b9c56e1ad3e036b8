"""The process whose resident memory is measured: loads one model, answers once, says in JSON what that took."""

from __future__ import annotations

import json
import sys

import torch

from lamina.evaluators._resident import forget, peak, resident
from lamina.lab import Lab
from lamina.lab.load import load
from lamina.lab.workloads import Workloads


def main() -> None:
    """Reads the job from standard input: see `lamina.evaluators.memory.resident`."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    ids = torch.tensor(job["prompt"])
    before = resident()
    model = load(job["spec"], dtype=job["dtype"], trust_remote_code=job["trust_remote_code"]).model
    forget()
    Workloads(Lab(model, ids), len(ids)).answer(model, ids, job["decode"])
    sys.stdout.write("\n" + json.dumps({"peak": peak(), "before": before}) + "\n")


if __name__ == "__main__":
    main()
