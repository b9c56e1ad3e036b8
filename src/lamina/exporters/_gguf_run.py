"""llama.cpp itself on a GGUF file, in a process of its own: the tokens that it adds, greedily.

As a program it reads {"path", "threads", "prompts", "steps"} from the file that is named and prints the tokens; it
needs xllamacpp alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

TIMEOUT = 60.0
STEPS = 12
CONTEXT = 256
TIE = 2e-3
"""A token of llama.cpp's may lie this far below the best, over the largest logit: where two are as good as equal."""
COARSE = 0.1
"""The same where maps have GGUF types of few bits, since llama.cpp then rounds what goes into them too."""


def available() -> bool:
    """Whether llama.cpp is installed, as the wheel xllamacpp."""
    return importlib.util.find_spec("xllamacpp") is not None


def run_check(path: Path, model: nn.Module, ids: Tensor, *, rounded: bool, timeout: float = TIMEOUT) -> str:
    """Let llama.cpp continue the rows of `ids` [rows, tokens], and hold each token against the model's own logits.

    Empty where all agree; else what went wrong, in one line. Raises TimeoutError after `timeout` seconds, and where
    llama.cpp ends every row at once, so that there is nothing to compare.
    """
    import torch

    prompts = ids[:, : CONTEXT // 2].tolist()
    job = {"path": str(path.resolve()), "threads": torch.get_num_threads(), "prompts": prompts, "steps": STEPS}
    with tempfile.TemporaryDirectory(prefix="lamina-gguf-") as work:
        file = Path(work) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-P", str(Path(__file__)), str(file)]
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"no answer from llama.cpp after {timeout:g} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return f"llama.cpp does not run it: {said[-1][:200] if said else f'it ended with {done.returncode}'}"
    tokens = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return _held_against(model, prompts, tokens, COARSE if rounded else TIE)


def _held_against(model: Any, prompts: Sequence[list[int]], tokens: Sequence[list[int]], tie: float) -> str:
    import copy

    import torch

    from lamina.exporters._gguf_certify import COPIED

    if next(model.parameters()).dtype.itemsize < 4 and sum(p.numel() for p in model.parameters()) <= COPIED:
        model = copy.deepcopy(model).float()
    if not any(tokens):
        raise TimeoutError("llama.cpp ends the text at once")
    for row, (prompt, added) in enumerate(zip(prompts, tokens, strict=True)):
        if not added:
            continue
        whole = torch.tensor([prompt + added], device=next(model.parameters()).device)
        with torch.no_grad():
            logits = model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, whole[0, len(prompt) :, None])[:, 0]
        behind = (logits.amax(1) - chosen) / logits.abs().amax()
        if not bool((behind <= tie).all()):
            step = int((behind > tie).nonzero()[0])
            return f"llama.cpp continues otherwise: token {step + 1} of row {row} lies {float(behind[step]):.1e} behind"
    return ""


def main(file: Path) -> None:
    """Answer one job."""
    x: Any = importlib.import_module("xllamacpp")
    job = json.loads(file.read_text(encoding="utf-8"))
    options = x.CommonParams()
    options.model.path = job["path"]
    options.n_ctx, options.n_parallel, options.n_gpu_layers = CONTEXT, 1, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = job["threads"]
    options.cache_type_k = options.cache_type_v = x.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.warmup, options.fit_params, options.verbosity = False, False, -1
    server = x.Server(options)
    asked = {"temperature": 0, "samplers": ["temperature"], "cache_prompt": False, "return_tokens": True}
    found = []
    for prompt in job["prompts"]:
        data = json.dumps({"prompt": prompt, "n_predict": job["steps"], **asked}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/completion", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found.append(json.load(answer)["tokens"])
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
