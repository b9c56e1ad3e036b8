"""The process that holds one GGUF file: `python -m lamina.evaluators._llama_child JOB`, asked in lines of JSON.

Says a line when the model is loaded. `{"prompt": [[id, …], …], "decode": n}` is answered with seconds, `{"memory":
true}` with bytes. What llama.cpp prints goes nowhere.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamina.evaluators._resident import peak, resident

Ask = Callable[[dict[str, Any]], Any]


def serve(job: dict[str, Any]) -> Ask:
    """A function that posts a completion to llama.cpp's server, which runs in this process."""
    x: Any = importlib.import_module("xllamacpp")
    options = x.CommonParams()
    options.model.path = job["path"]
    options.n_ctx, options.n_parallel, options.n_batch = job["context"], job["slots"], job["together"]
    options.n_gpu_layers = 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = job["threads"]
    options.cache_ram_mib, options.fit_params, options.verbosity = 0, False, -1
    server = x.Server(options)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(body: dict[str, Any]) -> Any:
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(body).encode(), head)
        with opener.open(request) as answer:
            return json.load(answer)

    return ask


def answer(ask: Ask, prompt: list[list[int]], decode: int) -> dict[str, float]:
    """Seconds of the prompt and of `decode` tokens behind the first one, which is the prompt's own."""
    greedy = {"temperature": 0, "samplers": ["temperature"], "ignore_eos": True, "cache_prompt": False}
    found = ask({"prompt": prompt, "n_predict": decode + 1, **greedy})
    rows = [row["timings"] for row in (found if isinstance(found, list) else [found])]
    if len(rows) != len(prompt):
        raise RuntimeError(f"answered {len(rows)} of {len(prompt)} prompts")
    read, made = ({row[f"{work}_n"] for row in rows} for work in ("prompt", "predicted"))
    if read != {len(prompt[0])} or made != {decode + 1}:
        raise RuntimeError(f"read {read} of {len(prompt[0])} tokens and made {made} of {decode + 1}")
    return {
        "prefill": max(row["prompt_ms"] for row in rows) / 1000,
        "decode": max(row["predicted_ms"] for row in rows) / 1000,
    }


def main() -> None:
    """Answer until there are no more questions."""
    say = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    before = resident()
    code = 1

    def tell(line: dict[str, Any]) -> None:
        say.write(json.dumps(line) + "\n")
        say.flush()

    try:
        job = json.loads(sys.argv[1])
        ask = serve(job)
        answer(ask, [[1, 2]], 1)  # a server that has completed nothing may hang when it ends
        tell({"ready": True})
        for line in sys.stdin:
            question = json.loads(line)
            if question.pop("memory", False):
                tell({"peak": peak(), "before": before})
            else:
                tell(answer(ask, **question))
        code = 0
    except Exception as error:
        path = Path(json.loads(sys.argv[1])["path"]).name
        tell({"error": f"{path}: {type(error).__name__}: {' '.join(str(error).split())}"})
    os._exit(code)  # its threads need no goodbye


if __name__ == "__main__":
    main()
