"""What the reload contract runs, in both processes: the parent imports it, the fresh process runs it as a script.

Knows nothing of lamina, and as a script refuses to import it. `python _reload_child.py FOLDER` reads FOLDER/jobs.json
and writes FOLDER/report.json.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SINGLES = 8
"""Tokens that are decoded one by one."""
SHORTER = 3
"""By how many tokens each row of the padded batch is shorter than the one before."""
CACHES = ("past_key_values", "cache_params", "mems", "state", "rnn_state", "past_buckets_states")
"""Names of outputs that are a cache."""
MARKS = ("_token_id", "_token_index")
"""How config fields end that name the marks of pictures and sounds in a text."""


@contextlib.contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, a model in 16 bits computes in float32, one module's weights widened at a time.

    So that a wrong cache is told from rounding, without holding the model twice.
    """
    handles, stack = [], []

    def widen(module: nn.Module, *_: Any) -> None:
        held = {k: p for k, p in module._parameters.items() if p is not None and _narrow(p)}
        stack.append(held)
        module._parameters.update({k: nn.Parameter(p.float(), requires_grad=False) for k, p in held.items()})

    def restore(module: nn.Module, *_: Any) -> None:
        module._parameters.update(stack.pop())

    if any(_narrow(p) for p in model.parameters()):
        for module in model.modules():
            if module._parameters:
                handles.append(module.register_forward_pre_hook(widen))
                handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def whole(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """One forward on all the inputs without a cache; what is drawn at random is the same every time."""
    torch.manual_seed(0)
    extra = {"use_cache": False} if "use_cache" not in inputs and _caches(model) else {}
    return model(**inputs, **extra)


def _caches(model: Any) -> bool:
    """Whether a forward takes `use_cache`: by name, or handed on to an inner model."""
    named = inspect.signature(model.forward).parameters
    handed = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named.values())
    return "use_cache" in named or (handed and any("use_cache" in vars(c) for c in configs(model.config)))


def configs(config: Any) -> Iterator[Any]:
    """The config and those inside it, at any depth."""
    yield config
    for inner in vars(config).values():
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            yield from configs(inner)


def tensors(out: Any, path: str = "out") -> dict[str, Tensor]:
    """The tensors of an output by name, caches left out."""
    if isinstance(out, Tensor):
        return {path: out}
    if isinstance(out, Mapping):
        pairs = list(out.items())
    elif isinstance(out, list | tuple):
        pairs = list(enumerate(out))
    else:
        pairs = list(vars(out).items()) if hasattr(type(out), "__dataclass_fields__") else []
    kept = [(k, v) for k, v in pairs if not str(k).startswith(CACHES)]
    return {name: t for k, v in kept for name, t in tensors(v, f"{path}.{k}").items()}


