"""Speech: the loss by a plain full forward, the words by decoding without a cache, the distance by recursion."""

from __future__ import annotations

import io
import math
import wave
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_kinds import kind
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from lamina.core.errors import InputError, UnsupportedError
from lamina.evaluators.tasks import speech
from lamina.evaluators.tasks._item import Subject, tasks
from lamina.lab import datasets
from lamina.testing.tools import tokenizer

MARKS = ["<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"]


def wav(samples: Any, rate: int = 16_000, channels: int = 1) -> bytes:
    to = io.BytesIO()
    with wave.open(to, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())
    return to.getvalue()


@pytest.fixture(scope="module")
def words() -> Any:
    found = tokenizer()
    found.add_special_tokens({"additional_special_tokens": MARKS})
    return found


@pytest.fixture(scope="module")
def whisper() -> Any:
    torch.manual_seed(0)
    parts = ("encoder", "decoder")
    sizes = {f"{p}_{n}": v for p in parts for n, v in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 16))}
    config = WhisperConfig(
        vocab_size=263, d_model=16, max_source_positions=50, max_target_positions=128, num_mel_bins=8,
        pad_token_id=262, bos_token_id=262, eos_token_id=262, decoder_start_token_id=260, init_std=0.3, **sizes,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tone for each clip."""
    for number, name in enumerate(speech.SAID, 2):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(wav(0.5 * np.sin(np.arange(8000) * number / 20)))
    monkeypatch.setattr(datasets, "dataset", lambda name: tmp_path)
    return tmp_path


def heard(clips: Path, name: str) -> torch.Tensor:
    with wave.open(str(clips / name)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    made = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    found: Any = made(samples.astype(np.float32), sampling_rate=16_000, return_tensors="pt")
    return found["input_features"]


def test_loss_by_a_full_forward(whisper: Any, words: Any, clips: Path) -> None:
    task = tasks()["librivox-loss"]
    marks = task.score(Subject(model=whisper, tokenizer=words))
    assert not task.higher
    for name, value in zip(marks.keys, marks.values, strict=True):
        said = words.encode(" " + speech.SAID[name], add_special_tokens=False)
        with torch.no_grad():
            ids = torch.tensor([[260, 261, *said]])
            logits = whisper(input_features=heard(clips, name), decoder_input_ids=ids).logits[0]
        aims = torch.tensor([*said, 262])
        assert value == pytest.approx(float(torch.nn.functional.cross_entropy(logits[1:], aims)), abs=1e-4)
    assert len(set(marks.values.round(6))) > 5  # each clip is another


def test_words_by_decoding_without_a_cache(whisper: Any, words: Any, clips: Path) -> None:
    marks = tasks()["librivox-words"].score(Subject(model=whisper, tokenizer=words, items=2))
    assert len(marks.keys) == 2
    for name, value in zip(marks.keys, marks.values, strict=True):
        most = 2 * len(words.encode(" " + speech.SAID[name], add_special_tokens=False)) + 8
        ids, features = [260, 261], heard(clips, name)
        with torch.no_grad():
            while len(ids) < most + 2:
                logits = whisper(input_features=features, decoder_input_ids=torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
                if ids[-1] == 262:
                    break
        text, truth = words.decode(ids, skip_special_tokens=True), speech.words(speech.SAID[name])
        assert value == speech.errors(truth, speech.words(text)) / len(truth)
        assert value > 0


def test_a_model_that_hears_it_right(words: Any, clips: Path) -> None:
    """A stand-in that writes each transcript, then its end."""
    rows = [[*words.encode(" " + speech.SAID[n], add_special_tokens=False), 262] for n in sorted(speech.SAID)]

    class Knows(torch.nn.Module):
        main_input_name = "input_features"

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config, self.one, self.clip = config, torch.nn.Parameter(torch.zeros(1)), -1
            self.device = torch.device("cpu")

        def get_encoder(self) -> Any:
            self.clip += 1
            return lambda features: self.clip

        def forward(self, encoder_outputs: int, decoder_input_ids: Any, past_key_values: Any, use_cache: bool) -> Any:
            at = (past_key_values or 0) + decoder_input_ids.shape[1]
            logits = torch.nn.functional.one_hot(torch.tensor([[rows[encoder_outputs][at - 2]]]), 263).float()
            return type("Out", (), {"logits": logits, "past_key_values": at})

    config: Any = type("C", (), {"num_mel_bins": 8, "max_source_positions": 50, "vocab_size": 263})
    config.is_encoder_decoder = True
    marks = tasks()["librivox-words"].score(Subject(model=Knows(config), tokenizer=words))
    assert marks.values.tolist() == [0.0] * len(speech.SAID)


def test_the_prompt_of_many_languages(whisper: Any) -> None:
    numbered: Any = type(
        "T", (), {"convert_tokens_to_ids": lambda self, t: t, "__call__": lambda s, t, **_: {"input_ids": [t]}}
    )()
    named: Any = type("M", (), {"config": type("C", (), {"vocab_size": 51865})})
    english: Any = type("M", (), {"config": type("C", (), {"vocab_size": 51864})})
    languages = ["<|en|>", "<|transcribe|>"]
    for model, more in ((named, languages), (english, [])):
        prompt, said, end = speech._ids(Subject(model=model, tokenizer=numbered), "Yes.")
        assert prompt == ["<|startoftranscript|>", *more, "<|notimestamps|>"]
        assert (said, end) == ([" Yes."], "<|endoftext|>")


WORDS = st.lists(st.sampled_from("abc"), max_size=6)


@given(WORDS, WORDS)
def test_errors_by_recursion(said: list[str], heard: list[str]) -> None:
    @cache
    def least(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(least(i - 1, j) + 1, least(i, j - 1) + 1, least(i - 1, j - 1) + (said[i - 1] != heard[j - 1]))

    assert speech.errors(said, heard) == least(len(said), len(heard))


def test_one_spelling() -> None:
    assert speech.words(" Mr. John, cold-hearted; it's 10 o'clock - 5!") == [
        "mister", "john", "cold", "hearted", "it's", "ten", "o'clock", "five",
    ]  # fmt: skip


def test_sound_of_another_rate() -> None:
    tone = 0.5 * np.sin(2 * math.pi * 440 * np.arange(8000) / 8000)
    found = speech.mono(wav(tone, 8000), "x")
    assert found.shape == (16_000,)
    expected = 0.5 * np.sin(2 * math.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=0.02)
    with pytest.raises(InputError, match="x: not one channel"):
        speech.mono(wav(tone, 8000, 2), "x")


def test_other_models_are_refused(whisper: Any, clips: Path) -> None:
    for name in ("librivox-loss", "librivox-words"):
        with pytest.raises(UnsupportedError, match="of Whisper's kind, not T5"):
            tasks()[name].score(Subject(model=kind("t5")[0]))
        with pytest.raises(InputError, match="tokenizer"):
            tasks()[name].score(Subject(model=whisper))
