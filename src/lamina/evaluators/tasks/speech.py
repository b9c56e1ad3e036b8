"""Tasks for models that write down speech (Whisper's kind): the loss on what is said, and the words heard wrong."""

from __future__ import annotations

import io
import math
import re
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.core.errors import InputError, UnsupportedError
from lamina.evaluators.tasks._item import Marks, Subject, task

Wave = NDArray[np.float32]
RATE = 16_000
"""Samples a second that the models hear."""
FRAMES = 50
"""Positions of the encoder for a second."""
MULTILINGUAL = 51865
"""The size from which on a vocabulary of Whisper has languages and tasks, which the prompt then names."""
BOOK = "librivox/sense_and_sensibility_01_austen_64kb-"
SAID = {
    f"{BOOK}0870.wav": (
        "And Mr. John Dashwood had then leisure to consider how much there might be prudently in his power to do for "
        "them."
    ),
    f"{BOOK}0880.wav": "He was not an ill-disposed young man.",
    f"{BOOK}0890.wav": "Unless to be rather cold-hearted and rather selfish is to be ill-disposed.",
    f"{BOOK}0920.wav": (
        "Had he married a more amiable woman, he might have been made still more respectable than he was."
    ),
    f"{BOOK}0930.wav": "He might even have been made amiable himself.",
    "cards/001.wav": "Ten of clubs.",
    "cards/002.wav": "Four queen of clubs.",
    "cards/003.wav": "Seven of clubs.",
    "cards/004.wav": "Five five.",
    "cards/005.wav": "Eight of spades, four of clubs, seven of hearts.",
}
"""Clip → what is said in it, as a book writes it: the package's own transcripts have small letters alone."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS = {"mr": "mister"} | {str(i): word for i, word in enumerate(NUMBERS)}
"""What stands for one word in two ways."""


@dataclass(frozen=True)
class Clip:
    """One clip: its name, 16,000 samples a second from -1 to 1, and what is said."""

    name: str
    samples: Wave
    said: str


@task(
    "librivox-loss",
    capability="speech",
    of="speech",
    data="librivox",
    metric="nats/token",
    higher=False,
    items=len(SAID),
)
def librivox_loss(subject: Subject) -> Marks:
    """How far what is said in ten clips lies from what the model would write, token by token."""
    import torch

    model: Any = subject.model
    values: list[float] = []
    for clip, encoded in _heard("librivox-loss", subject):
        prompt, said, end = _ids(subject, clip.said)
        ids = torch.tensor([[*prompt, *said]], device=model.device)
        with torch.inference_mode():
            logits = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits
            aims = torch.tensor([*said, end], device=logits.device)
            logs = logits[0, len(prompt) - 1 :].double().log_softmax(-1)
        values.append(-float(logs.gather(1, aims[:, None]).mean()))
    return Marks.of(values, _names(subject), how="teacher-forced, the transcript's tokens and its end, mean per clip")


@task(
    "librivox-words",
    capability="speech",
    of="speech",
    data="librivox",
    metric="word error",
    higher=False,
    items=len(SAID),
)
def librivox_words(subject: Subject) -> Marks:
    """Words heard wrong, left out or put in, per word said, in each of ten clips; greedy decoding."""
    values: list[float] = []
    for clip, encoded in _heard("librivox-words", subject):
        prompt, said, end = _ids(subject, clip.said)
        written = greedy(subject.model, encoded, prompt, end, most=2 * len(said) + 8)
        text = subject.tokenizer.decode(written, skip_special_tokens=True)
        truth = words(clip.said)
        values.append(errors(truth, words(text)) / len(truth))
    return Marks.of(
        values, _names(subject), how="greedy decoding of at most twice what is said; case and marks ignored"
    )


def greedy(model: Any, encoded: Any, prompt: Sequence[int], end: int, most: int) -> list[int]:
    """The ids that a model writes behind the prompt, one at a time, up to its end mark or `most`."""
    import torch

    found: list[int] = []
    past, fresh = None, list(prompt)
    with torch.inference_mode():
        while len(found) < most:
            ids = torch.tensor([fresh], device=model.device)
            out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=past, use_cache=True)
            past, fresh = out.past_key_values, [int(out.logits[0, -1].argmax())]
            if fresh[0] == end:
                break
            found += fresh
    return found


def words(text: str) -> list[str]:
    """The words of a text in one spelling: small letters, no marks, hyphened words in parts."""
    found = re.sub(r"[^\w' ]", " ", text.lower()).split()
    return [WORDS.get(word, word) for word in found]


def errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest words to change, leave out or put in (Levenshtein's distance)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def clips(folder: Path) -> list[Clip]:
    """The clips of the data set in a folder, in the order of their names."""
    return [Clip(name, mono((folder / name).read_bytes(), name), SAID[name]) for name in sorted(SAID)]


def mono(data: bytes, name: str) -> Wave:
    """A WAV file's samples, -1 to 1, at 16,000 a second. Raises InputError unless it is one channel of 16 bits."""
    from scipy.signal import resample_poly

    with wave.open(io.BytesIO(data)) as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise InputError("not one channel of 16 bits", where=name)
        rate, frames = file.getframerate(), file.readframes(file.getnframes())
    samples, common = np.frombuffer(frames, "<i2") / 32768, math.gcd(rate, RATE)
    return resample_poly(samples, RATE // common, rate // common).astype(np.float32)


def _heard(name: str, subject: Subject) -> Iterator[tuple[Clip, Any]]:
    """Each clip and what the encoder makes of it, as the decoder takes it.

    Raises UnsupportedError for a model of another make, InputError for one without a tokenizer.
    """
    import torch
    from transformers import WhisperFeatureExtractor

    from lamina.lab.datasets import dataset

    model: Any = subject.model
    if not hasattr(model.config, "num_mel_bins") or not getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(f"this task is for models of Whisper's kind, not {type(model).__name__}", where=name)
    if subject.tokenizer is None:
        raise InputError("this task needs the model's tokenizer", where=name, hint="put its files into the folder")
    seconds = max(model.config.max_source_positions // FRAMES, 1)
    features = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins, chunk_length=seconds)
    chosen = clips(dataset("librivox"))[: subject.items]
    for number, clip in enumerate(chosen, 1):
        heard: Any = features(clip.samples, sampling_rate=RATE, return_tensors="pt")["input_features"]
        with torch.inference_mode():
            encoded = model.get_encoder()(heard.to(model.device, next(model.parameters()).dtype))
        yield clip, encoded
        subject.progress(name, number, len(chosen))


def _names(subject: Subject) -> list[str]:
    return sorted(SAID)[: subject.items]


def _ids(subject: Subject, said: str) -> tuple[list[int], list[int], int]:
    """Ids of the prompt, of what is said, and of the end mark."""
    model: Any = subject.model
    named = ("<|en|>", "<|transcribe|>") if model.config.vocab_size >= MULTILINGUAL else ()
    marks = ["<|startoftranscript|>", *named, "<|notimestamps|>", "<|endoftext|>"]
    *prompt, end = subject.tokenizer.convert_tokens_to_ids(marks)
    return prompt, subject.tokenizer(f" {said}", add_special_tokens=False)["input_ids"], end