def checks(model: Any, inputs: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The checks of decoding that the model's kind allows: none for one that does not generate."""
    if not (hasattr(model, "generate") and model.can_generate()):
        return ()
    if both(model):
        return ("reload_cache",) if "decoder_input_ids" in inputs else ()
    return ("reload_cache", "reload_padding", "reload_generate") if text(model, inputs) is not None else ()


def both(model: Any) -> bool:
    """Whether the model has an encoder and a decoder, each with its inputs."""
    return bool(model.config.is_encoder_decoder) or "decoder_input_ids" in inspect.signature(model.forward).parameters


def text(model: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Token ids [batch, tokens] to decode by themselves, without the marks of pictures and sounds; None where none."""
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.is_floating_point():
        return None
    if set(inputs) - {"input_ids", "attention_mask"}:
        marks = [v for c in configs(model.config) for k, v in vars(c).items() if k.endswith(MARKS) and type(v) is int]
        ids = ids[:, ~torch.isin(ids, torch.tensor(marks, device=ids.device)).any(0)]
    return ids if ids.shape[1] > 1 else None


def measure(check: str, model: Any, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """Largest difference of logits that the check finds, and the largest logit."""
    if check == "reload_cache" and both(model):
        return _decoded(model, inputs)
    ids = text(model, inputs)
    assert ids is not None
    return cached(model, ids) if check == "reload_cache" else padded(model, ids)


def full(model: nn.Module, ids: Tensor, **extra: Any) -> Tensor:
    """Logits [batch, tokens, vocabulary] of one forward without a cache."""
    return whole(model, {"input_ids": ids, **extra}).logits


def cached(model: Any, ids: Tensor) -> tuple[float, float]:
    """Largest difference of logits between decoding `ids` [batch, tokens] by a cache and one full forward.

    All but the last tokens at once, then one by one, positions left to the model: it reads them from the cache.
    Where the model keeps its cache to itself, `generate` does it. Also the largest logit.
    """
    start = max(1, ids.shape[1] - SINGLES)
    out = model(input_ids=ids[:, :start], use_cache=True)
    if getattr(out, "past_key_values", None) is None:
        return _generated(model, ids, start)

    def step(place: int, cache: Any) -> Any:
        return model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)

    return _stepwise(out, full(model, ids), start, step)


def _decoded(model: Any, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """The same for the decoder's ids, the encoder run once."""
    from transformers.modeling_outputs import BaseModelOutput

    ids = inputs["decoder_input_ids"]
    start = max(1, ids.shape[-1] - SINGLES)
    out = model(**{**inputs, "decoder_input_ids": ids[..., :start]}, use_cache=True)
    known = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
    rest = {k: v for k, v in inputs.items() if k.startswith(("attention_mask", "encoder_"))}

    def step(place: int, cache: Any) -> Any:
        now = {"decoder_input_ids": ids[..., place : place + 1], "past_key_values": cache}
        return model(**rest, **now, encoder_outputs=known, use_cache=True)

    return _stepwise(out, whole(model, inputs).logits, start, step)


def _stepwise(out: Any, logits: Tensor, start: int, step: Callable[[int, Any], Any]) -> tuple[float, float]:
    """Largest difference between `logits` [batch, tokens, vocabulary] and those of `out` and each later step."""
    apart = _apart(logits[:, :start], out.logits)
    for place in range(start, logits.shape[1]):
        out = step(place, out.past_key_values)
        apart = max(apart, _apart(logits[:, place : place + 1], out.logits))
    return apart, float(logits.abs().max())


def _generated(model: Any, ids: Tensor, start: int) -> tuple[float, float]:
    """The same, by `generate` that is told the tokens."""

    def told(row: int, seen: Tensor) -> list[int]:
        return [int(ids[row, min(len(seen), ids.shape[1] - 1)])]

    out = _generate(model, ids[:, :start], torch.ones_like(ids[:, :start]), told, steps=ids.shape[1] - start)
    steps = torch.stack(out.logits, 1)
    whole = full(model, out.sequences)[:, start - 1 : -1]
    return _apart(whole, steps), float(whole.abs().max())


def padded(model: Any, ids: Tensor) -> tuple[float, float]:
    """Largest difference of logits between a left-padded batch and its rows alone. Also the largest logit."""
    batch, mask, lengths = ragged(ids)
    extra: dict[str, Any] = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    together = full(model, batch, **extra)
    apart, largest = 0.0, 0.0
    for row, length in enumerate(lengths):
        alone = full(model, batch[row : row + 1, -length:])
        apart = max(apart, _apart(alone, together[row : row + 1, -length:]))
        largest = max(largest, float(alone.abs().max()))
    return apart, largest


def ragged(ids: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Rows of different lengths, padded on the left with id 0: ids, mask, lengths. One row gives two."""
    ids = torch.cat((ids, ids)) if len(ids) == 1 else ids
    width = ids.shape[1]
    lengths = [max(1, width - SHORTER * row) for row in range(len(ids))]
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        batch[row, width - length :] = ids[row, :length]
        mask[row, width - length :] = 1
    return batch, mask, lengths


def greedy(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [batch, steps] that `generate` adds to a left-padded batch, and the lead of each over the second best."""
    ids = text(model, inputs)
    assert ids is not None
    batch, mask, _ = ragged(ids)
    out = _generate(model, batch, mask, None, steps=SINGLES)
    best = torch.stack(out.logits, 1).float().topk(2).values
    return out.sequences[:, batch.shape[1] :], best[..., 0] - best[..., 1]


def _generate(model: Any, ids: Tensor, mask: Tensor, told: Any, *, steps: int) -> Any:
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        prefix_allowed_tokens_fn=told,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _apart(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where either is no number."""
    if a.shape != b.shape:
        return float("inf")
    difference = (a.double() - b.double()).abs().masked_fill(a == b, 0.0)
    largest = float(difference.max()) if difference.numel() else 0.0
    return float("inf") if math.isnan(largest) else largest


def digests(model: nn.Module) -> dict[str, str]:
    """sha256 of every tensor of the state dict: type, shape and bytes."""
    found = {}
    for name, tensor in model.state_dict().items():
        held = tensor.detach().cpu().contiguous()
        mark = hashlib.sha256(f"{held.dtype}{tuple(held.shape)}".encode())
        mark.update(held.reshape(-1).view(torch.uint8).numpy().data)
        found[name] = mark.hexdigest()
    return found


def config_fields(config: Any) -> dict[str, Any]:
    """What the config says, as JSON would give it back, those inside it by dotted names.

    Names, versions and types of number are left out.
    """
    return dict(_fields(_plain(config.to_dict()), ""))


def _fields(data: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    noise = {
        "model_type", "auto_map", "lamina", "architectures", "dtype", "torch_dtype", "transformers_version",
        "quantization_config",
    }  # fmt: skip
    for key, value in data.items():
        if isinstance(value, Mapping) and "model_type" in value:
            yield from _fields(value, f"{above}{key}.")
        elif key not in noise and not key.startswith("_"):
            yield above + key, value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def short(error: BaseException) -> str:
    """An error of a library in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


# What follows runs in the fresh process alone.


class _NoLamina:
    """Refuses to find lamina, so that a checkpoint that needs it fails here and not at the user's."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "lamina":
            raise ModuleNotFoundError("lamina can't be imported here: the checkpoint must load without it", name=name)


def load(folder: Path, job: Mapping[str, Any]) -> Any:
    """The checkpoint by transformers' own loader; keys that are missing, left over or misshapen are an error."""
    extra: dict[str, Any] = {"attn_implementation": job["attention"]} if job.get("attention") else {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in config:
        extra["trust_remote_code"] = True
    model, info = _loader(config, job["module"]).from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True, **extra
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(map(str, info[kind]))
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}")
    return model.to(job["device"]).eval()


def _loader(config: Mapping[str, Any], module: str) -> Any:
    """The Auto class that the config maps, else the stock class that it names, of the module where that is written."""
    import transformers

    for name in config.get("auto_map", ()):
        if name.startswith("AutoModel"):
            return getattr(transformers, name)
    (name,) = config["architectures"]
    return getattr(importlib.import_module(module), name)


def examine(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Load one checkpoint and measure it against the reference in `folder`."""
    from safetensors.torch import load_file, save_file

    model = load(Path(job["folder"]), job)
    found: dict[str, Any] = {"config": config_fields(model.config), "class": type(model).__name__}
    own = digests(model)
    found["names"] = [sorted(set(job["digests"]) - set(own)), sorted(set(own) - set(job["digests"]))]
    differ = [k for k in own if k in job["digests"] and own[k] != job["digests"][k]]
    found["differ"] = differ
    if any(found["names"]) or differ:
        state = model.state_dict()
        save_file({k: state[k].detach().cpu().contiguous().clone() for k in differ[:3]}, folder / "differ.safetensors")
        return found
    reference = load_file(folder / "reference.safetensors", device=job["device"])
    inputs = {k.removeprefix("in."): v for k, v in reference.items() if k.startswith("in.")}
    with torch.no_grad():
        out = tensors(whole(model, inputs))
        found["outputs"] = {
            k: _apart(v, out[k]) if k in out else math.inf for k, v in reference.items() if k in job["same"]
        }
        if "reload_generate" in job["checks"]:
            found["tokens"] = greedy(model, inputs)[0].tolist()
        with exact(model):
            for check in set(job["checks"]) - {"reload_generate"}:
                found[check] = measure(check, model, inputs)[0]
    return found


def main(work: Path) -> None:
    """Examine every job of `work`/jobs.json; one that fails does not stop the others."""
    sys.meta_path.insert(0, _NoLamina())
    with contextlib.suppress(ModuleNotFoundError):
        __import__("lamina")
        raise RuntimeError("lamina could be imported in the process that must not have it")
    setting = json.loads((work / "jobs.json").read_text(encoding="utf-8"))
    torch.set_num_threads(setting["threads"])
    report = []
    for number, job in enumerate(setting["jobs"]):
        try:
            report.append(examine(job, work / str(number)))
        except Exception as error:
            report.append({"error": short(error)})
        gc.collect()
    (work / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
